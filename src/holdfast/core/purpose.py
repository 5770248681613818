"""Purposes of the queries to a served model, such as attacks or doubts. The inputs that are sent are counted by
purpose.
"""

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
    """Purpose of a query: the stage and shard of a run that make it, and whether it serves the clean pass, an attack, a
    doubt or the final evaluation.
    """

    stage: str = LOOK
    """name of a stage, or `LOOK`"""
    shard: int = 0
    kind: Kind = "clean"


_FIRST = Purpose()
_PURPOSE: ContextVar[Purpose] = ContextVar("purpose", default=_FIRST)


def current() -> Purpose:
    """Return the current purpose of queries. If none was set, it is the first examination of the model."""
    return _PURPOSE.get()


@contextmanager
def purpose(stage: str, shard: int, kind: Kind) -> Iterator[None]:
    """Context manager that sets the purpose of all queries inside it: a stage, a shard and a kind."""
    token = _PURPOSE.set(Purpose(stage, shard, kind))
    try:
        yield
    finally:
        _PURPOSE.reset(token)


@contextmanager
def judging() -> Iterator[None]:
    """Context manager for the final evaluation of attacked inputs, whose queries are then counted as "judging" and no
    longer as "attacks".
    """
    now = current()
    token = _PURPOSE.set(replace(now, kind="judging") if now.kind == "attacks" else now)
    try:
        yield
    finally:
        _PURPOSE.reset(token)
