"""Small matrices are factored by one BLAS thread each, several of them side by side.

XLA factors matrices on CPUs by SciPy's LAPACK, whose BLAS keeps a thread for each core.
They wait for each other, and for the cores that XLA's own threads hold: on 2 cores of
an AMD EPYC with another process at work, the singular value decomposition of a matrix
of 768 by 768 took 5.4 s with two of them and 0.11 s with one. XLA runs one program
after another, however many are given to it by one thread; so each has a thread here.
"""

import contextlib
import os
from collections import deque
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxarith import resources

_SMALL = 1024  # the shorter side of a matrix
_ENTRIES = 2**22  # of a matrix that others are factored beside
_AT_A_TIME = min(os.cpu_count() or 1, 8)  # each holds a leaf of all tasks


def limited(leaves: Iterable[jax.Array]) -> contextlib.AbstractContextManager[None]:
    """One BLAS thread while small matrices are factored; wait for results inside."""
    shapes = [jnp.shape(leaf) for leaf in leaves]
    sides = [min(shape) for shape in shapes if len(shape) == 2]
    if not sides or max(sides) > _SMALL:
        return contextlib.nullcontext()
    return resources.one_blas_thread()


def fit_beside_others(leaves: Iterable[Any], *args: Any) -> bool:
    """Whether leaves are small matrices, in the memory of a CPU as their arguments."""
    return all(map(_is_small, leaves)) and all(map(_is_here, jax.tree.leaves(args)))


def are_vectors(leaves: Collection[Any], *args: Any) -> bool:
    """Whether leaves, such as biases, are merged at once while matrices are factored.

    They have one axis or none, and are in the memory of a CPU as their arguments.
    """
    few = all(jnp.ndim(leaf) < 2 for leaf in leaves)
    return few and all(map(_is_here, jax.tree.leaves((list(leaves), args))))


def _is_small(leaf):
    return (
        jnp.ndim(leaf) == 2
        and min(leaf.shape) <= _SMALL
        and leaf.size <= _ENTRIES
        and isinstance(leaf, jax.Array)
        and _is_here(leaf)
    )


def _is_here(value):
    if not isinstance(value, jax.Array):
        return True
    if isinstance(value, Tracer):
        return False
    devices = value.sharding.device_set
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"


class Queue:
    """Work on several leaves at a time, whose results are taken in their order.

    Args:
      put: `put(path, result)` takes a result, in the thread that adds work.
    """

    def __init__(self, put: Callable[[str, Any], None]):
        self._put = put
        self._most = resources.at_most(_AT_A_TIME)
        self._pool = ThreadPoolExecutor(self._most)
        self._waiting: deque[tuple[str, Future]] = deque()

    def __enter__(self) -> "Queue":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self.finish()
        self._pool.shutdown(cancel_futures=True)

    def add(self, path: str, work: Callable[[], Any]) -> None:
        """Starts work as soon as fewer than one per core are under way."""
        while len(self._waiting) >= self._most:
            self._take()
        self._waiting.append((path, self._pool.submit(work)))

    def finish(self) -> None:
        """Waits for all work and takes its results."""
        while self._waiting:
            self._take()

    def _take(self):
        path, future = self._waiting.popleft()
        self._put(path, future.result())
