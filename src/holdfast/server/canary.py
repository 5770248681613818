"""A canary: one more worker that opens a candidate instead of the served model, and answers a share of the requests.

It accepts connections at the same socket as the other workers, so that with N of them it answers about one request in
N + 1. It is not replaced if it dies, and it ends before a reload, and if the run that began it gives no sign of life.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from holdfast.core.errors import HoldfastError, TargetError
from holdfast.runs.engine.progress import Notify
from holdfast.server.http_refusals import Refused
from holdfast.server.reloading import NAME_DIGITS, ServedVersion, fault_of
from holdfast.server.server_worker import ServingSetup
from holdfast.server.swapping import Record
from holdfast.server.telemetry import MetricTotals
from holdfast.server.worker_processes import WorkerProcess

State = Literal["none", "starting", "serving", "failed"]

_COUNTED: Mapping[str, tuple[str, Callable[[tuple[str, ...]], bool]]] = {
    "requests": ("holdfast_requests_total", lambda labels: True),
    "inputs": ("holdfast_inputs_total", lambda labels: True),
    "model_failures": ("holdfast_refused_total", lambda labels: labels == ("model",)),
    "refused": ("holdfast_refused_total", lambda labels: labels != ("model",)),
}
"""What is counted for each served set: the metric, and which of its labels"""
Counts = dict[str, float]
_MOST_SETS = 50
"""largest number of sets of a pool whose counts are kept after they served"""


@dataclass(frozen=True)
class Candidate:
    """The model of a canary: the run that requests it, its file, and the digest that the worker must report."""

    run: str
    model: str
    digest: str


@dataclass(eq=False)
class Canary:
    """The canary of a server, if there is one. `begin_worker` starts a worker with another setup, and `candidate`
    returns the setup for the model in a file; None if the served model is not in a file.
    """

    workers: Sequence[WorkerProcess]
    totals: MetricTotals
    record: Record
    notify: Notify
    warn: Notify
    begin_worker: Callable[[ServingSetup], WorkerProcess]
    candidate: Callable[[str], ServingSetup] | None
    suffix: str
    """suffix of the file of the served model, which that of a candidate must have"""
    served: Callable[[], ServedVersion]
    """function that returns the version that the other workers serve"""
    state: State = "none"
    reason: str = ""
    worker: WorkerProcess | None = None
    _requested: Candidate | None = None
    _wanted: Candidate | None = None
    _name: str = ""
    _ending: str = ""
    _before: dict[str, Counts] = field(default_factory=dict)
    """counts of each worker when the canary began"""
    _left: dict[str, Counts] = field(default_factory=dict)
    """counts since then of workers that have ended, by served set"""

    @property
    def active(self) -> bool:
        """Whether a canary was requested and has not ended."""
        return self._requested is not None or self.worker is not None

    @property
    def run(self) -> str:
        """The run that requested the canary."""
        return "" if self._wanted is None else self._wanted.run

    def request(self, candidate: Candidate) -> None:
        """Start a canary soon. May be called by any thread. Raises `Refused` if it is not possible."""
        if self.candidate is None:
            raise Refused(
                409, "the served model is not in a file, so that no other file can be served beside it"
            )
        if self.active:
            raise Refused(409, "there is a canary already; end it first")
        if candidate.digest == self.served().digest:
            raise Refused(409, "the candidate is the model that is served")
        if not Path(candidate.model).is_absolute() or Path(candidate.model).suffix != self.suffix:
            raise Refused(
                400, f"model is {candidate.model!r}; the absolute path of a {self.suffix} file was expected"
            )
        self.state, self.reason, self._ending = "starting", "", ""
        self._requested = self._wanted = candidate

    def end(self, why: str) -> None:
        """End the canary soon. May be called by any thread."""
        self._ending = why

    # --- steps of the supervisor

    def poll(self) -> None:
        """Start a requested canary, or let the one that is to end answer what it received."""
        if self._ending:
            why, self._ending = self._ending, ""
            if self._requested is not None:
                self._requested, self.state = None, "none"
            if self.worker is not None and not self.worker.retiring:
                self.worker.retired_s = time.monotonic()
                self.worker.child.send(b"Q")
                self.record("canary", set=self._name, state="ended", why=why)
        elif self._requested is not None and self.candidate is not None:
            wanted, self._requested = self._requested, None
            self._before = {worker.name: self._counts(worker) for worker in self.workers}
            self._left = {}
            try:
                self.worker = self.begin_worker(self.candidate(wanted.model))
            except (HoldfastError, OSError) as error:
                self._fail(str(error))
                return
            self.worker.canary = True

    def opened(self, worker: WorkerProcess, content: Mapping[str, Any]) -> None:
        """Compare the model that the canary has opened with the announced one, and let it serve."""
        assert self._wanted is not None
        digest, served = str(content["digest"]), self.served()
        self._name = digest[:NAME_DIGITS]
        version = ServedVersion(self._name, self._wanted.digest, served.epoch + 1, served.classes)
        fault = fault_of(version, digest, int(content["classes"]))
        if fault:
            worker.error = TargetError(fault)
            worker.child.process.kill()
            return
        self.record("set", set=self._name, epoch=version.epoch, model=digest, why="canary")
        worker.set_name = self._name
        worker.child.send(b"G" + json.dumps({"set": self._name, "epoch": version.epoch}).encode())

    def ready(self) -> None:
        """Note that the canary answers requests."""
        self.state = "serving"
        self.notify(f"{self._name} serves as a canary")

    def left(self, worker: WorkerProcess, cause: str) -> None:
        """Keep the counts of a worker that has ended. A canary that died is not replaced."""
        if worker.set_name:
            self._left[worker.set_name] = _sum(self._left.get(worker.set_name, {}), self._since(worker))
        if worker is not self.worker:
            return
        self.worker = None
        if worker.ended is not None or worker.retiring:
            self.state = "none"
            self.notify(f"the canary {self._name} has ended")
        else:
            self._fail(cause)

    def _fail(self, cause: str) -> None:
        self.state, self.reason = "failed", cause
        self.record("canary", set=self._name, state="failed", why=cause)
        self.warn(f"note: the canary failed: {cause}")

    def follow(self, name: str) -> None:
        """Count what the workers answer from now on for the set of a pool that serves.

        A worker reports its counts within a fraction of a second, so that a few requests are counted for the next set.
        """
        for worker in self.workers:
            if worker.set_name in ("", name):
                worker.set_name = name
                continue
            left = self._left.pop(worker.set_name, {})
            self._left[worker.set_name] = _sum(left, self._since(worker))  # the newest is last
            self._before[worker.name], worker.set_name = self._counts(worker), name
        while len(self._left) > _MOST_SETS:
            del self._left[next(iter(self._left))]

    # --- state for the operator

    def status(self) -> dict[str, Any]:
        """Return the state for the operator."""
        return {"state": self.state, "set": self._name, "reason": self.reason}

    def sets(self) -> dict[str, Counts]:
        """Return what workers of each served set have counted: since the last canary began or, for the newest sets of a
        pool, since they served.
        """
        # a copy first, because another thread than that of the supervisor may ask
        sums = {name: dict(counts) for name, counts in dict(self._left).items()}
        for worker in list(self.workers):
            if not worker.set_name:
                continue
            sums[worker.set_name] = _sum(sums.get(worker.set_name, {}), self._since(worker))
        return sums

    def _since(self, worker: WorkerProcess) -> Counts:
        before = self._before.get(worker.name, {})
        return {key: max(0.0, n - before.get(key, 0.0)) for key, n in self._counts(worker).items()}

    def _counts(self, worker: WorkerProcess) -> Counts:
        values = self.totals.of(worker.name)
        counts = {}
        for key, (metric, counted) in _COUNTED.items():
            found = (n for (name, labels), (n, *_) in values.items() if name == metric and counted(labels))
            counts[key] = math.fsum(found)
        return counts


def _sum(counts: Counts, more: Counts) -> Counts:
    return {key: counts.get(key, 0.0) + n for key, n in more.items()}
