"""Which devices and how many threads the work on leaves may take, in the whole process.

Arrays that are put on a device here are not committed to it, as JAX calls it: where a
computation needs arrays of several, JAX moves them. So leaves may be spread while small
statistics of all of them meet wherever they are needed.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax

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
