"""Clusters of near-duplicate queries, and the protocol of a state that stores them, in one process or shared by many.

A state stores no query. For each cluster it stores the sketch of its first query and a mass, which is the weighted
number of further queries near it. Masses halve in each half-life, so that old queries are forgotten.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from holdfast.core.errors import TargetError, UsageError
from holdfast.guard.detectors.fingerprints import Floats, Hashes

Fail = Literal["open", "closed"]
"""what happens while the state cannot be reached: `open` allows all queries, `closed` refuses them"""

BUCKET = 32
"""largest number of clusters for one hash; the oldest are dropped, so that the cost of a query is bounded"""


class StateLost(TargetError):
    """Error for a state of the query detector that cannot be reached or written."""


@dataclass(frozen=True)
class QueryCluster:
    """Queries near each other. `key` identifies the cluster in its state."""

    key: int
    leader: Floats
    """sketch (64) of the first query"""
    mass: float
    """weighted number of the other queries, at the time `seen`"""
    members: int
    """number of queries, exact repeats not counted"""
    seen: float
    """time of the last query, in seconds of the state's clock"""


@dataclass(frozen=True)
class Account:
    """What is stored about one principal (client). Both numbers halve in each half-life."""

    queries: float = 0.0
    """number of queries, exact repeats not counted"""
    mass: float = 0.0
    """weighted number of these that were near earlier queries of any principal"""
    seen: float = 0.0
    """time of the last query, in seconds of the state's clock"""


@dataclass(frozen=True)
class Wanted:
    """What a batch of n queries needs from the state."""

    hashes: Hashes
    """(n, tables)"""
    digests: Sequence[int]
    """(n)"""
    principals: Sequence[str]
    """(n) names of the clients; an empty name has no account"""


@dataclass
class StateView:
    """The part of a state that a batch of queries needs. The detector changes it; the state stores the changes."""

    now: float
    """time of the state's clock in seconds, which never goes backwards"""
    half_life_s: float
    clusters: dict[int, QueryCluster]
    buckets: dict[int, list[int]]
    """keys of the clusters that have a hash"""
    answered: set[int]
    """digests of the batch that were answered before"""
    accounts: dict[str, Account]
    added: dict[int, list[int]] = field(default_factory=dict)
    """hashes of each new cluster"""
    touched: dict[int, tuple[float, int]] = field(default_factory=dict)
    """mass and number of queries that each cluster gained"""
    charged: dict[str, tuple[float, float]] = field(default_factory=dict)
    """number of queries and mass that each account gained"""
    answers: list[int] = field(default_factory=list)
    """digests that are answered now for the first time"""
    dropped: list[tuple[int, int]] = field(default_factory=list)
    """hashes and keys of clusters that are no longer stored under them"""

    def decay(self, since: float) -> float:
        """Return the factor by which a mass has shrunk since a time."""
        return float(0.5 ** (max(0.0, self.now - since) / self.half_life_s))

    def near(self, hashes: Sequence[int]) -> list[QueryCluster]:
        """Return the clusters that have one of these hashes, with their masses at the times of their last queries."""
        if self.buckets.keys().isdisjoint(hashes):  # as those of most queries
            return []
        keys = dict.fromkeys(key for each in hashes for key in self.buckets.get(each, ()))
        return [self.clusters[key] for key in keys if key in self.clusters]

    def present(self, cluster: QueryCluster) -> QueryCluster:
        """Return a cluster with its mass at the present time."""
        return replace(cluster, mass=cluster.mass * self.decay(cluster.seen), seen=self.now)

    def add(self, cluster: QueryCluster, hashes: Sequence[int]) -> None:
        """Store a new cluster under its hashes. Where there are too many, the least recently used one is dropped."""
        self.clusters[cluster.key] = cluster
        self.added[cluster.key] = list(dict.fromkeys(hashes))
        for each in self.added[cluster.key]:
            bucket = self.buckets.setdefault(each, [])
            if len(bucket) >= BUCKET:
                # a key without a cluster is that of one that was dropped meanwhile
                oldest = min(
                    bucket, key=lambda key: self.clusters[key].seen if key in self.clusters else -math.inf
                )
                bucket.remove(oldest)
                self.dropped.append((each, oldest))
            bucket.append(cluster.key)

    def touch(self, cluster: QueryCluster, mass: float) -> QueryCluster:
        """Count one more query of a cluster, with a weight `mass`, and return the cluster."""
        grown = replace(cluster, mass=cluster.mass + mass, members=cluster.members + 1)
        self.clusters[cluster.key] = grown
        before = self.touched.get(cluster.key, (0.0, 0))
        self.touched[cluster.key] = before[0] + mass, before[1] + 1
        return grown

    def charge(self, principal: str, mass: float) -> Account:
        """Count one more query of a principal, with a weight `mass`, and return its account."""
        before = self.accounts.get(principal, Account(seen=self.now))
        factor = self.decay(before.seen)
        account = Account(before.queries * factor + 1, before.mass * factor + mass, self.now)
        self.accounts[principal] = account
        queries, total = self.charged.get(principal, (0.0, 0.0))
        self.charged[principal] = queries + 1, total + mass
        return account

    def answer(self, digest: int) -> None:
        """Record that a query is answered, so that its exact repeats are not counted."""
        self.answered.add(digest)
        self.answers.append(digest)


