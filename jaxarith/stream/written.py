"""Merges checkpoints that are larger than memory, from files to files.

A merge of `jaxarith.merge` is a few passes over its task vectors, leaf by leaf. Here
their leaves are in files: `open_models` returns trees of `lazy.Leaf`s, and `merge`
calls the unchanged method with them. Each pass reads one leaf of all models at a time,
and the next ones ahead; merged leaves are written while others are read and computed.
The results are those in memory, bit for bit.
"""

import collections
import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxarith import hub, lazy, resources, tree
from jaxarith.files import is_blob, stamp
from jaxarith.hub import Stored, safetensors
from jaxarith.stream.opened import Opened
from jaxarith.typing import Params, Taus

SHARD_BYTES = 5_000_000_000
_HASHERS = 2  # files that are hashed at a time
_WAITING = 256 * 2**20  # bytes of merged leaves that wait to be written
_PROGRAM = 700 * 2**20  # what Python, JAX and compiled programs take


class Plan(NamedTuple):
    """The plan of a merge: what it will read and write.

    Attributes:
      tensors: the number of tensors that are written.
      bytes_in: the bytes that one pass reads.
      bytes_out: the bytes that are written.
      largest: the bytes of the largest tensor, in one model.
      peak_bytes: an estimate of the memory that most methods need.
      files: the files that are written.
    """

    tensors: int
    bytes_in: int
    bytes_out: int
    largest: int
    peak_bytes: int
    files: list[safetensors.Shard]


class Report(NamedTuple):
    """The report of a merge: what it read and wrote.

    Attributes:
      seconds: the time from opened models to complete weights.
      bytes_read: bytes that all passes read, with those that adapters add.
      bytes_written: bytes of the weights.
      sha256: by folder and file, the hash of the weights that were merged; empty if
        not asked for.
    """

    seconds: float
    bytes_read: int
    bytes_written: int
    sha256: dict[str, dict[str, str]]


class _Written(NamedTuple):
    dtype: np.dtype
    shape: tuple[int, ...]


