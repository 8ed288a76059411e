"""Notes signals that ask a run to stop, until it can stop."""

import contextlib
import itertools
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# JAX agrees on a number that no process has reached, so it must grow with every run.
_calls = itertools.count()


@contextlib.contextmanager
def noted() -> Iterator[Callable[[], signal.Signals | None]]:
    """Notes SIGTERM, SIGHUP and Ctrl-C, which would end the process.

    A second signal has its usual effect. SIGHUP stays ignored under nohup. Only the
    main thread can handle signals; in another thread this does nothing. With several
    processes any of them may get SIGTERM: JAX notes it, and all stop at the same step.
    Ctrl-C is not noted then.

    Yields:
      A function that returns the signal that came, or None. All processes must call it
      equally often. A signal that it has not reported takes effect at the end.
    """
    if jax.process_count() > 1:
        reached = multihost_utils.reached_preemption_sync_point
        yield lambda: signal.SIGTERM if reached(next(_calls)) else None
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    came, told = None, False
    before = {number: signal.getsignal(number) for number in SIGNALS}
    if before[signal.SIGHUP] is signal.SIG_IGN:
        del before[signal.SIGHUP]

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number, frame):
        nonlocal came
        came = signal.Signals(number)
        restore()

    def signalled():
        nonlocal told
        told = came is not None
        return came

    for number in before:
        signal.signal(number, note)
    try:
        yield signalled
    finally:
        restore()
        if came and not told:
            signal.raise_signal(came)
