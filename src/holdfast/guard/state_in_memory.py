"""What all states share, such as rates and query budgets of principals; and the state in the memory of one process."""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import Protocol

import numpy as np

from holdfast.core.errors import UsageError
from holdfast.guard.detectors.fingerprints import Floats
from holdfast.guard.detectors.queries import (
    Account,
    Fail,
    Health,
    QueryCluster,
    QueryState,
    StateLimits,
    StateView,
    SteadyClock,
    Wanted,
)


def sketch_bytes(sketch: Floats) -> bytes:
    """Return a sketch as bytes, in half precision, whose error is far below the radius."""
    return sketch.astype("<f2").tobytes()


def sketches_from(contents: Sequence[bytes]) -> Floats:
    """Return the sketches (n, 64) that `sketch_bytes` converted to bytes. They are converted together, which is faster
    than one by one.
    """
    width = len(contents[0]) // 2 if contents else 0
    return np.frombuffer(b"".join(contents), "<f2").astype(np.float32).reshape(len(contents), width)


_log = logging.getLogger("holdfast.server")


class Reachability:
    """Record of whether a shared state can be reached. A loss and a return are reported once each, as log records.

    After a loss, an attempt is made at most once in each `retry_s` seconds, so that requests do not wait for a server
    that is away.
    """

    def __init__(
        self, name: str, fail: Fail, retry_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.health = Health()
        self._name, self._fail, self._retry_s, self._clock = name, fail, retry_s, clock
        self._again, self._lost_s = -float("inf"), 0.0

    @property
    def waiting(self) -> bool:
        """Whether the state is lost and the time of the next attempt has not come."""
        return not self.health.reachable and self._clock() < self._again

    def lost(self, error: Exception) -> None:
        """Record that the state could not be reached."""
        now = self._clock()
        self._again = now + self._retry_s
        if self.health.reachable:
            self._lost_s = now
            what = (
                "requests are answered without it"
                if self._fail == "open"
                else "requests that need it are refused"
            )
            _log.error("The %s is lost; %s until it returns: %s", self._name, what, error)
            self.health = replace(self.health, reachable=False, losses=self.health.losses + 1)
        self.health = replace(self.health, error=f"{type(error).__name__}: {error}")

    def reached(self) -> None:
        """Record that the state was reached."""
        if not self.health.reachable:
            _log.info("The %s has returned after %.1f s", self._name, self._clock() - self._lost_s)
            self.health = replace(self.health, reachable=True)

    def emptied(self) -> None:
        """Record that the content of the state was removed or replaced, so that earlier queries are forgotten."""
        _log.error(
            "The %s was emptied or replaced; earlier queries and used budgets are forgotten", self._name
        )
        self.health = replace(self.health, emptied=self.health.emptied + 1)


@dataclass(frozen=True)
class Allowance:
    """How many inputs a principal may send. Both limits apply."""

    rate_per_s: float | None = None
    """inputs for each second on average; None for no limit"""
    burst: float = 1.0
    """largest number of inputs at once, after a pause; also the largest size of one request"""
    budget: int | None = None
    """inputs in each period; None for no limit"""
    period_s: float = 86_400.0
    """seconds after whose beginning with the first input the budget is full again"""

    def __post_init__(self) -> None:
        if self.rate_per_s is not None and not (self.rate_per_s > 0 and self.burst >= 1):
            raise UsageError(
                f"the rate is {self.rate_per_s} inputs a second with a burst of {self.burst}; expected a positive "
                "rate and a burst of at least 1"
            )
        if self.budget is not None and not (self.budget >= 0 and self.period_s > 0):
            raise UsageError(
                f"the budget is {self.budget} inputs in {self.period_s} s; expected 0 or more in a positive period"
            )


@dataclass(frozen=True)
class Charge:
    """A request of a principal for `n` inputs."""

    principal: str
    n: int
    allowance: Allowance


@dataclass(frozen=True)
class TokenBucket:
    """What is stored about the rate and the budget of a principal."""

    tokens: float
    """inputs that may be sent at once"""
    seen: float
    """time at which the tokens were counted, in seconds of the state's clock"""
    used: int
    """inputs sent in the present period"""
    began: float
    """time at which the period began"""


@dataclass(frozen=True)
class Grant:
    """Answer to a charge."""

    granted: bool
    reason: str = ""
    """`rate`, `budget`, `size` for more inputs than ever allowed at once, or `lost` if the state cannot be reached"""
    retry_after_s: float = 0.0
    """seconds after which the same request would be granted; 0 if it is granted, or never"""
    lost: bool = False
    """whether the state could not be reached, so that the answer follows from `fail` of the state alone"""


def spent(charge: Charge, balance: TokenBucket | None, now: float) -> tuple[Grant, TokenBucket]:
    """Return the answer to a charge and the new balance. A charge that is not granted costs nothing."""
    limits, n = charge.allowance, charge.n
    old = balance or TokenBucket(limits.burst, now, 0, now)
    tokens = min(limits.burst, old.tokens + max(0.0, now - old.seen) * (limits.rate_per_s or 0.0))
    fresh = now >= old.began + limits.period_s
    used, began = (0, now) if fresh else (old.used, old.began)
    kept = TokenBucket(tokens, now, used, began)
    if (limits.rate_per_s is not None and n > limits.burst) or (
        limits.budget is not None and n > limits.budget
    ):
        return Grant(granted=False, reason="size"), kept
    if limits.budget is not None and used + n > limits.budget:
        return Grant(granted=False, reason="budget", retry_after_s=began + limits.period_s - now), kept
    if limits.rate_per_s is None:
        return Grant(granted=True), TokenBucket(tokens, now, used + n, began)
    # a rounding error of the refill must not refuse a request that was sent after the stated wait
    if n > tokens + 1e-9:
        return Grant(granted=False, reason="rate", retry_after_s=(n - tokens) / limits.rate_per_s), kept
    return Grant(granted=True), TokenBucket(tokens - n, now, used + n, began)


class SharedState(QueryState, Protocol):
    """Protocol of a state with the clusters of the query detector and the balances of principals."""

    def spend(self, charges: Sequence[Charge], now: float) -> list[Grant]:
        """In one transaction, answer charges in their order and store the balances. `now` is the time of the caller's
        clock in seconds.

        While the state cannot be reached, all charges are granted or refused, as `fail` states.
        """


class MemoryState:
    """State in the memory of one process, for one worker or several threads."""

    fail: Fail = "closed"
    health = Health()

    def __init__(self, limits: StateLimits | None = None) -> None:
        self.limits = limits or StateLimits()
        self._lock, self._clock, self._time = Lock(), SteadyClock(), (0.0, 0.0)
        self._fresh = True
        # least recently used first
        self._clusters: OrderedDict[int, QueryCluster] = OrderedDict()
        self._accounts: OrderedDict[str, Account] = OrderedDict()
        self._answers: OrderedDict[int, float] = OrderedDict()
        self._balances: OrderedDict[str, TokenBucket] = OrderedDict()
        self._hashes: dict[int, list[int]] = {}
        self._buckets: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return len(self._clusters)

    def exchange(self, wanted: Wanted, now: float, decide: Callable[[StateView], None]) -> bool:
        """Read, decide and store, like `QueryState.exchange`. It never fails."""
        with self._lock:
            view = self._view(wanted, self._now(now))
            decide(view)
            self._store(view)
            self._evict(view.now)
        return True

    def spend(self, charges: Sequence[Charge], now: float) -> list[Grant]:
        """Answer charges in their order: return for each whether its inputs are granted, and otherwise the reason and
        the time to wait. Granted inputs are subtracted from the balance of the principal.

        `now` is the time of the caller's clock in seconds. If there are more balances than `limits.accounts`, those
        that were not used for longest are deleted. It never fails, because no other process is involved.
        """
        grants = []
        with self._lock:
            time = self._now(now)
            for charge in charges:
                grant, balance = spent(charge, self._balances.get(charge.principal), time)
                self._balances[charge.principal] = balance
                self._balances.move_to_end(charge.principal)
                grants.append(grant)
            while len(self._balances) > self.limits.accounts:
                self._balances.popitem(last=False)
        return grants

    def close(self) -> None:
        """Do nothing; the memory is released with the object."""

    def _now(self, now: float) -> float:
        steady = self._clock.at(now, None if self._fresh else self._time)
        self._fresh, self._time = False, (now, steady)
        return steady

    def _view(self, wanted: Wanted, now: float) -> StateView:
        hashes = set(wanted.hashes.ravel().tolist())
        buckets = {each: list(self._buckets[each]) for each in hashes if each in self._buckets}
        keys = {key for bucket in buckets.values() for key in bucket}
        return StateView(
            now,
            self.limits.half_life_s,
            {key: self._clusters[key] for key in keys},
            buckets,
            {digest for digest in wanted.digests if digest in self._answers},
            {name: self._accounts[name] for name in wanted.principals if name in self._accounts},
        )

    def _store(self, view: StateView) -> None:
        for key, hashes in view.added.items():
            self._hashes[key] = hashes
            for each in hashes:
                self._buckets.setdefault(each, []).append(key)
        for each, key in view.dropped:
            if key in self._buckets.get(each, ()):
                self._buckets[each].remove(key)
        for key in {*view.added, *view.touched}:
            cluster = view.clusters[key]
            self._clusters[key] = replace(cluster, mass=min(cluster.mass, self.limits.heaviest))
            self._clusters.move_to_end(key)
        for name in view.charged:
            self._accounts[name] = view.accounts[name]
            self._accounts.move_to_end(name)
        self._answers.update((digest, view.now) for digest in view.answers)

    def _evict(self, now: float) -> None:
        """Drop what is too old or too much, least recently used first."""
        oldest = now - self.limits.lifetime_s
        while self._clusters:
            key, cluster = next(iter(self._clusters.items()))
            if len(self._clusters) <= self.limits.clusters and cluster.seen >= oldest:
                break
            del self._clusters[key]
            for each in self._hashes.pop(key):
                bucket = self._buckets.get(each, [])
                if key in bucket:
                    bucket.remove(key)
                if not bucket:
                    self._buckets.pop(each, None)
        while self._answers and (
            len(self._answers) > self.limits.digests or next(iter(self._answers.values())) < oldest
        ):
            self._answers.popitem(last=False)
        while self._accounts and (
            len(self._accounts) > self.limits.accounts or next(iter(self._accounts.values())).seen < oldest
        ):
            self._accounts.popitem(last=False)