def plan(
    opened: Opened,
    *,
    dtype: DTypeLike | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Plan:
    """Plans a merge: what it will read and write, and how much memory it needs.

    Args:
      opened: the models.
      dtype: dtype of the floating-point tensors that are written, for example
        `"bfloat16"`; None keeps those of the base.
      shard_bytes: the most bytes of tensors in a file.

    Example:
      >>> opened = open_models("base", ["math", "code"])  # doctest: +SKIP
      >>> plan(opened, dtype="bfloat16").bytes_out  # doctest: +SKIP
    """
    layout = {
        name: _Written(_written_dtype(tensor, dtype), tensor.shape)
        for name, tensor in opened.base.items()
    }
    files = safetensors.plan(layout, shard_bytes, opened.metadata)
    rows = [
        {x for tau in opened.taus if name in tau for x in tau[name].sources}
        for name in layout
    ]
    sizes = [sum(source.nbytes for source in row) for row in rows]
    largest = max(tensor.nbytes for tensor in opened.base.values())
    # Memory holds rows that are computed, read ahead or kept for reuse, and results in
    # float32 that are computed or wait to be written.
    peak = _PROGRAM + 3 * max(sizes) + 4 * largest
    return Plan(
        tensors=len(layout),
        bytes_in=sum(sizes),
        bytes_out=sum(file.nbytes for file in files),
        largest=largest,
        peak_bytes=peak,
        files=files,
    )


def _written_dtype(tensor: Stored, dtype: DTypeLike | None) -> np.dtype:
    if dtype is None or not tensor.is_floating:
        return tensor.dtype
    return jnp.dtype(dtype)


def merge(
    method: Callable[[Params, Taus], Params],
    opened: Opened,
    out: str | os.PathLike,
    *,
    dtype: DTypeLike | None = None,
    shard_bytes: int = SHARD_BYTES,
    hashes: bool = True,
    overwrite: bool = False,
    quiet: bool = False,
    finish: Callable[[Path, Report], None] | None = None,
) -> Report:
    """Merges checkpoints into a new one.

    The result is written to a temporary folder beside `out`, and renamed to `out` when
    it is complete. A killed process leaves the temporary folder, and `out` unchanged.
    If it is killed between the two renames that replace an old `out`, the old one is in
    the temporary folder.

    Args:
      method: `method(params_0, taus) -> params`: any of `jaxarith.merge` that needs no
        data, with its options bound. Only AWD's solver "adam" holds whole vectors.
      opened: the models.
      out: the new folder.
      dtype: dtype of the floating-point tensors that are written, to which results are
        rounded once; None keeps those of the base.
      shard_bytes: the most bytes of tensors in a file.
      hashes: whether to hash all weights that are read (SHA-256), in other threads.
        The Hub's cache has the hashes of its files.
      overwrite: whether to replace an existing `out`.
      quiet: whether to show no progress bar.
      finish: `finish(folder, report)` writes the files beside the weights.

    Raises:
      FileExistsError: `out` exists, or another program made or changed it in the
        meantime.
      ValueError: `out` holds one of the models, their files change meanwhile, the
        method refuses them or its options, or values are NaN or infinite.
      OSError: the disk does not have enough space.

    Example:
      >>> from jaxarith import merge as operators
      >>> opened = open_models("base", ["math", "code"])  # doctest: +SKIP
      >>> merge(operators.average, opened, "merged")  # doctest: +SKIP
    """
    out = hub.check_out(out, overwrite, opened.folders)
    before = hub.state(out)
    stamps = {file: stamp(file) for x in opened.folders for file in hub.weight_files(x)}
    planned = plan(opened, dtype=dtype, shard_bytes=shard_bytes)
    with hub.staging(out.parent) as temporary:
        _check_space(temporary, planned.bytes_out)
        new = temporary / "new"
        new.mkdir()
        begin, stop = time.perf_counter(), threading.Event()
        with ThreadPoolExecutor(1, "hash") as pool:
            hashing = pool.submit(sha256, opened.folders, stop) if hashes else None
            try:
                with opened.progress.shown(planned.bytes_in, quiet):
                    _write(method, opened, new, planned.files, dtype)
                hashed = hashing.result() if hashing else {}
            finally:
                stop.set()
        report = Report(
            seconds=time.perf_counter() - begin,
            bytes_read=opened.progress.bytes_read,
            bytes_written=planned.bytes_out,
            sha256=hashed,
        )
        if len(planned.files) > 1:
            content = safetensors.index(planned.files, {})
            text = json.dumps(content, indent=2) + "\n"
            (new / hub.INDEX).write_text(text, encoding="utf-8")
        if finish is not None:
            finish(new, report)
        safetensors.check_unchanged(stamps)
        hub.publish(new, out, before, temporary / "old")
    return report


def _check_space(folder, needed):
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"the merged weights take {needed / 1e9:.2f} GB, but the disk of "
            f"{folder.parent} has {free / 1e9:.2f} GB left. Free some space, write to "
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
        for name in opened.base.keys() - sink.names:  # no task vector moves these
            sink.copy(name)


class _Places:
    """Rounds merged leaves, and writes them in a thread."""

    def __init__(
        self, opened: Opened, writer: safetensors.Writer, dtype: DTypeLike | None
    ):
        self._opened, self._writer, self._dtype = opened, writer, dtype
        self.names: set[str] = set()
        self._waiting: collections.deque[tuple[int, Future]] = collections.deque()
        self._used = 0
        self._pool = ThreadPoolExecutor(1, "write")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            while self._waiting and kind is None:
                self._wait()
        finally:
            self._pool.shutdown(cancel_futures=True)

    def put(self, name: str, merged: jax.Array) -> None:
        self.names.add(name)
        tensor = self._opened.base[name]
        dtype = _written_dtype(tensor, self._dtype)
        # JAX may have no float64; NumPy does.
        wanted = jax.dtypes.canonicalize_dtype(dtype)
        if not isinstance(merged, jax.Array) or merged.dtype != wanted:
            merged = jnp.asarray(merged, wanted)
        self._submit(tensor, self._put, name, merged, dtype)

    def _put(self, name, rounded, dtype):
        # For a small one, NumPy has the answer before XLA begins.
        is_small = rounded.nbytes < lazy.SMALL
        array = np.asarray(rounded)
        with resources.beside(rounded):
            finite = np.isfinite(array).all() if is_small else lazy.all_finite(rounded)
        if not finite:
            raise ValueError(self._blame(name))
        self._writer.put(name, array.astype(dtype, copy=False))

    def copy(self, name: str) -> None:
        self.names.add(name)
        tensor = self._opened.base[name]
        self._submit(tensor, self._copy, name, tensor)

    def _copy(self, name, tensor):
        # Through NumPy, which has all types; JAX may not have integers of 64 bits.
        dtype = _written_dtype(tensor, self._dtype)
        with np.errstate(over="ignore"):
            array = tensor.read().astype(dtype, copy=False)
        if tensor.is_floating and not np.isfinite(array).all():
            raise ValueError(self._blame(name))
        self._writer.put(name, array)

    def _submit(self, tensor, function, *args):
        if tensor.nbytes < lazy.SMALL:
            function(*args)
            return
        most = _WAITING * resources.devices()
        while self._waiting and self._used + tensor.nbytes > most:
            self._wait()
        self._used += tensor.nbytes
        self._waiting.append((tensor.nbytes, self._pool.submit(function, *args)))

    def _wait(self):
        size, future = self._waiting.popleft()
        self._used -= size
        future.result()

    def _blame(self, name):
        taus = [tau[name] for tau in self._opened.taus if name in tau]
        for leaf in (self._opened.params_0[name], *taus):
            for source in leaf.sources:
                if not lazy.all_finite(source.read()):
                    return lazy.not_finite(source.label)
        return (
            f"{name}: the merge overflows the written dtype, although all models are "
            "finite. Lower the coefficients, or write float32."
        )


def sha256(
    folders: Iterable[Path], stop: threading.Event | None = None
) -> dict[str, dict[str, str]]:
    """Returns the SHA-256 of all files of models' weights, by folder and file.

    Args:
      folders: folders of checkpoints and adapters, and single files.
      stop: ends the work when it is set; None never does.

    Example:
      >>> sha256([Path("merged")])  # doctest: +SKIP
      {'merged': {'model.safetensors': '…'}}
    """
    pairs = [
        (str(folder), file)
        for folder in dict.fromkeys(folders)
        for file in hub.weight_files(folder)
    ]

    def of(file):
        # If the merge failed, the other hashes are not needed.
        return None if stop is not None and stop.is_set() else _of_file(file)

    hashes: dict[str, dict[str, str]] = {}
    with ThreadPoolExecutor(resources.at_most(_HASHERS), "hash") as pool:
        found = pool.map(of, [file for _, file in pairs])
        for (folder, file), digest in zip(pairs, found, strict=True):
            if digest is not None:
                hashes.setdefault(folder, {})[file.name] = digest
    return hashes


def _of_file(path):
    # Large blobs of the Hub's cache are named by their SHA-256.
    blob = path.resolve().name
    if is_blob(path) and re.fullmatch(r"[0-9a-f]{64}", blob):
        return blob
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
