"""Signals of the supervisor of a server: SIGTERM and SIGINT end it, and SIGHUP swaps or reloads the model."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType


@contextmanager
def ending_signals(stop: Callable[[], object]) -> Iterator[None]:
    """Context manager in which SIGTERM and SIGINT call `stop`."""

    def ended(number: int, frame: FrameType | None) -> None:
        stop()

    with _handlers({signal.SIGTERM: ended, signal.SIGINT: ended}):
        yield


@contextmanager
def hang_up_signals(stop: Callable[[], object], swap: Callable[[], object]) -> Iterator[None]:
    """Context manager in which SIGHUP calls `swap`.

    SIGHUP also reports that the terminal of a process in its foreground was closed. It then calls `stop`, unless it was
    ignored, as `nohup` has it. A process in the background receives no such report.
    """
    foreground, ignored = in_foreground(), signal.getsignal(signal.SIGHUP) is signal.SIG_IGN

    def hung_up(number: int, frame: FrameType | None) -> None:
        nonlocal foreground
        if not foreground or has_terminal():
            swap()
            return
        foreground = False
        if not ignored:
            stop()

    with _handlers({signal.SIGHUP: hung_up}):
        yield


@contextmanager
def _handlers(handlers: Mapping[int, Callable[[int, FrameType | None], None]]) -> Iterator[None]:
    """Context manager with handlers of signals. In another thread than the main one, signals are not handled."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)


def has_terminal() -> bool:
    """Return whether this process has a terminal."""
    return _foreground_group() is not None


def in_foreground() -> bool:
    """Return whether this process is in the foreground of a terminal."""
    return _foreground_group() == os.getpgrp()


def _foreground_group() -> int | None:
    """Return the process group in the foreground of the terminal of this process; None without a terminal."""
    try:
        terminal = os.open(os.ctermid(), os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return None
    try:
        return os.tcgetpgrp(terminal)
    except OSError:
        return None
    finally:
        os.close(terminal)
