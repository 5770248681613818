"""The purpose of a query. The rows that are sent to a served model are counted by purpose."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Literal

LOOK = "look"
"""name, in place of a stage, for the examination of the model before the first stage, and for queries that open the
data"""
Kind = Literal["clean", "attacks", "doubts", "judging"]


@dataclass(frozen=True)
class Purpose:
    """The stage and shard of a run that make a query, and the kind of its purpose."""

    stage: str = LOOK
    """name of a stage, or `LOOK`"""
    shard: int = 0
    kind: Kind = "clean"


_FIRST = Purpose()
_PURPOSE: ContextVar[Purpose] = ContextVar("purpose", default=_FIRST)


def current() -> Purpose:
    """Return the current purpose of queries; that of the first examination if none was set."""
    return _PURPOSE.get()


@contextmanager
def purpose(stage: str, shard: int, kind: Kind) -> Iterator[None]:
    """Context manager that sets the purpose of all queries inside it."""
    token = _PURPOSE.set(Purpose(stage, shard, kind))
    try:
        yield
    finally:
        _PURPOSE.reset(token)


@contextmanager
def judging() -> Iterator[None]:
    """Context manager inside which queries with the purpose "attacks" have the purpose "judging" instead."""
    now = current()
    token = _PURPOSE.set(replace(now, kind="judging") if now.kind == "attacks" else now)
    try:
        yield
    finally:
        _PURPOSE.reset(token)
