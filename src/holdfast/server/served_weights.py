"""The weights that a server serves: one state machine, of which swaps, reloads and canaries are transitions.

    prepared ─▶ serving ─▶ retired     a swap of a pool or a reload of a file
    prepared ─▶ canary ──▶ retired     a canary
    prepared, canary ────▶ refused     a fault, after which the serving generation continues to serve

A parameter set of a pool is prepared by all workers, beside the serving one. When each has loaded it, the ledger
records that it serves, and the workers replace their reference. A model in a file is prepared by one more worker, which
opens and tests it. When it is ready, its generation serves, and the workers of the retired one are replaced one after
another: each process thus has one model, and there is at most one process more than before. A canary is prepared in the
same way, and remains one worker that shares the socket with the others, so that with N of them it answers about one
request in N + 1. It is not replaced if it dies, and ends before a reload and with the run that began it.

A worker reports the digest of the model that it has opened before it answers requests. A digest that was not announced
is refused, so that no worker answers with other parameters under a recorded name. While no worker has started, a thread
stands in for them at their socket.
"""

import math
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol

from holdfast.core.errors import HoldfastError, TargetError, UsageError
from holdfast.runs.engine.progress import Notify
from holdfast.server.connections import StandIn
from holdfast.server.messages import (
    NAME_DIGITS,
    Activate,
    Candidate,
    Generation,
    Opened,
    Serve,
    State,
    WorkerProcess,
)
from holdfast.server.requests import Refused
from holdfast.server.server_setup import LivePool, ServerSetup, WorkerSetup
from holdfast.server.telemetry import MetricTotals, Telemetry
from holdfast.server.traffic import SetCounts

_POOL_S = 0.5
"""seconds between two reads of the ledger, which other processes may change"""
_LOADING_S = 120.0
"""seconds in which a worker must load a set before it is replaced"""
_UNANSWERED_S = 1.0
"""seconds without a started worker after which requests are refused in their place"""
_CANARY_STATES: Mapping[State, str] = {
    "prepared": "starting",
    "canary": "serving",
    "retired": "none",
    "refused": "failed",
}
"""how the operator sees the states of a canary"""


class Record(Protocol):
    """Protocol of the function that adds a record to the audit chain of the supervisor."""

    def __call__(self, kind: str, **facts: Any) -> None:
        """Add a record."""


class BeginWorker(Protocol):
    """Protocol of the function that starts a worker."""

    def __call__(self, generation: Generation, setup: WorkerSetup | None = None) -> WorkerProcess:
        """Start a worker for a generation, with the setup of a candidate if one is given."""


def lower_priority() -> None:
    """Give this thread the processor only where no other thread needs it, so that it delays no request."""
    if sys.platform == "linux":  # elsewhere the priority is that of the whole process
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


