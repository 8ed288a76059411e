"""Which devices and how many threads the work on leaves may take, in the whole process.

Arrays that are put on a device here are not committed to it, as JAX calls it: where a
computation needs arrays of several, JAX moves them. So leaves may be spread while small
statistics of all of them meet wherever they are needed.
"""

import contextlib
import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import threadpoolctl

Device: TypeAlias = Any  # jax.Device, which type checkers take for a variable
_devices: tuple[Device, ...] = ()
_threads: int | None = None


@contextlib.contextmanager
def used(
    *, devices: Sequence[Device] | None = None, threads: int | None = None
) -> Iterator[None]:
    """Uses these while the context lasts, in all threads.

    Args:
      devices: the devices over which leaves are spread; None stays with those of the
        surrounding context, or with one where there is none.
      threads: the most threads of a kind; None stays with that of the surrounding
        context, or with as many as each kind takes.
    """
    global _devices, _threads
    before = _devices, _threads
    if devices is not None:
        _devices = tuple(devices)
    if threads is not None:
        _threads = threads
    try:
        yield
    finally:
        _devices, _threads = before


def at_most(count: int) -> int:
    """The number of threads, where a kind of them would take so many."""
    return count if _threads is None else min(count, _threads)


def devices() -> int:
    """The number of devices over which leaves are spread."""
    return max(len(_devices), 1)


def spread(sizes: Mapping[str, int]) -> dict[str, Device]:
    """The device of each leaf, by its bytes; none without several devices.

    Each goes to the device that has the fewest bytes so far. So the next ones go to
    others, and each device gets about as much.
    """
    if len(_devices) < 2:
        return {}
    taken = dict.fromkeys(_devices, 0)
    found = {}
    for path, size in sizes.items():
        found[path] = min(taken, key=taken.__getitem__)
        taken[found[path]] += size
    return found


def on(device: Device | None) -> contextlib.AbstractContextManager:
    """Computes on a device in this thread; None is where JAX does by default."""
    return contextlib.nullcontext() if device is None else jax.default_device(device)


def beside(array: jax.Array) -> contextlib.AbstractContextManager:
    """Computes where an array is, if leaves are spread."""
    return on(next(iter(array.devices())) if len(_devices) > 1 else None)


_lock = threading.Lock()
_inside = 0
_limit = contextlib.ExitStack()


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Keeps BLAS, and LAPACK with it, to one thread in the whole process.

    Several wait for each other and for XLA's: on 2 busy cores the sketch of a matrix of
    4096 by 1536 took 2.4 s with them, and 0.13 s with one.
    """
    # The limit is the process's, so the last thread to leave lifts it.
    global _inside
    with _lock:
        if not _inside:
            _limit.enter_context(_controller().limit(limits=1, user_api="blas"))
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _limit.close()


@functools.cache
def _controller():
    import scipy.linalg  # noqa: F401, its BLAS must be loaded to be found

    return threadpoolctl.ThreadpoolController()
