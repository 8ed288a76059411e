"""Leaves that are in files, and are read when a computation looks at them.

A tree may hold a `Leaf` in place of an array. `tree.aligned`, with which every merge
goes over its task vectors, then returns `Rows`: they read a leaf of all tasks when
asked for it, and the next ones ahead, in threads. What was read is kept only as long
as somebody holds it.
"""

import contextlib
import dataclasses
import functools
import itertools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxarith import resources

_READERS = 2
SMALL = 2**18  # bytes that are read, or written, in less time than a thread starts to
_AHEAD = 64 * 2**20  # bytes of rows that are read ahead, or one row
_ROWS_AHEAD = 32  # however small; the time of a row must not depend on all others


def wide_dtype(*leaves: Any) -> np.dtype:
    """Dtype in which arrays are computed with: their common one, float32 or better.

    Floats of eight bits or fewer, which JAX promotes to nothing, count as float32.
    """
    dtypes = (jnp.result_type(leaf) for leaf in leaves)
    wide = (dtype if dtype.itemsize > 1 else jnp.float32 for dtype in dtypes)
    return jnp.result_type(jnp.float32, *wide)


class Source:
    """A tensor on its way from a file, read once for all who hold it at one time.

    A `hub.Stored` says what is in a file, and reads it anew each time. A source is
    shared by the leaves that are computed from the tensor, as the base is by all task
    vectors, and by the threads that read ahead; it holds the array only weakly.

    Attributes:
      label: what an error calls it.
      nbytes: its size.
      check: whether `read` looks for NaN and infinite values, the first time.
    """

    def __init__(self, label: str, nbytes: int, load: Callable[[], Any]):
        self.label, self.nbytes, self.check = label, nbytes, False
        self._load, self._lock = load, threading.Lock()
        self._held: Callable[[], Any] = _nothing

    def read(self) -> jax.Array | np.ndarray:
        """The tensor: read now, unless somebody still holds it.

        Raises:
          ValueError: it holds NaN or infinite values, and is to be checked.
        """
        with self._lock:
            if (held := self._held()) is not None:
                return held
            array = self._load()
            if self.check:
                in_numpy = isinstance(array, np.ndarray)
                if not (np.isfinite(array).all() if in_numpy else all_finite(array)):
                    raise ValueError(not_finite(self.label))
                self.check = False
            self._held = weakref.ref(array)
            return array


def _nothing():
    return None


@jax.jit
def all_finite(array: jax.Array) -> jax.Array:
    """Whether no entry is NaN or infinite."""
    # Zero times what is not finite is NaN, and so is the sum. The maximum would not do:
    # on CPUs XLA's passes over NaN in float32.
    return jnp.sum(array * 0) == 0


def not_finite(label: str) -> str:
    """What an error says about a tensor with NaN or infinite values."""
    return (
        f"{label} has NaN or infinite values. Check the run or the file that it came "
        "from."
    )


