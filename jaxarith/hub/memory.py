"""Reuses the memory of tensors that were read for the next tensors.

Fresh memory costs as much time as the reading, and memory maps would count as memory of
the process.
"""

import collections
import threading
import weakref

import numpy as np

_ALIGNMENT = 64  # bytes; JAX uses memory on the host without a copy if so aligned
_KEPT = 512 * 2**20  # the most bytes that are kept for reuse
_LARGE = 2**20  # bytes; less memory is cheap to allocate


class Memory:
    """A pool of memory that waits to be used again."""

    def __init__(self):
        self._free: list[np.ndarray] = []  # the oldest first
        self._returned: collections.deque[np.ndarray] = collections.deque()
        self._bytes, self._lock = 0, threading.Lock()

    def take(self, size: int) -> np.ndarray:
        """Returns aligned bytes, which come back to the pool once nobody holds them."""
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
        # This is a new array over the same memory, and all views are views of it. JAX
        # holds it until the last program that reads it has ended.
        lent = np.frombuffer(raw.data, np.uint8, size, start)
        weakref.finalize(lent, self._give_back, raw).atexit = False
        return lent

    def _give_back(self, raw):
        self._returned.append(raw)
        # A finalizer may run at any point, even inside `take` of this thread.
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


def lend(size: int) -> np.ndarray:
    """Returns aligned bytes; large ones come from the pool of reused memory."""
    if size >= _LARGE:
        return _pool.take(size)
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size]
