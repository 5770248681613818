"""State of the query detector and of rates in the memory of one process. It is lost when the process ends."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from threading import Lock

from holdfast.guard.detectors.queries import (
    Account,
    Fail,
    Health,
    QueryCluster,
    StateLimits,
    StateView,
    SteadyClock,
    Wanted,
)
from holdfast.guard.states.spending import Charge, Grant, TokenBucket, spent


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
        """Answer charges, like `SharedState.spend`. It never fails."""
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
