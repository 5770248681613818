"""Progress of a run, and the end of a run by Ctrl-C or SIGTERM."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from holdfast.core.errors import Interrupted


@dataclass(frozen=True)
class EpochMeasures:
    """Measurements of a training after an epoch."""

    epoch: int
    of: int
    """planned number of epochs"""
    loss: float
    robust: float
    """robust accuracy on the held-out examples"""
    clean: float
    held_out: int
    """number of held-out examples"""
    left_s: float
    """expected seconds until the end of the training"""


@dataclass(frozen=True)
class Step:
    """State of the progress of a run: the current stage, the number of finished examples, and the number
    that survive.
    """

    stage: str
    """name of the current stage, such as `1-apgd-ce`"""
    place: int
    """index of the stage, from 1"""
    of_stages: int
    done: int
    """number of finished examples of the stage"""
    of: int
    surviving: int
    """number of examples that no finished shard has broken; in the clean stage, number of examples that are known to be
    correct"""
    seen: int
    """number of examples of which `surviving` survive"""
    measured: EpochMeasures | None = None
    """measurements after an epoch, for the step of a training"""
    title: str = ""
    """name of the stage in reports, such as `APGD-CE`; empty if it is the same as `stage`"""
    n: int | None = None
    """number of examples of a run that measures robust accuracy; when all are `seen`, it is at most `surviving` / `n`.
    None for other runs"""
    in_looks: bool = False
    """whether the run measures a growing part of the examples, until a condition is decided"""


Progress = Callable[[Step], None]


def silent(step: Step) -> None:
    """Ignore the progress of a run. This is the default of functions that accept a progress callback."""


Notify = Callable[[str], None]
"""Function that shows the user a message on what the run does next."""


def ignore(message: str) -> None:
    """Ignore a message for the user. This is the default of functions that accept a callback for messages."""


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
