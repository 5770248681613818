"""The step `swap` of a rotation: it makes another admitted set the serving set, and retires the previous one in the
same ledger entry.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from holdfast.core.errors import Inconclusive
from holdfast.rotation.pool.pool import Pool

UNJUDGED = "it was not judged against all sets that are now listed as stolen"
"""Note on a serving set that was not judged against all stolen sets."""


@dataclass(frozen=True)
class Swapped:
    """The parameter set that serves after a swap."""

    name: str
    epoch: int
    """number of the period of service, from 1"""
    since: str
    """time at which the set began to serve, in UTC"""
    unjudged: bool
    """whether the set was not judged against all stolen sets"""
    waiting: int
    """number of admitted sets that wait to serve"""


def swap(pool: Pool, why: str = "", *, unjudged: bool = False, epoch: int | None = None) -> Swapped:
    """Make a randomly chosen admitted set of the pool the serving set. The ledger records the reason `why`.

    If `epoch` is given, it must be the current period of service, so that two processes with the same reason swap only
    once. Raises `Inconclusive`, and changes nothing, if no set waits that was judged against all stolen sets, unless
    `unjudged` allows other sets.
    """
    others = pool.unjudged
    serving = pool.swap(epoch=epoch, why=why, choose=next_set, unjudged=unjudged)
    return Swapped(serving.name, serving.epoch, serving.since, serving.name in others, len(pool.ahead))


def next_set(waiting: Sequence[str]) -> str:
    """Return the name of the set that serves next, chosen at random from the waiting admitted sets so that an attacker
    cannot predict it.

    Raises `Inconclusive` if `waiting` is empty.
    """
    if not waiting:
        raise Inconclusive(
            "no admitted set is waiting, so the serving set is not changed; draw and admit more sets"
        )
    # not from the run's draws, which an attacker with the seed could repeat
    return secrets.choice(waiting)
