"""The step `swap` of a rotation: it makes another admitted set the serving set, and retires the previous one in the
same ledger entry.
"""

from dataclasses import dataclass

from holdfast.rotation import next_set
from holdfast.store.pool import Pool

UNJUDGED = "it was not judged against all sets that are now listed as stolen"
"""Note on a serving set that was not judged against all stolen sets."""


@dataclass(frozen=True)
class SwapRequest:
    """The pool whose serving set is to be swapped, and the conditions of the swap."""

    pool: Pool
    why: str = ""
    """reason of the swap, which is recorded in the ledger"""
    unjudged: bool = False
    """whether a set that was not judged against all stolen sets may serve if no other waits"""
    epoch: int | None = None
    """period of service that must be current, so that two processes with the same reason swap only
    once; None for any"""


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


def swap(request: SwapRequest) -> Swapped:
    """Make a randomly chosen admitted set of the pool the serving set.

    Raises `Inconclusive`, and changes nothing, if no set waits that was judged against all stolen sets, unless
    `request` allows other sets.
    """
    pool = request.pool
    unjudged = pool.unjudged
    serving = pool.swap(epoch=request.epoch, why=request.why, choose=next_set, unjudged=request.unjudged)
    return Swapped(serving.name, serving.epoch, serving.since, serving.name in unjudged, len(pool.ahead))
