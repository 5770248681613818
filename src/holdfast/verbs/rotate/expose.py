"""The step `expose`: the ledger lists a set as stolen."""

from dataclasses import dataclass

from holdfast.core.errors import UsageError
from holdfast.store.pool import Pool


@dataclass(frozen=True)
class ExposeRequest:
    """Which set of which pool an attacker may have, and why."""

    pool: Pool
    name: str
    """name of the set"""
    why: str
    """what happened"""


@dataclass(frozen=True)
class Exposed:
    """The consequences of listing a set as stolen."""

    name: str
    why: str
    serving: bool
    """whether the set still serves"""
    unjudged: int
    """number of waiting sets that must be judged again"""


def expose(request: ExposeRequest) -> Exposed:
    """List a set as stolen: it stops serving at the next swap, and new sets are tested against it."""
    pool, name, why = request.pool, request.name, request.why
    if not why.strip():
        raise UsageError("the exposure has no reason; describe what happened with --why TEXT")
    pool.expose(name, why)
    now = pool.serving
    return Exposed(name, why, now is not None and now.name == name, len(pool.unjudged))
