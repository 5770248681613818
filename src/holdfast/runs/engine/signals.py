"""Handling of Ctrl-C and SIGTERM during a run: a write in progress is finished, and a message states how to resume the
run.

Files of a run are either complete or absent, so the run may stop at any point. The first signal stops the run at once,
or at the end of a write in progress. A second signal stops it even during a write.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from holdfast.core.errors import Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """Raised by the signal handler of a run on Ctrl-C or SIGTERM. It is not an `Exception`, so that `except Exception`
    does not catch it.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class Stopper:
    """Handler of Ctrl-C and SIGTERM that stops a run, after the end of a write if one is in progress."""

    def __init__(self) -> None:
        self._busy = False
        self._waiting: int | None = None

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Context manager for writing a file of a run. If a first interrupt signal arrives during the write, it takes
        effect at the end of the write.
        """
        self._busy = True
        try:
            yield
        finally:
            self._busy = False
        # outside of `finally`, so that an error of the write itself is not replaced
        if self._waiting is not None:
            raise Stopped(self._waiting)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle SIGINT or SIGTERM: raise `Stopped`, or store the signal until the end of a write."""
        if self._busy and self._waiting is None:
            self._waiting = number
            return
        raise Stopped(number)


@contextmanager
def stoppable(way_out: str) -> Iterator[Stopper]:
    """Context manager in which Ctrl-C and SIGTERM stop a run. It then raises `Interrupted` with the text `way_out`,
    which states how to resume.

    Only the main thread of a process may handle signals; in other threads the handlers are not changed.
    """
    stopper = Stopper()
    if threading.current_thread() is not threading.main_thread():
        yield stopper
        return
    before = {number: signal.signal(number, stopper) for number in _SIGNALS}
    try:
        yield stopper
    except Stopped as stopped:
        name = signal.Signals(stopped.number).name
        raise Interrupted(f"stopped by {name}; {way_out}", signal_number=stopped.number) from None
    finally:
        for number, handler in before.items():
            # None is a handler that was not installed from Python, which Python cannot restore
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
