"""The step `expose` of a rotation: it lists a parameter set as stolen in the ledger."""

from dataclasses import dataclass

from holdfast.core.errors import UsageError
from holdfast.core.remedies import Placeholder, Remedy
from holdfast.rotation.pool.pool import Pool


@dataclass(frozen=True)
class Exposed:
    """State of the pool after a parameter set was listed as stolen."""

    name: str
    why: str
    serving: bool
    """whether the set serves now; it is then replaced at the next swap"""
    unjudged: int
    """number of admitted sets that wait to serve and must be judged again"""


def expose(pool: Pool, name: str, why: str) -> Exposed:
    """List a parameter set that an attacker is known or assumed to have as stolen, with a description of what happened.
    If it is the serving set, it is replaced at the next swap. New sets are tested against it.
    """
    if not why.strip():
        raise UsageError(
            "the exposure has no reason",
            Remedy("why", Placeholder("TEXT"), reason="which describes what happened"),
        )
    pool.expose(name, why)
    serving = pool.serving
    return Exposed(name, why, serving is not None and serving.name == name, len(pool.unjudged))