class Leaf:
    """A leaf that is computed from tensors in files when it is read.

    Args:
      shape, dtype: shape and dtype of the result.
      sources: the tensors.
      combine: `combine(*arrays)` computes the leaf from them.
      place: `place(merged)` writes the leaf that a merge puts in place of this one;
        None where nothing is merged into, as for task vectors.
      held: pytree of arrays in memory that `combine` takes after the tensors.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtype: DTypeLike,
        sources: Iterable[Source],
        combine: Callable[..., Any],
        place: Callable[[jax.Array], None] | None = None,
        held: Sequence[Any] = (),
    ):
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        self.sources, self.held = tuple(sources), tuple(held)
        self._combine, self._place = combine, place

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    def read(self) -> "jax.Array | Difference":
        """The array, or the `Difference`."""
        return self._combine(*(source.read() for source in self.sources), *self.held)

    def __jax_array__(self) -> jax.Array:
        return jnp.asarray(self.read())

    def check(self) -> None:
        """Lets the first reading look for NaN and infinite values."""
        for source in self.sources:
            source.check = True

    def place(self, merged: jax.Array) -> "Leaf":
        """Writes the merged leaf; returns what stands for it in the merged tree.

        Raises:
          ValueError: this leaf is only read.
        """
        if self._place is None:
            raise ValueError(
                "this leaf is in a file and has no file to be merged into: merge "
                "checkpoints by `stream.merge`."
            )
        self._place(merged)
        return Leaf(self.shape, self.dtype, (), functools.partial(_gone, self.shape))

    def to(self, place: Callable[[jax.Array], None]) -> "Leaf":
        """The same leaf, with another place for what a merge puts in its place."""
        given = (self.shape, self.dtype, self.sources, self._combine)
        return Leaf(*given, place=place, held=self.held)


def changed(leaf: Any, function: Callable[..., jax.Array], *args: Any) -> Leaf:
    """A leaf that is put through a function whenever it is read, and not kept.

    Args:
      leaf: an array, or a leaf that is read itself.
      function: `function(array, *args) -> array` of the same shape, in float32 or
        better.
      *args: arrays.
    """
    if not isinstance(leaf, Leaf):
        shape, dtype = jnp.shape(leaf), jnp.result_type(leaf)
        leaf = Leaf(shape, dtype, (), jnp.asarray, held=(leaf,))
    combine = leaf._combine

    def change(*arrays):
        first = len(arrays) - len(args)
        array = combine(*arrays[:first])
        # Without waiting, the results of many leaves would be allocated ahead.
        return jax.block_until_ready(function(array, *arrays[first:]))

    held = (*leaf.held, *args)
    return Leaf(leaf.shape, wide_dtype(leaf), leaf.sources, change, held=held)


def _gone(shape):
    raise ValueError(f"a merged leaf of shape {list(shape)} was written, not kept.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Difference:
    """`model - base` in float32 or better, subtracted by the program that needs it.

    Two tensors of bfloat16 take as long to read as one of float32, and each model would
    need a float32 tensor of its own.
    """

    model: jax.Array
    base: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.model.shape

    @property
    def ndim(self) -> int:
        return self.model.ndim

    @property
    def size(self) -> int:
        return self.model.size

    @property
    def dtype(self) -> np.dtype:
        return wide_dtype(self.model, self.base)

    def __getitem__(self, index: Any) -> "Difference":
        return Difference(self.model[index], self.base[index])

    def __jax_array__(self) -> jax.Array:
        return jnp.asarray(self.model, self.dtype) - jnp.asarray(self.base, self.dtype)


class Rows(Mapping):
    """By path, a leaf of every task, read when asked for.

    The sources of the next rows are read ahead, up to the bytes of the largest row, so
    that whoever goes through the rows in order seldom waits. Small rows are not: to
    hand one to a thread takes longer than to read it.

    Args:
      leaves: by path, a tuple of `Leaf`s and arrays.
    """

    def __init__(self, leaves: Mapping[str, tuple]):
        self._leaves = leaves
        self._sources = {path: _sources(row) for path, row in leaves.items()}
        sizes = {path: _nbytes(sources) for path, sources in self._sources.items()}
        self._large = {path: n for path, n in sizes.items() if n >= SMALL}
        self._next: dict[str, str | None] = {}  # the next large row
        large = None
        for path in reversed([*leaves]):
            self._next[path] = large
            large = path if path in self._large else large
        self._budget = max(max(sizes.values(), default=0), _AHEAD)
        self._ahead: dict[str, list[Future]] = {}
        self._devices: dict[str, resources.Device] = {}

    @property
    def unmapped(self) -> Mapping[str, tuple]:
        """The leaves before they are read: their shapes and dtypes, at no cost."""
        return self._leaves

    @contextlib.contextmanager
    def spread(self) -> Iterator[None]:
        """Reads large rows to the devices of `resources`, while the context lasts.

        What computes with a row must do it within `on(path)`.
        """
        self._devices = resources.spread(self._large)
        try:
            yield
        finally:
            self._devices = {}

    def on(self, path: str) -> contextlib.AbstractContextManager:
        """Computes in this thread on the device of a row."""
        return resources.on(self._devices.get(path))

    def __getitem__(self, path: str) -> tuple:
        if path not in self._large:
            if not self._ahead:
                self._read_ahead(path)
            held = [source.read() for source in self._sources[path]]
            row = tuple(map(read, self._leaves[path]))
            del held  # what was read is not read again above
            return row
        # Futures hold what they have read: it is not read again below.
        reading = self._ahead.pop(path, None) or self._start(path)
        self._read_ahead(path)
        for future in reading:
            future.result()
        return tuple(map(read, self._leaves[path]))

    def __contains__(self, path: object) -> bool:
        return path in self._leaves  # that of `Mapping` would read it

    def __iter__(self) -> Iterator[str]:
        return iter(self._leaves)

    def __len__(self) -> int:
        return len(self._leaves)

    def _start(self, path):
        device = self._devices.get(path)
        return [
            _readers().submit(_read_to, device, source)
            for source in self._sources[path]
        ]

    def _read_ahead(self, path):
        wanted, used = [], 0
        budget = self._budget
        if self._devices:  # all of them shall have a row
            budget = max(budget, _AHEAD * resources.devices())
        while (path := self._next[path]) is not None:
            used += self._large[path]
            if wanted and (used > budget or len(wanted) == _ROWS_AHEAD):
                break
            wanted.append(path)
        self._ahead = {
            path: self._ahead.get(path) or self._start(path) for path in wanted
        }


def rows(leaves: Mapping[str, tuple]) -> Mapping[str, tuple]:
    """The rows themselves, or `Rows` of them if one has a leaf in a file."""
    in_files = any(isinstance(leaf, Leaf) for row in leaves.values() for leaf in row)
    return Rows(leaves) if in_files else leaves


def read(leaf: Any) -> Any:
    """The values of a leaf in a file; any other leaf as it is."""
    return leaf.read() if isinstance(leaf, Leaf) else leaf


def _sources(row):
    found = (leaf.sources for leaf in row if isinstance(leaf, Leaf))
    return list(dict.fromkeys(itertools.chain.from_iterable(found)))


def _nbytes(sources):
    return sum(source.nbytes for source in sources)


def _read_to(device, source):
    with resources.on(device):
        return source.read()


def _readers():
    return _pool(resources.at_most(_READERS))


@functools.cache
def _pool(count):
    return ThreadPoolExecutor(count, thread_name_prefix="read")
