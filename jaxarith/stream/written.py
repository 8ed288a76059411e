"""Merges of checkpoints that are larger than memory, from files to files.

A merge of `jaxarith.merge` is a few passes over its task vectors, leaf by leaf. Here
their leaves are in files: `open_models` gives trees of `lazy.Leaf`s, and `merge` calls
the method with them as it is. Each pass reads a leaf of all models at a time, the next
ones ahead; merged leaves are written while others are read and computed. The results
are those in memory, bit for bit.
"""

import collections
import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxarith import hub, lazy, tree
from jaxarith.hub import safetensors
from jaxarith.stream import policies
from jaxarith.stream.opened import Opened as Opened
from jaxarith.stream.opened import open_models as open_models
from jaxarith.typing import Tree

SHARD_BYTES = 5_000_000_000
_INDEX = "model.safetensors.index.json"
_WAITING = 256 * 2**20  # bytes of merged leaves that wait to be written
_PROGRAM = 700 * 2**20  # what Python, JAX and compiled programs take


class Plan(NamedTuple):
    """What a merge will do.

    Attributes:
      tensors: the number of tensors that are written.
      bytes_in: what one pass reads.
      bytes_out: what is written.
      largest: the bytes of the largest tensor, in one model.
      peak_bytes: an estimate of the memory that most methods need.
      files: those that are written.
    """

    tensors: int
    bytes_in: int
    bytes_out: int
    largest: int
    peak_bytes: int
    files: list[safetensors.Shard]


class Report(NamedTuple):
    """What a merge did.

    Attributes:
      seconds: how long it took, from when the models were open to complete weights.
      bytes_read: by all passes.
      bytes_written: the weights.
      sha256: by folder and file, of the weights that went in; empty if not asked for.
    """

    seconds: float
    bytes_read: int
    bytes_written: int
    sha256: dict[str, dict[str, str]]


def plan(opened: Opened, *, dtype=None, shard_bytes: int = SHARD_BYTES) -> Plan:
    """What a merge of these models reads, writes and needs, before it is done.

    Args:
      opened: the models.
      dtype: of the floating-point tensors that are written, such as `"bfloat16"`; None
        keeps those of the base.
      shard_bytes: the most bytes in a file.
    """
    layout = {
        name: tensor._replace(dtype=_written(tensor, dtype))
        for name, tensor in opened.base.items()
    }
    files = safetensors.plan(layout, shard_bytes, opened.metadata)
    rows = [
        {x for tau in opened.taus if name in tau for x in tau[name].sources}
        for name in layout
    ]
    sizes = [sum(source.nbytes for source in row) for row in rows]
    largest = max(tensor.nbytes for tensor in opened.base.values())
    # Rows that are computed, read ahead and left for the next use, and results in
    # float32 that are computed and waiting.
    peak = _PROGRAM + 3 * max(sizes) + 4 * largest
    return Plan(
        *(len(layout), sum(sizes), sum(file.nbytes for file in files), largest),
        *(peak, files),
    )


def _written(tensor, dtype):
    if dtype is None or not policies.is_floating(tensor):
        return tensor.dtype
    return jnp.dtype(dtype)


def merge(
    method: Callable[[Tree, Sequence[Tree]], Tree],
    opened: Opened,
    out: str | os.PathLike,
    *,
    dtype=None,
    shard_bytes: int = SHARD_BYTES,
    hashes: bool = True,
    overwrite: bool = False,
    quiet: bool = False,
    finish: Callable[[Path, Report], None] | None = None,
) -> Report:
    """Merges checkpoints into a new one.

    It is written to a temporary folder beside `out`, which gets its name when all is
    complete. A process that is killed leaves that folder, and `out` as it was; killed
    between the two renames that replace an old one, it leaves that in the folder too.

    Args:
      method: `method(params_0, taus) -> params`: any of `jaxarith.merge` that needs no
        data, with its options bound. "adam" of AWD alone holds whole vectors.
      opened: the models.
      out: the new folder.
      dtype: of the floating-point tensors that are written, to which results are
        rounded once; None keeps those of the base.
      shard_bytes: the most bytes of tensors in a file.
      hashes: whether SHA-256 of all weights that are read are taken, in a thread of its
        own. Those of the Hub's cache are known.
      overwrite: whether an existing `out` is replaced.
      quiet: whether there is no progress bar.
      finish: `finish(folder, report)`, which writes what belongs beside the weights.

    Raises:
      FileExistsError: `out` exists.
      ValueError: the method refuses the models or its options, or values are NaN or
        infinite.
      OSError: there is not enough space.

    Example:
      >>> from jaxarith import merge as operators
      >>> opened = open_models("base", ["math", "code"])  # doctest: +SKIP
      >>> merge(operators.average, opened, "merged")  # doctest: +SKIP
    """
    out = Path(out).absolute()
    check_out(out, overwrite)
    planned = plan(opened, dtype=dtype, shard_bytes=shard_bytes)
    with hub.staging(out.parent) as temporary:
        _check_space(temporary, planned.bytes_out)
        new = temporary / "new"
        new.mkdir()
        begin, stop = time.perf_counter(), threading.Event()
        with ThreadPoolExecutor(1, "hash") as pool:
            hashing = pool.submit(_sha256, opened.folders, stop) if hashes else None
            try:
                with opened.progress.shown(planned.bytes_in, quiet):
                    _write(method, opened, new, planned.files, dtype)
                hashed = hashing.result() if hashing else {}
            finally:
                stop.set()
        report = Report(
            time.perf_counter() - begin,
            opened.progress.bytes_read,
            planned.bytes_out,
            hashed,
        )
        if len(planned.files) > 1:
            content = safetensors.index(planned.files, {})
            text = json.dumps(content, indent=2) + "\n"
            (new / _INDEX).write_text(text, encoding="utf-8")
        if finish is not None:
            finish(new, report)
        _replace(new, out, temporary / "old")
    return report


