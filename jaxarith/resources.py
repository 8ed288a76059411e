"""The devices and threads that work on leaves may use, for the whole process.

Arrays that this module puts on a device are not "committed" to it, as JAX calls it. If
a computation needs arrays from several devices, JAX moves them. So leaves may be spread
over devices, while small statistics of all leaves come together where they are needed.
"""

import contextlib
import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import threadpoolctl

Device: TypeAlias = Any  # jax.Device; type checkers mistake that for a variable
_devices: tuple[Device, ...] = ()
_threads: int | None = None


@contextlib.contextmanager
def used(
    *, devices: Sequence[Device] | None = None, threads: int | None = None
) -> Iterator[None]:
    """Sets the devices and the number of threads, in all threads of the process.

    The settings last as long as the context.

    Args:
      devices: devices over which leaves are spread. None keeps those of the surrounding
        context; without one, leaves stay on one device.
      threads: largest number of threads in each pool. None keeps the number of the
        surrounding context; without one, each pool uses its own number.

    Example:
      >>> with used(threads=2):
      ...     at_most(8)
      2
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
    """Returns the number of threads for a pool that wants `count` of them."""
    return count if _threads is None else min(count, _threads)


def devices() -> int:
    """Returns the number of devices over which leaves are spread."""
    return max(len(_devices), 1)


def spread(sizes: Mapping[str, int]) -> dict[str, Device]:
    """Assigns a device to each leaf, so that all devices get about as many bytes.

    Each leaf goes to the device that has the fewest bytes so far.

    Args:
      sizes: number of bytes of each leaf, by path.

    Returns:
      The device of each leaf, by path; empty unless there are several devices.

    Example:
      >>> with used(devices=["gpu 0", "gpu 1"]):
      ...     spread({"kernel": 3, "scale": 1, "bias": 1})
      {'kernel': 'gpu 0', 'scale': 'gpu 1', 'bias': 'gpu 1'}
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
    """Computes on a device in this thread; None keeps JAX's default device."""
    return contextlib.nullcontext() if device is None else jax.default_device(device)


def beside(array: jax.Array) -> contextlib.AbstractContextManager:
    """Computes on the device of an array, if leaves are spread over devices."""
    return on(next(iter(array.devices())) if len(_devices) > 1 else None)


_lock = threading.Lock()
_inside = 0
_limit = contextlib.ExitStack()


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Limits BLAS, and so LAPACK, to one thread in the whole process.

    Several BLAS threads wait for each other and for XLA's threads. On 2 busy cores the
    sketch of a matrix of 4096 by 1536 took 2.4 s with several threads and 0.13 s with
    one.
    """
    # The limit holds for the whole process, so the last thread to leave lifts it.
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
    # threadpoolctl only finds a BLAS that is loaded. JAX imports this same module when
    # it first compiles a factorisation, maybe in another thread at this moment. Had one
    # of the two threads begun with `scipy.linalg`, Python would find a deadlock.
    import scipy.linalg.cython_blas  # noqa: F401

    return threadpoolctl.ThreadpoolController()
