"""The purpose of a query, by which the rows sent to a served model are counted."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Literal

LOOK = "look"
"""stage of the examination of the model before the first stage, and of queries that open the data"""
Kind = Literal["clean", "attacks", "doubts", "judging"]


@dataclass(frozen=True)
class Purpose:
    """The step of a run that makes a query."""

    stage: str = LOOK
    """name of a stage, or `LOOK`"""
    shard: int = 0
    kind: Kind = "clean"


_FIRST = Purpose()
_PURPOSE: ContextVar[Purpose] = ContextVar("purpose", default=_FIRST)


def current() -> Purpose:
    """The purpose of a query that is made now; that of the first examination if none was set."""
    return _PURPOSE.get()


@contextmanager
def purpose(stage: str, shard: int, kind: Kind) -> Iterator[None]:
    """Context in which queries have this purpose."""
    token = _PURPOSE.set(Purpose(stage, shard, kind))
    try:
        yield
    finally:
        _PURPOSE.reset(token)


@contextmanager
def judging() -> Iterator[None]:
    """Context in which queries with the purpose "attacks" have the purpose "judging" instead."""
    now = current()
    token = _PURPOSE.set(replace(now, kind="judging") if now.kind == "attacks" else now)
    try:
        yield
    finally:
        _PURPOSE.reset(token)
