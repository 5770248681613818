"""The pool of parameter sets behind a server. Only the supervisor opens it, with its key, and decides swaps.

A swap has three steps. The supervisor tests the next set on the canary inputs, in a thread of low priority and not in
the workers, whose requests the test would delay. All workers then load it beside the serving set. At last the ledger
records that it serves, and the workers replace their reference. A set that fails is refused, and never serves.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property

from torch import Tensor

from holdfast.core.errors import HoldfastError, Inconclusive, TargetError
from holdfast.core.model import Classifier
from holdfast.rotation.pool.pool import Pool
from holdfast.rotation.rotating_model import loaded, refuse_strange
from holdfast.rotation.steps.short_steps import next_set
from holdfast.rotation.triggers import Counters, Trigger, due_triggers, exposed
from holdfast.server.generation import Generation, PoolSet

CANARIES = "canaries"
"""name under which a pool keeps its canary inputs"""
_HOUR_S = 3600.0
_WRITE_S = 30.0
"""seconds between two entries of the ledger with numbers of answers, which are also written at swaps and at the end"""
_WITHOUT_NAME = ""


@dataclass(eq=False)
class LivePool:
    """A pool that serves: which set is to serve, and the numbers of its answers.

    `alarm` is the reason why a swap that is due cannot be made: `empty` if no admitted set waits, `limit` if there were
    `swaps_per_hour` swaps in the last hour, and `error` if a set or the ledger cannot be used; empty if there is none.
    A stolen set is replaced in spite of the limit.
    """

    pool: Pool
    opening: Callable[[], Classifier]
    """function that opens the architecture of the pool with any parameters"""
    triggers: Sequence[Trigger] = ()
    swaps_per_hour: int = 60
    clock: Callable[[], float] = time.monotonic
    alarm: str = ""
    reason: str = ""
    """text of the alarm for the operator"""
    _swaps: deque[float] = field(default_factory=deque)
    _owed: dict[int, Counter[str]] = field(default_factory=dict)
    _written_s: float = -_WRITE_S
    _requested: str = ""
    _term: tuple[int, float, float] = (0, 0.0, 0.0)
    """epoch of the serving set, and the seconds for which it had served at a time of `clock`"""

    @cached_property
    def canaries(self) -> Tensor:
        """The inputs on which each set is tested. Raises `TargetError` if the pool has none."""
        kept = self.pool.kept(CANARIES)
        if kept is None:
            raise TargetError(
                f"{str(self.pool.path)!r} contains no canary inputs, on which sets are tested before they serve; admit "
                f"a set with holdfast rotate admit {self.pool.shown}"
            )
        return kept.columns["x"]

    @cached_property
    def _architecture(self) -> Classifier:
        return self.opening().eval().requires_grad_(False)

    def test(self, following: Generation) -> None:
        """Test a set on the canary inputs. Raises `TargetError` if its predictions are not those of its admission."""
        pooled = _pooled(following)
        model = loaded(self._architecture, pooled.weights, following.name)
        refuse_strange(model, self.canaries, pooled.canary, following.name)

    def first(self) -> Generation:
        """Return the serving set. If none serves, an admitted set begins to serve.

        Raises `Inconclusive` if no set serves and none waits, and `TargetError` if the set fails its test.
        """
        serving = self.pool.serving or self.pool.swap(why="the first", choose=next_set)
        first = self._set(serving.name, serving.epoch, recorded=True)
        self.test(first)
        return first

    def request_swap(self, why: str) -> None:
        """Swap at the next opportunity, for a reason such as the wish of the operator."""
        self._requested = why

    def answered(self, epoch: int, answers: Mapping[str, int]) -> None:
        """Count answers of the set of an epoch, by principal."""
        self._owed.setdefault(epoch, Counter()).update(answers)

    def write(self, *, now: bool = False) -> None:
        """Write the numbers of answers to the ledger if it is time, or immediately with `now`.

        If that fails, such as for a full disk, they are kept, and an alarm is raised.
        """
        if not self._owed or (not now and self.clock() - self._written_s < _WRITE_S):
            return
        self._written_s = self.clock()
        try:
            for epoch in sorted(self._owed):
                counts = dict(self._owed[epoch])
                others = counts.pop(_WITHOUT_NAME, 0)
                self.pool.answered(epoch, counts, others)
                del self._owed[epoch]
        except (HoldfastError, OSError) as error:
            self._raise("error", str(error))

    def due(self, serving: Generation) -> Generation | None:
        """Return the set that is to serve next, or None if no swap is due or possible.

        Raises no error: the current set continues to serve, and `alarm` states why.
        """
        try:
            current = self.pool.serving
            if current is not None and current.epoch != serving.epoch:
                why = self.pool.ledger.member(current.name).why
                return self._set(current.name, current.epoch, why=why, recorded=True)
            reasons, stolen = self._reasons()
            if not reasons:
                self._raise("", "")
                return None
            return self._chosen(serving, "; ".join(reasons), stolen=stolen)
        except (HoldfastError, OSError) as error:
            self._raise("empty" if isinstance(error, Inconclusive) else "error", str(error))
            return None

    def _reasons(self) -> tuple[tuple[str, ...], bool]:
        term = self.pool.ledger.terms[-1]
        exposure = self.pool.ledger.member(term.name).exposed
        served_s = self._served_s(term.epoch, datetime.fromisoformat(term.since))
        owed = self._owed.get(term.epoch, Counter())
        by_principal = [
            n + term.answers.get(self.pool.pseudonym(principal), 0)
            for principal, n in owed.items()
            if principal != _WITHOUT_NAME
        ]
        # callers without a name count as one, so that a swap may come too early, but never too late
        most = max([*term.answers.values(), *by_principal, term.others + owed[_WITHOUT_NAME]])
        counters = Counters(most, served_s, exposure=None if exposure is None else exposure.why)
        reasons = due_triggers((*self.triggers, exposed), counters)
        return ((self._requested, *reasons) if self._requested else reasons), exposure is not None

    def _served_s(self, epoch: int, since: datetime) -> float:
        """Seconds for which the current set has served, also if the date of the machine is set back."""
        by_date, now = max((datetime.now(UTC) - since).total_seconds(), 0.0), self.clock()
        if self._term[0] != epoch:
            self._term = (epoch, by_date, now)
        return max(by_date, self._term[1] + now - self._term[2])

    def _chosen(self, serving: Generation, why: str, *, stolen: bool) -> Generation | None:
        now = self.clock()
        while self._swaps and now - self._swaps[0] >= _HOUR_S:
            self._swaps.popleft()
        if len(self._swaps) >= self.swaps_per_hour and not stolen:
            self._raise("limit", f"{len(self._swaps)} swaps in the last hour; a further one is due: {why}")
            return None
        unjudged = self.pool.unjudged
        waiting = [name for name in self.pool.ahead if name not in unjudged]
        if not waiting and not (stolen and unjudged):
            raise Inconclusive(
                f"no admitted set waits, so {serving.name!r} still serves; draw and admit further sets; a swap is "
                f"due: {why}"
            )
        name = next_set(waiting or list(unjudged))
        return self._set(name, serving.epoch + 1, why=why, unjudged=not waiting)

    def _set(
        self, name: str, epoch: int, *, why: str = "", recorded: bool = False, unjudged: bool = False
    ) -> Generation:
        canary = self.pool.ledger.member(name).canary
        pooled = PoolSet(self.pool.weights(name), canary, recorded, unjudged)
        return Generation(name, epoch, why=why, pooled=pooled)

    def commit(self, following: Generation, serving: Generation) -> bool:
        """Record in the ledger that a set serves from now on. Return whether it does; another process may have swapped
        in the meantime.
        """
        pooled = _pooled(following)
        if pooled.recorded:
            return True
        try:
            swapped = self.pool.swap(
                epoch=serving.epoch,
                why=following.why,
                choose=lambda names: following.name,
                unjudged=pooled.unjudged,
            )
        except (HoldfastError, OSError) as error:
            self._raise("error", str(error))
            return False
        if (swapped.name, swapped.epoch) != (following.name, following.epoch):
            return False
        self._swaps.append(self.clock())
        self._requested = ""
        self._raise("", "")
        return True

    def refuse(self, following: Generation, why: str) -> None:
        """Refuse a set that failed its test or that a worker could not load, so that another one is chosen."""
        self._raise("error", why)
        if not _pooled(following).recorded:
            try:
                self.pool.refuse(following.name, why)
            except (HoldfastError, OSError) as error:
                self._raise("error", str(error))

    def _raise(self, alarm: str, reason: str) -> None:
        self.alarm, self.reason = alarm, reason


def _pooled(generation: Generation) -> PoolSet:
    assert generation.pooled is not None, "a parameter set of a pool"
    return generation.pooled
