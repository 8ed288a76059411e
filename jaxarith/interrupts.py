"""Signals that ask a run to stop, noted until it can."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def noted() -> Iterator[Callable[[int], signal.Signals | None]]:
    """Notes SIGTERM and Ctrl-C instead of dying of them.

    A second one acts as it did before. Only the main thread can handle signals; in
    another this does nothing. Of several processes any may get SIGTERM, and JAX, which
    notes it, makes all stop at the same step; Ctrl-C is not noted there.

    Yields:
      A function of the number of steps done, to be called after each in every process.
      It returns the signal that came, or None.
    """
    if jax.process_count() > 1:
        reached = multihost_utils.reached_preemption_sync_point
        yield lambda step: signal.SIGTERM if reached(step) else None
        return
    came: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: None
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number, frame):
        came.append(signal.Signals(number))
        restore()

    for number in SIGNALS:
        signal.signal(number, note)
    try:
        yield lambda step: came[0] if came else None
    finally:
        restore()