class ServedWeights:
    """The generations of a server. `workers` is the list of the supervisor, which changes it.

    `request`, `request_canary`, `end_canary` and `status` may be called by any thread.
    """

    def __init__(
        self,
        setup: ServerSetup,
        workers: Sequence[WorkerProcess],
        begin_worker: BeginWorker,
        totals: MetricTotals,
        telemetry: Telemetry,
        record: Record,
        notify: Notify,
        warn: Notify,
    ) -> None:
        self._setup, self._workers, self._begin_worker = setup, workers, begin_worker
        self._telemetry, self._record = telemetry, record
        self._notify, self._warn = notify, warn
        self.pool: LivePool | None = setup.pool
        self.counts = SetCounts(totals, workers)
        self.serving = Generation(setup.worker.set_name, digest=setup.worker.digest, state="serving")
        self.following: Generation | None = None
        """the generation that is prepared, and is to serve"""
        self.canary: Generation | None = None
        """the last generation that was requested as a canary"""
        self.reload: Literal["none", "running", "done", "failed"] = "none"
        self._reason = ""
        """why the model in the file cannot be served by new workers"""
        self._requested = self._ending = ""
        """why a reload, and the end of the canary, are requested"""
        self._over = False
        # of a reload
        self._joining: WorkerProcess | None = None
        """the additional worker"""
        # of a swap
        self._tests = ThreadPoolExecutor(1, "test", lower_priority)
        self._test: Future[None] | None = None
        """test of the following set on the canary inputs; None after it"""
        self._loading: set[WorkerProcess] = set()
        """workers that have not loaded the following set"""
        self._sent_s, self._looked_s = math.inf, 0.0
        self._stand_in: StandIn | None = None
        self._answered_s = time.monotonic()

    # --- requests

    def open(self) -> None:
        """Let the serving set of a pool serve. Raises `Inconclusive` and `TargetError` if there is none that can."""
        if self.pool is not None:
            self.serving = self.pool.first()
            self.serving.state = "serving"
            self._record("set", set=self.serving.name, epoch=self.serving.epoch)

    def request(self, why: str) -> None:
        """Swap the parameter set, or reload the model from its file, as soon as possible.

        Raises `UsageError` for a model that has neither a pool nor a file.
        """
        if self.pool is not None:
            self.pool.request_swap(why)
            self._looked_s = 0.0
        elif self._setup.reloadable:
            self._requested = why
        else:
            raise UsageError(
                "the model has no pool and no file, so there is nothing to swap; start another server"
            )

    def request_canary(self, candidate: Candidate) -> None:
        """Start a canary soon. Raises `Refused` if it is not possible."""
        suffix = Path(self._setup.opening.get("model", "")).suffix
        if self._setup.candidate is None:
            raise Refused(
                409, "the served model is not in a file, so that no other file can be served beside it"
            )
        if self.has_canary:
            raise Refused(409, "there is a canary already; end it first")
        if candidate.digest == self.serving.digest:
            raise Refused(409, "the candidate is the model that is served")
        if not Path(candidate.model).is_absolute() or Path(candidate.model).suffix != suffix:
            raise Refused(
                400, f"model is {candidate.model!r}; the absolute path of a {suffix} file was expected"
            )
        self._ending = ""
        self.canary = Generation(
            "", digest=candidate.digest, why="canary", announced=False, candidate=candidate
        )

    def end_canary(self, why: str) -> None:
        """End the canary soon."""
        self._ending = why

    @property
    def has_canary(self) -> bool:
        """Whether a canary was requested and has not ended."""
        return self.canary is not None and self.canary.state in ("prepared", "canary")

    @property
    def old(self) -> list[WorkerProcess]:
        """Workers that are to be replaced, because their generation is retired."""
        return [
            each
            for each in self._workers
            if each.generation.state == "retired" and each.generation.candidate is None
        ]

    @property
    def testing(self) -> bool:
        """Whether it is not yet known if the file that is reloaded can be served."""
        return self._joining is not None and self._joining.generation is self.following

    @property
    def settled(self) -> bool:
        """Whether all workers serve the same generation."""
        return self.reload != "running" and not self.old

    # --- steps of the supervisor

    def poll(self, holder: str | None) -> None:
        """Take the next step. `holder` is the run of `holdfast adapt` that holds the server."""
        if self.pool is not None:
            self._poll_pool(self.pool)
            return
        canary = self.canary if self.has_canary else None
        if canary is not None and canary.candidate is not None:
            if self._requested:
                self._ending = "the model is reloaded"
            elif canary.candidate.run != holder:
                self._ending = "the run that began it gives no sign of life"
        if canary is not None and self.reload != "running":
            self._poll_canary(canary)
        else:
            self._poll_reload()

    def introduce(self, worker: WorkerProcess) -> None:
        """Send the serving set of a pool to a new worker."""
        if self.pool is not None:
            worker.child.send(self.serving.prepare)
            worker.send(Activate(self.serving.epoch))
            worker.opened = True

    def opened(self, worker: WorkerProcess, message: Opened) -> None:
        """Compare the model that a worker has opened with that of its generation, and let the worker serve it. The
        first worker of a generation announces it.
        """
        # a worker that began before a reload, and is replaced later, may have opened the file that is served now
        generation = self.serving if worker.generation.state == "retired" else worker.generation
        announces = not generation.announced
        if announces:
            self._announce(generation, message.digest)
        fault = generation.fault(message.digest, message.classes)
        if fault:
            worker.error = TargetError(fault)
            worker.child.process.kill()
            return
        generation.classes = message.classes
        if announces and (generation.candidate is not None or generation.digest != self.serving.digest):
            facts = {"set": generation.name, "epoch": generation.epoch, "model": message.digest}
            self._record("set", **facts, why=generation.why)
        worker.opened = True
        worker.send(Serve(generation.name, generation.epoch))

    def _announce(self, generation: Generation, digest: str) -> None:
        """State name, digest and number of a generation whose file was opened: those of the serving one if the file is
        unchanged, and for a candidate the digest that was requested.
        """
        served = self.serving
        generation.announced, generation.classes = True, served.classes
        if generation.candidate is None:
            generation.digest = digest
        if generation.candidate is None and digest == served.digest:
            generation.name, generation.epoch = served.name, served.epoch
        else:
            generation.name, generation.epoch = digest[:NAME_DIGITS], served.epoch + 1

    def ready(self, worker: WorkerProcess) -> bool:
        """Note that a worker answers requests, and return whether an old one may end in its place."""
        generation = worker.generation
        if self.pool is not None and self.following is not None and self._test is None:
            self._loading.add(worker)
            self._sent_s = time.monotonic()  # it has as much time as the others had
            worker.child.send(self.following.prepare)
        if generation is self.canary:
            generation.state = "canary"
            self._notify(f"{generation.name} serves as a canary")
            return False
        if worker is not self._joining:
            if self.reload != "failed":
                self._reason = ""
                self._telemetry.set("holdfast_reload_failing", 0)
            return False
        self._joining = None
        if generation is self.following:
            changed = generation.digest != self.serving.digest
            self._promote(generation)
            if changed:
                self._notify(f"{generation.name} serves as epoch {generation.epoch}: reloaded")
        return True

    def _promote(self, generation: Generation) -> None:
        self.serving.state, generation.state = "retired", "serving"
        self.serving, self.following = generation, None

    def left(self, worker: WorkerProcess, cause: str) -> bool:
        """Note that a worker has ended, and return whether no other one starts in its place: a canary, and the
        additional worker of a reload, which then failed.
        """
        self.counts.left(worker)
        self._loading.discard(worker)
        generation = worker.generation
        if generation.candidate is not None:
            if worker.drained or worker.retiring:
                generation.state = "retired"
                self._notify(f"the canary {generation.name} has ended")
            else:
                self._refuse_canary(generation, cause)
            return True
        if worker is not self._joining:
            return False
        self._joining = None
        if not self._over:
            self._fail(generation, cause)
        return True

    def retire_old(self) -> None:
        """Let an old worker answer what it received and end."""
        old = sorted(self.old, key=lambda worker: worker.ready)
        if old:
            old[0].retire()

    # --- a model in a file

    def _poll_reload(self) -> None:
        """Begin a requested reload, or replace the next worker."""
        running = self.reload == "running"
        if self._joining is not None or any(worker.retiring for worker in self._workers):
            return
        if self._requested and not running:
            self._notify(f"the model is reloaded: {self._requested}")
            self.reload, self._reason, self._requested = "running", "", ""
            self.following = Generation("", why="reloaded", announced=False)
            self._join(self.following)
        elif running and self.old:
            self._join(self.serving)
        elif running:
            self.reload = "done"
            self._telemetry.count("holdfast_swaps_total")
            self._telemetry.set("holdfast_reload_failing", 0)
            self._notify(f"all workers serve {self.serving.name}")

    def _join(self, generation: Generation) -> None:
        try:
            self._joining = self._begin_worker(generation)
        except (TargetError, OSError) as error:  # as on a full disk
            self._fail(generation, str(error))

    def _fail(self, generation: Generation, reason: str) -> None:
        """End the reload, because a worker of a generation could not be started."""
        left = "all workers serve"
        if generation is self.following:
            generation.state, generation.reason, self.following = "refused", reason, None
        else:
            left = f"{len(self.old)} of {len(self._workers)} workers serve"
        self.reload = "failed"
        self.cannot_start(reason)
        self._warn(f"note: the reload failed: {reason}; {left} the model from before")

    def cannot_start(self, reason: str) -> None:
        """Raise the alarm that the model in the file cannot be served by new workers."""
        if self._setup.reloadable:
            self._reason = reason
            self._telemetry.set("holdfast_reload_failing", 1)

    def give_up(self) -> None:
        """Replace no further workers, because the server ends."""
        self._over = True
        if self.reload == "running" or self._requested:
            self.reload, self._requested, self._reason = "failed", "", "the server ends"
            self._warn("note: the reload was given up, because the server ends")

    # --- a canary

    def _poll_canary(self, canary: Generation) -> None:
        """Start a requested canary, or let the one that is to end answer what it received."""
        worker = next((each for each in self._workers if each.generation is canary), None)
        if self._ending:
            why, self._ending = self._ending, ""
            if worker is None:
                canary.state = "retired"
            elif not worker.retiring:
                worker.retire()
                self._record("canary", set=canary.name, state="ended", why=why)
        elif worker is None and self._setup.candidate is not None and canary.candidate is not None:
            self.counts.begin()
            try:
                self._begin_worker(canary, self._setup.candidate(canary.candidate.model))
            except (HoldfastError, OSError) as error:
                self._refuse_canary(canary, str(error))

    def _refuse_canary(self, canary: Generation, cause: str) -> None:
        canary.state, canary.reason = "refused", cause
        self._record("canary", set=canary.name, state="failed", why=cause)
        self._warn(f"note: the canary failed: {cause}")

    # --- a pool

    def _poll_pool(self, pool: LivePool) -> None:
        """Write answers to the ledger, and begin the next swap if one is due."""
        now = time.monotonic()
        if self.following is not None:
            self._pass_on(self.following, now)
        if now - self._looked_s < _POOL_S:
            return
        self._looked_s = now
        pool.write()
        if self.following is None and any(worker.ready for worker in self._workers):
            before = pool.alarm
            self.following = pool.due(self.serving)
            if pool.alarm and pool.alarm != before:
                self._notify(f"note: alarm {pool.alarm}: {pool.reason}")
            if self.following is not None:
                self._sent_s, self._loading = math.inf, set()
                self._test = self._tests.submit(pool.test, self.following)
        for reason in ("empty", "limit", "error"):
            self._telemetry.set("holdfast_pool_alarm", pool.alarm == reason, reason)
        self._telemetry.set("holdfast_pool_epoch", self.serving.epoch)
        self._telemetry.set("holdfast_pool_waiting", len(pool.pool.ahead))

    def _pass_on(self, following: Generation, now: float) -> None:
        """Send the next set to the workers once its test is done, and replace workers that do not load it in time."""
        if self._test is not None and self._test.done():
            error, self._test = self._test.exception(), None
            if error is not None:
                self._refuse_set(following, str(error))
                return
            self._loading, self._sent_s = {worker for worker in self._workers if worker.ready}, now
            for worker in self._loading:
                worker.child.send(following.prepare)
        elif now - self._sent_s > _LOADING_S:
            for worker in self._loading:
                worker.kill(f"it did not load the set within {_LOADING_S:g} s")

    def answered(self, answers: Sequence[tuple[str, int, Mapping[str, int]]]) -> None:
        """Count the answers of a pool that a worker reports."""
        if self.pool is not None and answers:
            for _, epoch, principals in answers:
                self.pool.answered(epoch, principals)
            self._looked_s = 0.0

    def loaded(self, worker: WorkerProcess, epoch: int) -> None:
        """Note that a worker has loaded the next set. When all have, the ledger records it and they serve it."""
        following = self.following
        if self.pool is None or following is None or self._test is not None or epoch != following.epoch:
            return
        self._loading.discard(worker)
        if self._loading:
            return
        self.pool.write(now=True)
        if not self.pool.commit(following, self.serving):
            self.following = None
            return  # the prepared set is replaced by the next one
        self._promote(following)
        self.counts.follow(following)
        for each in self._workers:
            if not each.ready:  # it was sent the set that served when it began
                each.child.send(following.prepare)
            each.send(Activate(epoch))
        self._telemetry.count("holdfast_swaps_total")
        self._record("set", set=following.name, epoch=epoch, why=following.why)
        self._notify(f"{following.name} serves as epoch {epoch}: {following.why or 'swapped elsewhere'}")

    def unusable(self, worker: WorkerProcess, epoch: int, reason: str) -> None:
        """Refuse a set that a worker cannot load."""
        if self.following is not None and epoch == self.following.epoch:
            self._refuse_set(self.following, reason)
        elif not worker.ready:  # the serving set itself cannot be loaded by a new worker
            worker.error = TargetError(reason)
            worker.child.process.kill()

    def _refuse_set(self, following: Generation, reason: str) -> None:
        assert self.pool is not None
        following.state, following.reason, self.following = "refused", reason, None
        self._notify(f"note: {reason}")
        self.pool.refuse(following, reason)

    # --- without workers

    def stand_in_for_workers(self, listener: socket.socket, *, stopping: bool) -> None:
        """Answer requests with 503 while no worker has started for a while, so that they do not wait."""
        now = time.monotonic()
        if stopping or any(worker.ready for worker in self._workers):
            self._answered_s = now
            self._end_stand_in()
        elif self._stand_in is None and now - self._answered_s > _UNANSWERED_S:
            self._stand_in = StandIn(listener, self._telemetry)

    def _end_stand_in(self) -> None:
        if self._stand_in is not None:
            self._stand_in.end()
            self._stand_in = None

    def end(self) -> None:
        """Write the last answers of a pool to its ledger."""
        self._tests.shutdown(wait=False, cancel_futures=True)
        if self.pool is not None:
            self.pool.write(now=True)
        self._end_stand_in()

    # --- state for the operator

    def status(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state for the operator, in which `settings` are those of the model."""
        serving, canary = self.serving, self.canary
        about = {"set": serving.name, "epoch": serving.epoch}
        if self.pool is not None:
            return {"pool": {**about, "alarm": self.pool.alarm, "reason": self.pool.reason, **settings}}
        reload = "running" if self._requested else self.reload
        return {
            "model": {
                **about,
                "digest": serving.digest,
                "reload": reload,
                "reason": self._reason,
                **settings,
            },
            "canary": {
                "state": "none" if canary is None else _CANARY_STATES[canary.state],
                "set": "" if canary is None else canary.name,
                "reason": "" if canary is None else canary.reason,
            },
        }
