"""Small matrices are factored with one BLAS thread each, several at the same time.

On CPUs, XLA factors matrices with SciPy's LAPACK. Its BLAS keeps one thread for each
core. These threads wait for each other, and for the cores that XLA's threads hold. On 2
cores of an AMD EPYC, while another process was running, the singular value
decomposition of a matrix of 768 by 768 took 5.4 s with two BLAS threads and 0.11 s with
one. XLA runs all programs that one thread starts one after another. So each
factorisation has its own thread here.
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

_SMALL = 1024  # largest length of the shorter side of a small matrix
_ENTRIES = 2**22  # most entries of a matrix that is factored at the same time as others
_AT_A_TIME = min(os.cpu_count() or 1, 8)  # each one holds a leaf of all tasks


def limited(leaves: Iterable[jax.Array]) -> contextlib.AbstractContextManager[None]:
    """Limits BLAS to one thread if the matrices are small.

    Wait for the results inside this context.
    """
    shapes = [jnp.shape(leaf) for leaf in leaves]
    sides = [min(shape) for shape in shapes if len(shape) == 2]
    if not sides or max(sides) > _SMALL:
        return contextlib.nullcontext()
    return resources.one_blas_thread()


def fit_beside_others(leaves: Iterable[Any], *args: Any) -> bool:
    """Returns whether all leaves are small matrices, and all arrays are on one CPU."""
    return all(map(_is_small, leaves)) and all(map(_is_here, jax.tree.leaves(args)))


def are_vectors(leaves: Collection[Any], *args: Any) -> bool:
    """Returns whether leaves can be merged while matrices are still being factored.

    They can if they have at most one axis, as biases do, and all arrays are on one CPU.
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
    """A queue that works on several leaves at a time and returns results in order.

    Args:
      put: `put(path, result)` receives each result, in the thread that adds work.
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
        """Starts work; waits first if all threads are busy."""
        while len(self._waiting) >= self._most:
            self._take()
        self._waiting.append((path, self._pool.submit(work)))

    def finish(self) -> None:
        """Waits for all work and hands its results to `put`."""
        while self._waiting:
            self._take()

    def _take(self):
        path, future = self._waiting.popleft()
        self._put(path, future.result())
