"""Ctrl-C and SIGTERM: stop where we are, let what is being written be finished, and say how to go on.

Nothing of a run is lost by stopping between two bytes, since its files are whole or absent; so the first signal stops
at once, except inside a write, which it lets finish. The second one stops even there.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from holdfast.core.errors import Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """Raised wherever the program is when a signal comes; no `except Exception` on the way swallows it."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class Stopper:
    """Knows whether a signal has come, and whether it must wait."""

    def __init__(self) -> None:
        self._busy = False
        self._waiting: int | None = None

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Within it, the first signal waits for the end."""
        self._busy = True
        try:
            yield
        finally:
            self._busy = False
        if self._waiting is not None:
            raise Stopped(self._waiting)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The handler of both signals."""
        if self._busy and self._waiting is None:
            self._waiting = number
            return
        raise Stopped(number)


@contextmanager
def stoppable(way_out: str) -> Iterator[Stopper]:
    """Handle the signals for the time of a run; `Interrupted` says `way_out` when one has come.

    Only the main thread of a process may handle signals; elsewhere they are left as they are.
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
        raise Interrupted(f"stopped by {name}; {way_out}", stopped.number) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
