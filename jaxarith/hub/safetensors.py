"""Safetensors files for streaming: every tensor by itself, in any order and thread.

`hub` reads whole models through the safetensors package. Here that package judges the
files, and then their bytes are read into memory that is used again: fresh memory costs
as much as the reading, and memory maps would count as memory of the process.
"""

import collections
import json
import math
import os
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

_ALIGNMENT = 64  # from which on JAX uses memory on the host as it is
_KEPT = 512 * 2**20  # bytes of memory that wait for their next use
_LARGE = 2**20  # smaller memory is cheap to get
_DTYPES = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16},
    "BF16": ml_dtypes.bfloat16,
    **{f"I{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)},
    "BOOL": np.bool_,
}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


class Tensor(NamedTuple):
    """Where a tensor lies.

    Attributes:
      dtype: of NumPy.
      shape: its shape.
      file: the file.
      offset: of its first byte in the file.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, count: int) -> "Tensor":
        """The first rows of it."""
        return self._replace(shape=(count, *self.shape[1:]))

    def read(self) -> np.ndarray:
        """The values, in memory that is used again once nobody holds them.

        Raises:
          ValueError: the file is shorter than it was.
        """
        memory = _memory(self.nbytes)
        with open(self.file, "rb", buffering=0) as file:
            done = 0
            while done < self.nbytes:
                count = os.preadv(file.fileno(), [memory[done:]], self.offset + done)
                if not count:
                    raise ValueError(f"{self.file} was cut short while it was read.")
                done += count
        return memory.view(self.dtype).reshape(self.shape)


def open_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file by name, none of them read, and its metadata.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is truncated or corrupt, or has tensors of a type that JAX or NumPy
        does not compute with.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    try:
        with safe_open(path, framework="numpy") as file:  # the header, checked
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is truncated or corrupt: {error}. "
            "Download or write it again."
        ) from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    unknown = {name for name, entry in header.items() if entry["dtype"] not in _DTYPES}
    if unknown:
        name = min(unknown)
        raise ValueError(
            f"{path} has {len(unknown)} tensors of a type that cannot be merged, such "
            f"as {name} of {header[name]['dtype']}. Quantised models must be converted "
            "to a floating-point type first."
        )
    tensors = {
        name: Tensor(
            np.dtype(_DTYPES[entry["dtype"]]),
            tuple(entry["shape"]),
            path,
            8 + length + entry["data_offsets"][0],
        )
        for name, entry in header.items()
    }
    return tensors, metadata


class Shard(NamedTuple):
    """A file that is to be written.

    Attributes:
      name: of the file.
      header: its first bytes.
      offsets: where each tensor begins.
      nbytes: of the whole file.
    """

    name: str
    header: bytes
    offsets: dict[str, int]
    nbytes: int


def plan(
    layout: Mapping[str, Any], shard_bytes: int, metadata: Mapping[str, str]
) -> list[Shard]:
    """The files for tensors of known types and shapes, in the order given.

    Args:
      layout: by name, anything with `dtype` and `shape`.
      shard_bytes: the most bytes of tensors in a file, unless one tensor has more.
      metadata: of every file.
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
    # Wide types first, so that all tensors are aligned to their own.
    for key in sorted(layout, key=lambda key: -np.dtype(layout[key].dtype).itemsize):
        leaf, size = layout[key], _nbytes(layout[key])
        header[key] = {
            "dtype": _NAMES[np.dtype(leaf.dtype)],
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


def index(shards: list[Shard], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `model.safetensors.index.json`."""
    weight_map = {name: shard.name for shard in shards for name in shard.offsets}
    total = sum(shard.nbytes - len(shard.header) for shard in shards)
    return {
        "metadata": {**metadata, "total_size": total},
        "weight_map": dict(sorted(weight_map.items())),
    }


class Writer:
    """Writes the tensors of shards in any order; every one must be put once.

    Raises:
      ValueError: on leaving, if a tensor was never put.
    """

    def __init__(self, folder: Path, shards: list[Shard]):
        self._folder, self._shards = folder, shards
        self._missing = {name for shard in shards for name in shard.offsets}
        self._places: dict[str, tuple[int, int]] = {}
        self._files: list[int] = []

    def __enter__(self):
        for shard in self._shards:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            file = os.open(self._folder / shard.name, flags, 0o666)
            self._files.append(file)
            os.truncate(file, shard.nbytes)
            _write(file, 0, np.frombuffer(shard.header, np.uint8))
            for name, offset in shard.offsets.items():
                self._places[name] = file, offset
        return self

    def put(self, name: str, array: np.ndarray):
        """Writes a tensor, of the type and shape that were planned."""
        self._missing.remove(name)
        _write(*self._places[name], np.ascontiguousarray(array).reshape(-1))

    def __exit__(self, kind, *_):
        for file in self._files:
            os.close(file)
        if kind is None and self._missing:
            raise ValueError(
                f"{len(self._missing)} tensors were not merged, such as "
                f"{min(self._missing)}."
            )


def _write(file, offset, array):
    left = memoryview(array.view(np.uint8))
    while left:
        count = os.pwrite(file, left, offset)
        left, offset = left[count:], offset + count


class Memory:
    """Memory that waits to be used again."""

    def __init__(self):
        self._free: list[np.ndarray] = []  # the oldest first
        self._returned: collections.deque[np.ndarray] = collections.deque()
        self._bytes, self._lock = 0, threading.Lock()

    def take(self, size: int) -> np.ndarray:
        """Aligned bytes, which come back by themselves when nobody holds them."""
        needed = -(-size // 4096) * 4096 + _ALIGNMENT
        with self._lock:
            self._sort_in()
            fitting = (i for i, raw in enumerate(self._free) if raw.size == needed)
            if (found := next(fitting, None)) is None:
                raw = np.empty(needed, np.uint8)
            else:
                raw = self._free.pop(found)
                self._bytes -= needed
        start = -raw.ctypes.data % _ALIGNMENT
        # A new array of the same memory, of which all views are views. JAX holds it
        # until the last program that reads it has ended.
        lent = np.frombuffer(raw.data, np.uint8, size, start)
        weakref.finalize(lent, self._give_back, raw).atexit = False
        return lent

    def _give_back(self, raw):
        self._returned.append(raw)
        # A finalizer may come in anywhere, in `take` of this very thread too.
        if self._lock.acquire(blocking=False):
            try:
                self._sort_in()
            finally:
                self._lock.release()

    def _sort_in(self):
        while self._returned:
            self._free.append(self._returned.popleft())
            self._bytes += self._free[-1].size
        while self._bytes > _KEPT:
            self._bytes -= self._free.pop(0).size


_pool = Memory()


def _memory(size):
    return _pool.take(size) if size >= _LARGE else _aligned(size)


def _aligned(size):
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size]
