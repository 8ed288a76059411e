"""Reads tensors of safetensors files in any order and thread, and writes new files.

The safetensors package checks a file. Then its tensors are read one by one into memory
that is reused.
"""

import errno
import functools
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxarith import files, tree
from jaxarith.hub import memory
from jaxarith.hub.stored import DTYPES, NAMES, Stored

_ALIGNMENT = 64  # bytes; JAX uses memory on the host without a copy if so aligned


def open_file(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Returns the tensors of a safetensors file by name, not read, and its metadata.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the path is not a file, or the file is truncated or corrupt, or it
        changes while it is opened.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"there is no file {path}; expected weights in safetensors. Check the path."
        )
    with files.opened(path) as file:
        stamp = files.stamp(file.fileno())
        try:
            with safe_open(path, framework="numpy") as judged:  # the header, checked
                metadata = judged.metadata() or {}
        except SafetensorError as error:
            raise ValueError(corrupt(path, error)) from error
        _check_same(path, stamp, files.stamp(path))  # the checked file is the one read
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if (dtype := DTYPES.get(entry["dtype"])) is None:
            raise ValueError(
                f"{path}: {name} has the unknown dtype {entry['dtype']}. Convert the "
                "model to a floating-point dtype first."
            )
        start = 8 + length + entry["data_offsets"][0]
        read = functools.partial(_read, path, stamp, start, dtype)
        tensors[name] = Stored(dtype, tuple(entry["shape"]), read)
    return tensors, metadata


def _read(path, stamp, start, dtype, count):
    """Reads `count` numbers into memory that is reused once nobody holds them."""
    taken = memory.lend(count * dtype.itemsize)
    left = taken.data
    # A file is opened anew for each tensor, because a model may have more shards than a
    # process may have open files.
    file = os.open(path, os.O_RDONLY)
    try:
        _check_same(path, stamp, files.stamp(file))
        while left:
            if not (read := os.preadv(file, [left], start)):
                raise ValueError(f"{path} was cut short while it was read.")
            left, start = left[read:], start + read
    finally:
        os.close(file)
    return taken.view(dtype)


def check_unchanged(stamps: Mapping[Path, files.Stamp]) -> None:
    """Raises a ValueError if a file was replaced, changed or removed.

    Args:
      stamps: the earlier `files.stamp` of each file.
    """
    for path, stamp in stamps.items():
        try:
            now = files.stamp(path)
        except FileNotFoundError:
            raise ValueError(f"{path} was removed while it was read.") from None
        _check_same(path, stamp, now)


def _check_same(path, before, now):
    if now.size < before.size:
        raise ValueError(f"{path} was cut short while it was read.")
    if now != before:
        raise ValueError(
            f"{path} was replaced or changed while it was read. Start again when the "
            "file is complete."
        )


def corrupt(path: Path, error: Exception) -> str:
    """Returns the error message for a file that cannot be read."""
    return (
        f"{path} ({path.stat().st_size} bytes) is truncated or corrupt: {error}. "
        "Download or write it again."
    )


class Shard(NamedTuple):
    """A file that will be written.

    Attributes:
      name: name of the file.
      header: the first bytes of the file.
      offsets: the byte at which each tensor begins.
      nbytes: size of the whole file, in bytes.
    """

    name: str
    header: bytes
    offsets: dict[str, int]
    nbytes: int


def plan(
    layout: Mapping[str, Any], shard_bytes: int, metadata: Mapping[str, str]
) -> list[Shard]:
    """Plans the files for tensors of known dtypes and shapes, in the given order.

    Args:
      layout: by name, anything with `dtype` and `shape`.
      shard_bytes: the most bytes of tensors in a file, unless one tensor has more.
      metadata: the metadata for the header of every file.
    """
    groups: list[list[str]] = [[]]
    used = 0
    for name, leaf in layout.items():
        size = _nbytes(leaf)
        if groups[-1] and used + size > shard_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    if len(groups) == 1:
        names = ["model.safetensors"]
    else:
        count = len(groups)
        names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    return [
        _shard(name, {key: layout[key] for key in group}, metadata)
        for name, group in zip(names, groups, strict=True)
    ]


def _nbytes(leaf):
    return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize


def _shard(name, layout, metadata):
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    starts, used = {}, 0
    # Wide dtypes come first, so that each tensor is aligned to its dtype.
    for key in sorted(layout, key=lambda key: -np.dtype(layout[key].dtype).itemsize):
        leaf, size = layout[key], _nbytes(layout[key])
        header[key] = {
            "dtype": NAMES[np.dtype(leaf.dtype)],
            "shape": list(leaf.shape),
            "data_offsets": [used, used + size],
        }
        starts[key] = used
        used += size
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    text = len(text).to_bytes(8, "little") + text
    offsets = {key: len(text) + start for key, start in starts.items()}
    return Shard(name, text, offsets, len(text) + used)


def index(shards: Sequence[Shard], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of `model.safetensors.index.json`."""
    weight_map = {name: shard.name for shard in shards for name in shard.offsets}
    total = sum(shard.nbytes - len(shard.header) for shard in shards)
    return {
        "metadata": {**metadata, "total_size": total},
        "weight_map": dict(sorted(weight_map.items())),
    }


class Writer:
    """Writes the tensors of shards, in any order; each must be put once.

    Raises:
      ValueError: at the end of the `with` block, if a tensor was never put.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard]):
        self._folder, self._shards = folder, shards
        self._missing = {name for shard in shards for name in shard.offsets}
        self._places: dict[str, tuple[int, int]] = {}
        self._files: list[int] = []

    def __enter__(self) -> Self:
        try:
            for shard in self._shards:
                self._open(shard)
        except BaseException as error:
            self._close()
            if isinstance(error, OSError) and error.errno == errno.EMFILE:
                raise OSError(
                    f"{len(self._shards)} files are more than this process may open. "
                    "Choose larger files (--shard-size), or raise the limit (ulimit "
                    "-n)."
                ) from error
            raise
        return self

    def _open(self, shard):
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        file = os.open(self._folder / shard.name, flags, 0o666)
        self._files.append(file)
        os.truncate(file, shard.nbytes)
        _write(file, 0, np.frombuffer(shard.header, np.uint8))
        for name, offset in shard.offsets.items():
            self._places[name] = file, offset

    def _close(self):
        while self._files:
            os.close(self._files.pop())

    def put(self, name: str, array: np.ndarray) -> None:
        """Writes a tensor, which must have the planned dtype and shape."""
        self._missing.remove(name)
        _write(*self._places[name], np.ascontiguousarray(array).reshape(-1))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._close()
        if kind is None and self._missing:
            were = tree.counted(len(self._missing), "tensor was", "tensors were")
            raise ValueError(f"{were} not merged, such as {min(self._missing)}.")


def _write(file, offset, array):
    left = memoryview(array.view(np.uint8))
    while left:
        count = os.pwrite(file, left, offset)
        left, offset = left[count:], offset + count