@dataclass(frozen=True)
class StateLimits:
    """How much a state stores, and for how long."""

    half_life_s: float = 86_400.0
    """seconds in which masses halve; entries are dropped ten half-lives after their last query"""
    clusters: int = 200_000
    """largest number of clusters; the least recently used are dropped"""
    digests: int = 400_000
    """largest number of digests of answered queries; the oldest are dropped"""
    accounts: int = 100_000
    """largest number of principals; the least recently used are dropped"""
    heaviest: float = 80.0
    """largest mass of a cluster, which bounds the time until an attacked image is accepted again"""

    def __post_init__(self) -> None:
        if min(self.half_life_s, self.clusters, self.digests, self.accounts, self.heaviest) <= 0:
            raise UsageError(
                f"{self} has a limit that is not positive; expected positive limits of the state"
            )

    @property
    def lifetime_s(self) -> float:
        """Seconds after which an unused entry is dropped, when its mass is a thousandth."""
        return 10 * self.half_life_s


@dataclass(frozen=True)
class Health:
    """Whether the state can be reached, for metrics and the audit."""

    reachable: bool = True
    losses: int = 0
    """number of times that the state was lost"""
    emptied: int = 0
    """number of times that the state was reachable but its content had been removed"""
    error: str = ""
    """the last error"""


class QueryState(Protocol):
    """Protocol of a state of the query detector, which one process or many processes use."""

    @property
    def fail(self) -> Fail:
        """What happens while the state cannot be reached."""

    @property
    def health(self) -> Health:
        """Whether the state can be reached, and how often it was lost."""

    def exchange(self, wanted: Wanted, now: float, decide: Callable[[StateView], None]) -> bool:
        """In one transaction, read what a batch of queries needs, call `decide` with it, and store its changes.

        `now` is the time of the caller's clock in seconds. Returns False, after reporting, if the state cannot be
        reached; nothing is stored then, and `decide` may have been called.
        """

    def close(self) -> None:
        """Release files and connections."""


_LONGEST_STEP_S = 3600.0  # longer pauses without a query are rare, and a clock that is set jumps by more


@dataclass
class SteadyClock:
    """A clock of one process that follows the clock of its caller but neither goes backwards nor jumps.

    A step backwards counts as no time, and a step forwards as at most an hour. Several processes with a common state
    take the maximum of their clocks.
    """

    _last: float | None = None
    _steady: float = 0.0

    def at(self, now: float, stored: tuple[float, float] | None) -> float:
        """Return the time of the state for the time `now` of the caller. `stored` are the callers' time and the state's
        time that were stored last, or None in a new state.
        """
        wall, steady = stored or (now, 0.0)
        last = wall if self._last is None else self._last
        base = steady if self._last is None else self._steady
        passed = min(max(now - last, 0.0), _LONGEST_STEP_S)
        self._last, self._steady = now, max(steady, base + passed)
        return self._steady
