"""What a query of the model is made for, so that the rows of a served model are counted by it."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Literal

LOOK = "look"
"""the look at the model before the first stage, and what is sent to open the data"""
Kind = Literal["clean", "attacks", "doubts", "judging"]


@dataclass(frozen=True)
class Purpose:
    """Which step of a run makes a query."""

    stage: str = LOOK
    """the name of a stage, or `LOOK`"""
    shard: int = 0
    kind: Kind = "clean"


_FIRST = Purpose()
_PURPOSE: ContextVar[Purpose] = ContextVar("purpose", default=_FIRST)


def current() -> Purpose:
    """The purpose of a query that is made now; that of the first look, unless one was set."""
    return _PURPOSE.get()


@contextmanager
def purpose(stage: str, shard: int, kind: Kind) -> Iterator[None]:
    """Within it, queries are made for a step of a run."""
    token = _PURPOSE.set(Purpose(stage, shard, kind))
    try:
        yield
    finally:
        _PURPOSE.reset(token)


@contextmanager
def judging() -> Iterator[None]:
    """Within it, queries that would be made for attacks judge what attacks have returned."""
    now = current()
    token = _PURPOSE.set(replace(now, kind="judging") if now.kind == "attacks" else now)
    try:
        yield
    finally:
        _PURPOSE.reset(token)
