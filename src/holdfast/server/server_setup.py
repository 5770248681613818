"""What a server and its workers need to start: the settings of the user, what the verb has opened, the pool behind the
server, and the inputs that the guard has stored.
"""

import io
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from holdfast.core.errors import HoldfastError, Inconclusive, TargetError
from holdfast.core.model import Classifier
from holdfast.guard.rules import RequestGuard
from holdfast.guard.stored_inputs import StoredInputs
from holdfast.monitoring.signals import Reference
from holdfast.rotation.pool import Pool
from holdfast.rotation.rotating_model import Counters, Trigger, due_triggers, exposed, loaded, refuse_strange
from holdfast.rotation.steps.serving_set import next_set
from holdfast.server.audit_chain import AuditKey
from holdfast.server.messages import Generation, LoadedModel, PoolSet, no_rules
from holdfast.server.protocol_v2 import Signature
from holdfast.server.requests import HostNames
from holdfast.settings.serve_settings import ProxySettings, RequestLimits, ServeOptions, is_public

MOST = 1000
"""largest number of inputs in one response"""


@dataclass(frozen=True)
class FlaggedInput:
    """An input on which a rule fired."""

    x: Tensor
    request: str
    row: int
    time_s: float
    scores: dict[str, float]


@dataclass(frozen=True)
class FlaggedInputs:
    """The stored inputs of a guard, and the range of their values."""

    stored: StoredInputs
    low: float = 0.0
    high: float = 1.0

    def newest(self, n: int) -> list[FlaggedInput]:
        """Return at most `n` stored inputs, the newest request first. Raises `TargetError` for a file that was
        changed.
        """
        return list(islice(self._all(), n))

    def npz(self, n: int) -> bytes:
        """Return at most `n` of them as an .npz file."""
        return _npz(self.newest(n))

    def by_principal(self) -> Counter[str]:
        """Return the number of stored requests of each client, by its pseudonym in the names of the files."""
        return self.stored.by_pseudonym()

    def _all(self) -> Iterator[FlaggedInput]:
        for each in self.stored.read(newest_first=True):
            for x, row, scores in zip(each.x, each.rows, each.scores, strict=True):
                yield FlaggedInput(x, each.request, row, each.time_s, scores)


def _npz(inputs: list[FlaggedInput]) -> bytes:
    """The inputs of the shape and type of the newest one as an .npz file, which needs no pickle to be read."""
    same = [i for i in inputs if (i.x.shape, i.x.dtype) == (inputs[0].x.shape, inputs[0].x.dtype)]
    x = torch.stack([i.x for i in same]) if same else torch.empty(0)
    file = io.BytesIO()
    np.savez(
        file,
        x=(x.float() if x.dtype is torch.bfloat16 else x).numpy(),
        request=np.array([i.request for i in same], dtype=np.str_),
        row=np.array([i.row for i in same], dtype=np.int64),
        time=np.array([i.time_s for i in same], dtype=np.float64),
    )
    return file.getvalue()


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


HUNG_S = 30.0
"""least number of seconds without progress after which a worker is replaced"""


class ServerSettings(RequestLimits, ProxySettings, ServeOptions):
    """The settings of `holdfast serve` that a running server reads. Those of its model are only used to open it."""


@dataclass(frozen=True)
class WorkerSetup:
    """What a worker needs to start. It is pickled, and its functions open the model and the guard in the worker."""

    opening: Callable[[], LoadedModel]
    """function that opens the model; for a pool, the architecture with any parameters"""
    name: str
    """name of the model in URLs"""
    shape: tuple[int, ...]
    """shape of one input"""
    settings: ServerSettings = field(default_factory=ServerSettings)
    set_name: str = ""
    """name under which the parameters of the model are recorded; empty for a pool, which sends its sets"""
    digest: str = ""
    """digest of the model that was opened before the workers start, which that of each worker must equal"""
    device: str = "cpu"
    threads: int | None = None
    hung_s: float = HUNG_S
    """seconds without progress after which a worker is replaced; longer for a slow model, see `Worker.patience_s`"""
    guard: Callable[[str | None], RequestGuard] = no_rules
    """function that opens the guard, given the digest of the model that its calibration must name"""
    audit_key: AuditKey | None = field(default=None, repr=False)
    signature: Signature | None = None
    """signature of a proxied model, which is known at the start; None for a model that is called to find it"""
    monitor: Reference | None = None
    """what samples of the requests are compared with; None without a monitor"""

    @property
    def rotating(self) -> bool:
        """Whether the parameter sets are those of a pool."""
        return not self.set_name

    @property
    def keys(self) -> Path | None:
        """File of the keys; None without keys."""
        return None if self.settings.keys is None else Path(self.settings.keys)

    @property
    def hosts(self) -> HostNames:
        """Host names under which requests are answered: all, if other machines reach the server and none are given."""
        settings = self.settings
        return _host_names(settings, everything=is_public(settings.host) and not settings.accepted_hosts)

    @property
    def admin_hosts(self) -> HostNames:
        """Host names under which the requests of the operator are answered."""
        return _host_names(self.settings, everything=False)


def _host_names(settings: ServerSettings, *, everything: bool) -> HostNames:
    names = (*settings.accepted_hosts, settings.host, settings.admin_host)
    return HostNames(frozenset(name.lower().removesuffix(".") for name in names), everything)


@dataclass(frozen=True)
class ServerSetup:
    """What a server needs besides its workers: the pool, the monitor, and what it states about the model."""

    worker: WorkerSetup
    pool: LivePool | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    """facts about the model and the settings for the first record of the audit chain"""
    reloadable: bool = False
    """whether the model is in a file, which may be opened again while the server runs"""
    opening: Mapping[str, Any] = field(default_factory=dict)
    """settings with which a model in a file is opened, or the folder of the pool, for `holdfast adapt`; empty for
    another model
    """
    renewed: Callable[[], Reference] | None = None
    """function that returns the reference of the monitor with the model that is in the file now; None if it does not
    depend on it
    """
    candidate: Callable[[str], WorkerSetup] | None = None
    """function from the path of a file to the setup of a worker that serves the model in it; None without a file"""
    notes: tuple[str, ...] = ()
    """what the operator should know about the guard"""
    flagged: FlaggedInputs | None = None
    """the inputs that the guard stores; None if it stores none"""

    @property
    def settings(self) -> ServerSettings:
        """The settings of the user."""
        return self.worker.settings
