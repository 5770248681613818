"""The step `swap`: another admitted set serves, and the serving set is retired, in one entry of the ledger."""

from dataclasses import dataclass

from holdfast.rotation import next_set
from holdfast.store.pool import Pool

UNJUDGED = "it was not judged against all sets that are now listed as stolen"
"""The note on a serving set that was not judged against all stolen sets."""


@dataclass(frozen=True)
class SwapRequest:
    """In which pool another set serves, and why."""

    pool: Pool
    why: str = ""
    """reason, recorded in the ledger"""
    unjudged: bool = False
    """whether a set that was not judged against all stolen sets may serve if no other waits"""
    epoch: int | None = None
    """the epoch that must be current, so that two processes with the same reason swap once; None for any"""


@dataclass(frozen=True)
class Swapped:
    """The set that serves after a swap."""

    name: str
    epoch: int
    """number of the period of service, from 1"""
    since: str
    """when it began to serve, in UTC"""
    unjudged: bool
    """whether it was not judged against all stolen sets"""
    waiting: int
    """number of admitted sets that wait to serve"""


def swap(request: SwapRequest) -> Swapped:
    """Let an admitted set serve that is chosen at random.

    Raises `Inconclusive` without a change if none waits that was judged against all stolen sets.
    """
    pool = request.pool
    unjudged = pool.unjudged
    now = pool.swap(epoch=request.epoch, why=request.why, choose=next_set, unjudged=request.unjudged)
    return Swapped(now.name, now.epoch, now.since, now.name in unjudged, len(pool.ahead))
