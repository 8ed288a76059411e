"""Leaves in files, which are read only when a computation needs them.

A tree may hold a `Leaf` in place of an array. Every merge loops over its task vectors
with `tree.aligned`. If a tree has a `Leaf`, that function returns `Rows`. `Rows` read
one leaf of all tasks when asked for it, and read the next ones ahead in threads. An
array that was read stays in memory only as long as somebody holds it.
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
SMALL = 2**18  # bytes; smaller leaves take less time to read than a thread to start
_AHEAD = 64 * 2**20  # bytes that are read ahead, but at least one row
_ROWS_AHEAD = 32  # most rows to read ahead, so that no row waits for many small ones


def wide_dtype(*leaves: Any) -> np.dtype:
    """Returns the dtype to compute in: the common dtype, but float32 or better.

    Floats of at most eight bits count as float32, because JAX does not promote them.

    Example:
      >>> wide_dtype(jnp.ones(1, jnp.bfloat16))
      dtype('float32')
    """
    dtypes = (jnp.result_type(leaf) for leaf in leaves)
    wide = (dtype if dtype.itemsize > 1 else jnp.float32 for dtype in dtypes)
    return jnp.result_type(jnp.float32, *wide)


class Source:
    """A tensor in a file that is read once for all who hold it at the same time.

    A `hub.Stored` describes a tensor in a file and reads it again each time. A source
    is shared by all leaves that are computed from the tensor, and by the threads that
    read ahead. For example, all task vectors share the sources of the base model. A
    source holds the array only weakly.

    Attributes:
      label: name of the tensor in error messages.
      nbytes: size in bytes.
      check: whether the next `read` looks for NaN and infinite values.
    """

    def __init__(self, label: str, nbytes: int, load: Callable[[], Any]):
        self.label, self.nbytes, self.check = label, nbytes, False
        self._load, self._lock = load, threading.Lock()
        self._held: Callable[[], Any] = _nothing

    def read(self) -> jax.Array | np.ndarray:
        """Returns the tensor; reads it from its file unless somebody still holds it.

        Raises:
          ValueError: `check` is True and the tensor holds NaN or infinite values.
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
    """Returns whether no entry is NaN or infinite, `bool[]`.

    Example:
      >>> print(all_finite(jnp.array([1.0, jnp.inf])))
      False
    """
    # Zero times NaN or infinity is NaN, and so is the sum. The maximum does not work:
    # on CPUs XLA's maximum skips NaN in float32.
    return jnp.sum(array * 0) == 0


def not_finite(label: str) -> str:
    """Returns the error message about a tensor with NaN or infinite values."""
    return (
        f"{label} has NaN or infinite values. Check the run or the file that it came "
        "from."
    )


class Leaf:
    """A leaf that is computed from tensors in files when it is read.

    Args:
      shape, dtype: shape and dtype of the result.
      sources: the tensors in files.
      combine: `combine(*arrays)` computes the leaf from the tensors.
      place: `place(merged)` writes the merged leaf that replaces this one. None for
        leaves that are only read, as in task vectors.
      held: arrays in memory, or pytrees of them; `combine` takes them last.
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
        """Reads the leaf: returns an array or a `Difference`."""
        return self._combine(*(source.read() for source in self.sources), *self.held)

    def __jax_array__(self) -> jax.Array:
        return jnp.asarray(self.read())

    def check(self) -> None:
        """Makes the first read look for NaN and infinite values."""
        for source in self.sources:
            source.check = True

    def place(self, merged: jax.Array) -> "Leaf":
        """Writes the merged leaf; returns a leaf that stands for it in the merged tree.

        Raises:
          ValueError: this leaf is only for reading.
        """
        if self._place is None:
            raise ValueError(
                "this leaf is read from a file, and no output file was given for it. "
                "Merge checkpoints with `stream.merge`."
            )
        self._place(merged)
        return Leaf(self.shape, self.dtype, (), functools.partial(_gone, self.shape))

    def to(self, place: Callable[[jax.Array], None]) -> "Leaf":
        """Returns the same leaf with another function that writes the merged leaf."""
        given = (self.shape, self.dtype, self.sources, self._combine)
        return Leaf(*given, place=place, held=self.held)


def changed(leaf: Any, function: Callable[..., jax.Array], *args: Any) -> Leaf:
    """Returns a leaf that applies a function to another leaf at every read.

    The result is not kept.

    Args:
      leaf: an array, or another leaf in a file.
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
        # Without this wait, JAX would allocate the results of many leaves in advance.
        return jax.block_until_ready(function(array, *arrays[first:]))

    held = (*leaf.held, *args)
    return Leaf(leaf.shape, wide_dtype(leaf), leaf.sources, change, held=held)


def _gone(shape):
    raise ValueError(
        f"a merged leaf of shape {list(shape)} was written to a file and is not in "
        "memory. Read it from the merged files."
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Difference:
    """`model - base` in float32 or better; the program that uses it subtracts.

    Two tensors of bfloat16 take as long to read as one of float32. A difference that
    was subtracted in advance would need a float32 tensor for each model.
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
    """A mapping from paths to rows: one leaf of every task, read when looked up.

    The sources of the next rows are read ahead, up to the size of the largest row, so a
    loop over the rows in order seldom waits. Small rows are not read ahead: to start a
    thread takes longer than to read them.

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
        """The leaves before they are read; their shapes and dtypes cost nothing."""
        return self._leaves

    @contextlib.contextmanager
    def spread(self) -> Iterator[None]:
        """Reads large rows to the devices of `resources`, while the context lasts.

        Code that computes with a row must do so inside `on(path)`.
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
            del held  # until here it keeps the sources in memory, so none is read twice
            return row
        # The futures hold the arrays that they read, so nothing is read again below.
        reading = self._ahead.pop(path, None) or self._start(path)
        self._read_ahead(path)
        for future in reading:
            future.result()
        return tuple(map(read, self._leaves[path]))

    def __contains__(self, path: object) -> bool:
        return path in self._leaves  # the method of `Mapping` would read the row

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
        if self._devices:  # each device needs a row to work on
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
    """Returns the mapping itself, or `Rows` of it if one row has a leaf in a file."""
    in_files = any(isinstance(leaf, Leaf) for row in leaves.values() for leaf in row)
    return Rows(leaves) if in_files else leaves


def read(leaf: Any) -> Any:
    """Returns the values of a leaf in a file, and any other leaf unchanged."""
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