def _replace(new, out, old):
    """Renames a folder to `out`, and what is there to `old`."""
    try:
        if out.exists():
            os.replace(out, old)
        os.replace(new, out)
    except BaseException:
        if old.exists() and not out.exists():
            os.replace(old, out)
        raise


def check_out(out: Path, overwrite: bool):
    """Raises a FileExistsError if a folder is there and is not to be replaced."""
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir() or out.samefile(Path.cwd()):
        raise FileExistsError(
            f"{out} is a file, a link or the current folder; name a new folder."
        )
    if not overwrite:
        raise FileExistsError(
            f"{out} exists; name a new folder, or replace it with overwrite=True "
            "(--overwrite)."
        )


def _check_space(folder, needed):
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"the merged weights take {needed / 1e9:.2f} GB and the disk of "
            f"{folder.parent} has {free / 1e9:.2f} GB left. Free some, write to "
            "another disk, or choose a narrower dtype."
        )


def _write(method, opened, folder, files, dtype):
    with (
        safetensors.Writer(folder, files) as writer,
        _Places(opened, writer, dtype) as sink,
    ):
        params = method(opened.start(dtype, sink.put), opened.taus)
        for name, leaf in tree.flatten(params).items():
            if not isinstance(leaf, lazy.Leaf):
                sink.put(name, leaf)
        for name in opened.base.keys() - sink.names:  # what no task vector moves
            sink.copy(name)


class _Places:
    """Where merged leaves go: they are rounded, and written by a thread."""

    def __init__(self, opened, writer, dtype):
        self._opened, self._writer, self._dtype = opened, writer, dtype
        self.names: set[str] = set()
        self._waiting: collections.deque[tuple[int, Future]] = collections.deque()
        self._used = 0
        self._pool = ThreadPoolExecutor(1, "write")

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        try:
            while self._waiting and kind is None:
                self._wait()
        finally:
            self._pool.shutdown(cancel_futures=True)

    def put(self, name, merged):
        self.names.add(name)
        tensor = self._opened.base[name]
        dtype = _written(tensor, self._dtype)
        # JAX may have no float64; NumPy does.
        rounded = jnp.asarray(merged, jax.dtypes.canonicalize_dtype(dtype))
        self._submit(tensor, self._put, name, rounded, dtype)

    def _put(self, name, rounded, dtype):
        if not lazy.all_finite(rounded):
            raise ValueError(self._blame(name))
        self._writer.put(name, np.asarray(rounded).astype(dtype, copy=False))

    def copy(self, name):
        self.names.add(name)
        tensor = self._opened.base[name]
        self._submit(tensor, self._copy, name, tensor)

    def _copy(self, name, tensor):
        # Through NumPy, which has all types; JAX may not have integers of 64 bits.
        dtype = _written(tensor, self._dtype)
        with np.errstate(over="ignore"):
            array = tensor.read().astype(dtype, copy=False)
        if policies.is_floating(tensor) and not np.isfinite(array).all():
            raise ValueError(self._blame(name))
        self._writer.put(name, array)

    def _submit(self, tensor, function, *args):
        while self._waiting and self._used + tensor.nbytes > _WAITING:
            self._wait()
        self._used += tensor.nbytes
        self._waiting.append((tensor.nbytes, self._pool.submit(function, *args)))

    def _wait(self):
        size, future = self._waiting.popleft()
        self._used -= size
        future.result()

    def _blame(self, name):
        for leaf in [
            self._opened.params_0[name],
            *(t.get(name) for t in self._opened.taus),
        ]:
            for source in leaf.sources if leaf is not None else ():
                if not lazy.all_finite(source.read()):
                    return lazy.not_finite(source.label)
        return (
            f"{name}: the merge overflows the type that is written, though all models "
            "are finite. Lower the coefficients, or write float32."
        )


def _sha256(folders, stop):
    hashes = {}
    for folder in dict.fromkeys(folders):
        for file in weights(folder):
            if stop.is_set():  # nobody waits for the rest of a merge that failed
                return hashes
            hashes.setdefault(str(folder), {})[file.name] = _of_file(file)
    return hashes


def weights(folder: Path) -> list[Path]:
    """The files of a checkpoint's or an adapter's weights."""
    if (file := folder / "model.safetensors").is_file():
        return [file]
    if (index := folder / _INDEX).is_file():
        return sorted(set(hub.shards(index).values()))
    return [file for file in [folder / hub.ADAPTER] if file.is_file()]


def _of_file(path):
    # Files of the Hub's cache are links to blobs that are named by their SHA-256.
    if re.fullmatch(r"[0-9a-f]{64}", blob := path.resolve().name):
        return blob
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
