"""Turns signals that end a program into exceptions, so that it cleans up first."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """A signal came.

    Attributes:
      status: the status to exit with, 128 and the signal's number.
    """

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.status = 128 + number


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Raises `Stopped` on the first SIGTERM or SIGHUP; later ones are ignored.

    Signals that are already handled or ignored (for example by nohup) stay so. Only the
    main thread can handle signals; in another thread this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = [x for x in _SIGNALS if signal.getsignal(x) is signal.SIG_DFL]

    def stop(number, frame):
        if _is_swallowed(frame):
            threading.Timer(0.01, os.kill, (os.getpid(), number)).start()
            return
        for other in ours:
            signal.signal(other, signal.SIG_IGN)  # the cleaning takes a while
        raise Stopped(number)

    for number in ours:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _is_swallowed(frame):
    """Whether an exception would only be printed, as during garbage collection."""
    while frame is not None:
        if frame.f_code.co_name in ("__del__", "_give_back", "_xla_gc_callback"):
            return True
        frame = frame.f_back
    return False
