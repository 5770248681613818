"""Signals of the supervisor of a server: SIGTERM and SIGINT end it, and SIGHUP swaps or reloads the model."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def handled_signals(
    stop: Callable[[], object], swap: Callable[[], object], *, ending: bool = True
) -> Iterator[None]:
    """Context manager in which SIGTERM and SIGINT call `stop`, unless `ending` is false, and SIGHUP calls `swap`.

    SIGHUP also reports that the terminal of this process was closed; it then calls `stop`, unless it was ignored, as
    `nohup` has it. In another thread than the main one, signals are not handled.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    terminal, before = has_terminal(), dict[int, Any]()

    def ended(number: int, frame: FrameType | None) -> None:
        stop()

    def hung_up(number: int, frame: FrameType | None) -> None:
        nonlocal terminal
        if not terminal or has_terminal():
            swap()
            return
        terminal = False
        if before[number] is not signal.SIG_IGN:
            stop()

    handlers: dict[int, Any] = {
        signal.SIGHUP: hung_up,
        **({signal.SIGTERM: ended, signal.SIGINT: ended} if ending else {}),
    }
    before.update({number: signal.getsignal(number) for number in handlers})
    for number, handler in handlers.items():
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)


def has_terminal() -> bool:
    """Return whether this process has a terminal."""
    try:
        os.close(os.open(os.ctermid(), os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True
