"""The supervisor of a server: it binds the sockets, starts and replaces workers, swaps and reloads models, and drains.

It alone opens the pool with its key, and the folder of audit chains. It serves metrics and the requests of the operator
on a port of their own.
"""

import json
import math
import os
import pickle
import queue
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast.core.errors import HoldfastError, TargetError, UsageError, failure_from_json
from holdfast.monitoring.reference import Reference
from holdfast.runs.engine.children import unshared
from holdfast.runs.engine.executor import ERRORS
from holdfast.runs.engine.progress import Notify, ignore
from holdfast.server.adaptations import Adaptations
from holdfast.server.audit_chain import AuditKey
from holdfast.server.audit_folder import AuditFolder
from holdfast.server.canary import Canary
from holdfast.server.flagged_inputs import FlaggedInputs
from holdfast.server.host_names import HostNames
from holdfast.server.http_refusals import Refused
from holdfast.server.live_monitor import LiveMonitor
from holdfast.server.live_pool import LivePool
from holdfast.server.reloading import Reloading, ServedVersion
from holdfast.server.sampled_inputs import ALL_BYTES, CollectedSamples
from holdfast.server.server_signals import ending_signals, hang_up_signals
from holdfast.server.server_worker import ServingSetup
from holdfast.server.stand_in import StandIn
from holdfast.server.swapping import PoolSwaps
from holdfast.server.telemetry import MetricTotals, Telemetry
from holdfast.server.traffic import Traffic
from holdfast.server.worker_processes import Inbox, WorkerProcess, bound_socket

_TICK_S = 0.1
"""largest time between two looks at workers and triggers"""
_DEATHS = 3
"""number of deaths of workers before any was ready after which the server gives up"""
_KILLED_S = 5.0
"""seconds that a worker gets to end after it drained, before it is killed"""
_BEGIN_S = 10.0
"""seconds until a worker that could not be started is started again"""
_HEADS_S = 60.0
"""seconds between two records of the heads of the audit chains"""
_DRAIN_DELAY_S, _PROBED_S = 5.0, 60.0
"""seconds for which requests are answered after SIGTERM, if readiness was probed within so many seconds before"""
_UNANSWERED_S = 1.0
"""seconds without a started worker after which the supervisor refuses requests itself"""
_STARTED_S = 300.0
"""seconds in which a worker must be ready"""
_PAUSED_S = 2.0
"""seconds without a step after which this process itself may not have run, so that silence of workers means nothing"""


@dataclass(frozen=True)
class ServerSetup:
    """What a server needs: the workers, the addresses, the pool, and the audit folder."""

    worker: ServingSetup
    host: str = "127.0.0.1"
    port: int = 8080
    admin_host: str = "127.0.0.1"
    admin_port: int = 8081
    workers: int = 1
    pool: LivePool | None = None
    audit: Path | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    """facts about the model and the settings for the first record of the audit chain"""
    reloadable: bool = False
    """whether the model is in a file, which may be opened again while the server runs"""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """settings with which a model in a file is opened, or the folder of the pool, for `holdfast adapt`; empty for
    another model
    """
    monitor: Reference | None = None
    """what the monitor compares requests with; None without one"""
    renewed: Callable[[], Reference] | None = None
    """function that returns `monitor` with the model that is in the file now; None if it does not depend on it"""
    candidate: Callable[[str], ServingSetup] | None = None
    """function from the path of a file to the setup of a worker that serves the model in it; None without a file"""
    notes: tuple[str, ...] = ()
    """what the operator should know about the guard"""
    admin_hosts: HostNames = field(default_factory=HostNames)
    """host names under which the requests of the operator are answered"""
    flagged: FlaggedInputs | None = None
    """the inputs that the guard stores; None if it stores none"""
    single_operator: bool = False
    """whether a run of `holdfast adapt` may be approved with the key that posted it"""
    drain_delay_s: float | None = None
    """seconds between the announcement that the server drains and the close of its socket; None for 5 s if its
    readiness is probed, and otherwise none"""


class Supervisor:
    """A server: `start` returns when it answers requests, `run` keeps it running until `stop` is called."""

    def __init__(self, setup: ServerSetup, notify: Notify = ignore, warn: Notify | None = None) -> None:
        """Prepare a server. `warn` receives the messages on faults, and `notify` all others."""
        if os.name == "nt":
            raise UsageError("serve needs Linux or macOS: worker processes share a socket; use a container")
        self.setup, self._notify, self._warn = setup, notify, warn or notify
        try:
            pickle.dumps(setup.worker)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise unshared(error) from error
        self.totals, self.telemetry = MetricTotals(), Telemetry()
        self.totals.follow("supervisor", self.telemetry.memory)
        self.traffic = Traffic(self.totals)
        self._inbox: Inbox = queue.SimpleQueue()
        self._workers: list[WorkerProcess] = []
        self._number = self._early_deaths = 0
        self._swaps: PoolSwaps | None = None
        self._reloading = Reloading(
            ServedVersion(setup.worker.set_name, setup.worker.digest),
            self._workers,
            self.telemetry,
            self._record,
            notify,
            self._warn,
            begin_worker=self._start_worker,
        )
        key = setup.worker.audit_key
        self.adaptations = Adaptations(
            self._record,
            key.pseudonym if key else str,
            keys=setup.worker.keys,
            single_operator=setup.single_operator,
        )
        self.sampled = CollectedSamples((key or AuditKey(secrets.token_bytes(32))).pseudonym)
        self.live = (
            None
            if setup.monitor is None
            else LiveMonitor(setup.monitor, self._record, self.telemetry, self._warn, setup.renewed)
        )
        self._monitored = setup.worker.digest
        self.canary = Canary(
            self._workers,
            self.totals,
            self._record,
            notify,
            self._warn,
            self._start_worker,
            setup.candidate,
            Path(setup.settings.get("model", "")).suffix,
            lambda: self._reloading.version,
        )
        self._begin_s, self._refusing_s, self._last_loss = 0.0, 0.0, ""
        self._reasons: Mapping[str, str] = {}
        self._stepped_s = self._recorded_s = self._answered_s = time.monotonic()
        self._owed_workers = 0
        self._stand_in: StandIn | None = None
        self._started = self._stopping = self._hung_up = False
        self._audit: AuditFolder | None = None
        self._listener: socket.socket | None = None
        self.address, self.admin_address = ("", 0), ("", 0)
        self.drained = True
        """whether no worker was lost while the server ended"""

    # --- life

    def start(self, *, timeout_s: float = _STARTED_S) -> None:
        """Bind the sockets, start all workers, and wait until they answer requests.

        Raises the error of a worker that cannot open the model, and `TargetError` if workers die before.
        """
        setup = self.setup
        self._listener = bound_socket(setup.host, setup.port)
        self.address = self._listener.getsockname()[:2]
        try:
            if self.live is not None:
                self.live.start()
            if setup.audit is not None:
                fail_open = setup.worker.audit_fails_open
                self._audit = AuditFolder.open(setup.audit, setup.about, fail_open=fail_open)
                if self._audit.recovered:
                    self.telemetry.count("holdfast_interrupted_total", n=self._audit.recovered)
            if setup.pool is not None:
                self._swaps = PoolSwaps(setup.pool, self._workers, self.telemetry, self._record, self._notify)
            for _ in range(setup.workers):
                self._start_worker()
            until = time.monotonic() + timeout_s
            while not self._stopping and not all(worker.ready for worker in self._workers):
                self._step()
                if time.monotonic() > until:
                    raise TargetError(f"the workers were not ready within {timeout_s:g} s; check the model")
            self._started = True
        except BaseException:
            self._end()
            raise

    def run(self) -> None:
        """Supervise until `stop` is called or SIGTERM or SIGINT arrives, then drain. A second signal kills the
        workers.
        """
        with ending_signals(self._ended_by_signal):
            try:
                while not self._stopping:
                    self._step()
                self._drain()
            finally:
                self._end()

    def hang_ups(self) -> AbstractContextManager[None]:
        """Context manager in which SIGHUP swaps the set or reloads the model.

        It must begin before `start` and end after `run`: without it, SIGHUP ends the process.
        """
        return hang_up_signals(self._ended_by_signal, self._swap_by_signal)

    def stop(self) -> None:
        """Let `run` drain and return. May be called by any thread and by a signal handler."""
        self._stopping = True
        self._inbox.put((None, b""))

    def request_swap(self, why: str) -> None:
        """Swap the parameter set, or reload the model from its file, as soon as possible. May be called by any thread.

        Raises `UsageError` for a model that has neither a pool nor a file.
        """
        if self._swaps is not None:
            self._swaps.request(why)
        elif self.setup.reloadable:
            self._reloading.request(why)
        else:
            raise UsageError(
                "the model has no pool and no file, so there is nothing to swap; start another server"
            )
        self._inbox.put((None, b""))

    def _ended_by_signal(self) -> None:
        if self._stopping:
            self._kill()
        self.stop()

    def _swap_by_signal(self) -> None:
        self._hung_up = True  # `_step` does the rest, as a signal may interrupt a print
        self._inbox.put((None, b""))

    # --- one step

    def _step(self) -> None:
        """Handle the messages that arrived, then look at the workers, the pool and the file of the model."""
        with suppress(queue.Empty):
            worker, message = self._inbox.get(timeout=_TICK_S)
            while True:
                if worker is not None:
                    self._receive(worker, message)
                worker, message = self._inbox.get_nowait()
        if self._hung_up:
            self._hung_up = False
            try:
                self.request_swap("SIGHUP")
            except UsageError as error:
                self._warn(f"note: {error}")
        for worker in list(self._workers):
            if worker.child.process.poll() is not None and worker.ended is None and not worker.ready:
                self._receive(worker, b"")
        self._replace_hung()
        self._record_heads()
        self._start_owed()
        if self._swaps is not None and not self._stopping:
            self._swaps.poll()
            self.canary.follow(self._swaps.serving.name)
        elif not self._stopping and self._started:
            self._poll_model()
        self.adaptations.poll()
        self._sample()
        if self.live is not None:
            self.live.poll()
        self._stand_in_for_workers()
        self.telemetry.set("holdfast_workers", sum(worker.ready for worker in self._workers))
        reasons = self.not_ready()
        self._report_reasons(reasons)
        self.traffic.sample()
        self.telemetry.set("holdfast_ready", not reasons)
        for reason in ("workers", "draining"):
            self.telemetry.set("holdfast_not_ready", reason in reasons, reason)

    def _poll_model(self) -> None:
        """Take the next step of a reload or of a canary, which ends before a reload, and with the run that began it."""
        canary = self.canary
        if canary.active and self._reloading.requested:
            canary.end("the model is reloaded")
        elif canary.active and canary.run != self.adaptations.holder:
            canary.end("the run that began it gives no sign of life")
        if canary.active and not self._reloading.running:
            canary.poll()
        else:
            self._reloading.poll()
        version = self._reloading.version
        if self.live is not None and version.digest != self._monitored:
            done = not self._reloading.running and not self._reloading.old
            self.live.model_changes(done=done)
            self._monitored = version.digest if done else self._monitored

    def _receive(self, worker: WorkerProcess, message: bytes) -> None:
        if worker not in self._workers:
            return
        worker.heard_s = time.monotonic()
        if not message:
            self._replace(worker)
            return
        try:
            self._take(worker, message[:1], message[1:])
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            self._warn(f"note: {worker.name} sent an invalid message and is replaced: {error}")
            worker.child.process.kill()

    def _take(self, worker: WorkerProcess, kind: bytes, text: bytes) -> None:
        content = json.loads(text)
        match kind:
            case b"R":
                worker.ready, self._early_deaths = True, 0
                worker.patience_s = self.setup.worker.hung_s  # until its first report
                if self._swaps is not None:
                    self._swaps.joined(worker)
                if worker.canary:
                    self.canary.ready()
                elif self._reloading.ready(worker) and not self._stopping:
                    self._make_room()
            case b"T":
                worker.report_progress(str(content["stalled"]), float(content["patience_s"]))
                if content["chain"] is not None:
                    worker.chain_head = int(content["chain"][0]), str(content["chain"][1])
                worker.report_readiness(content["checks"], content["unprobed_s"])
                if self._swaps is not None:
                    self._swaps.answered(content["answers"])
            case b"O":
                (self.canary if worker.canary else self._reloading).opened(worker, content)
            case b"L" if self._swaps is not None:
                self._swaps.loaded(worker, int(content["epoch"]))
                self.canary.follow(self._swaps.serving.name)
            case b"U" if self._swaps is not None:
                self._swaps.unusable(worker, int(content["epoch"]), str(content["reason"]))
            case b"M" if self.live is not None:
                self.live.received(content, canary=worker.canary)
            case b"I":
                self.sampled.received(content)
            case b"E":
                worker.error = failure_from_json(content, ERRORS)
            case b"X":
                worker.ended = content

    # --- workers

    def _start_worker(self, setup: ServingSetup | None = None) -> WorkerProcess:
        """Start a worker, with the setup of a candidate if one is given."""
        assert self._listener is not None
        chain = None if self._audit is None else self._audit.new_worker()
        self._number += 1
        worker = WorkerProcess(self._number, self._listener, self._inbox, chain)
        worker.child.send(pickle.dumps((setup or self.setup.worker, chain)))
        self.totals.follow(worker.name, worker.memory)
        worker.generation = self._reloading.generation
        if self._swaps is not None:
            self._swaps.introduce(worker)
        self._workers.append(worker)
        return worker

    def _make_room(self) -> None:
        """Let an old worker answer what it received and end, since a new one is in its place."""
        if self._owed_workers:  # one has ended before
            self._owed_workers -= 1
            return
        old = sorted(self._reloading.old, key=lambda worker: worker.ready)
        if old:
            old[0].retired_s = time.monotonic()
            old[0].child.send(b"Q")

    def _replace_hung(self) -> None:
        """Kill workers that make no progress, or that do not start or end in time."""
        now = time.monotonic()
        paused, self._stepped_s = now - self._stepped_s > _PAUSED_S, now
        for worker in list(self._workers):
            if paused:
                worker.heard_s = now
            if worker.killed:
                continue
            silent_s, drain_s = now - worker.heard_s, self.setup.worker.drain_s + _KILLED_S
            if worker.retiring:
                if now - worker.retired_s > drain_s:
                    worker.kill("it did not end in time")
            elif not worker.ready:
                if now - worker.begun_s > _STARTED_S:
                    worker.kill(f"it was not ready within {_STARTED_S:g} s")
            elif not self._stopping and (worker.stalled or silent_s > worker.patience_s):
                what = worker.stalled or "the process"
                self.telemetry.count("holdfast_worker_hangs_total")
                worker.kill(f"{what} made no progress for {worker.patience_s:g} s")

    def _replace(self, worker: WorkerProcess) -> None:
        """Remove a worker that has ended, complete its audit chain, and start another one unless the server stops."""
        worker.child.process.kill()
        code = worker.child.process.wait()
        worker.child.close()
        self._workers.remove(worker)
        cause = str(worker.error or worker.killed or f"it ended with status {code}")
        self.canary.left(worker, cause)
        self.totals.forget(worker.name)
        if self._swaps is not None:
            self._swaps.left(worker)
        end = "drained" if worker.ended is not None else worker.killed or "the worker died"
        interrupted = self._close_chain(worker, end)
        note = f"; {interrupted} requests were interrupted" if interrupted else ""
        if self._stopping and self._started and worker.ready and worker.ended is None:
            self.drained = False
            self._warn(f"note: {worker.name} was lost while the server ended: {cause}{note}")
        drained = worker.ended is not None and not self._reloading.awaits(worker)
        if self._stopping or drained or worker.canary:
            return
        error = worker.error
        self._last_loss = f"{worker.name}: {cause}"
        if self._reloading.left(worker, cause):
            return
        if worker.retiring:
            self._warn(f"note: {worker.name} was to end, and was lost: {cause}{note}")
            return
        self._early_deaths += not worker.ready
        if error is not None or self._early_deaths >= _DEATHS:
            if not self._started or not any(each.ready for each in self._workers):
                raise error or TargetError(
                    f"workers died {_DEATHS} times before they were ready, the last time with status {code}; if memory "
                    "ran out, use fewer workers"
                )
            self._begin_s = time.monotonic() + _BEGIN_S
            if self.setup.reloadable:
                self._reloading.cannot_start(cause)
        self.telemetry.count("holdfast_worker_restarts_total")
        self._warn(f"note: {worker.name} is replaced: {cause}{note}")
        self._owed_workers += 1
        self._start_owed()

    def _start_owed(self) -> None:
        """Start workers in the place of those that ended; later if a chain cannot be begun, as on a full disk."""
        while self._owed_workers and not self._stopping and time.monotonic() >= self._begin_s:
            if self._reloading.testing:  # which decides with which model they start
                return
            try:
                self._start_worker()
            except (TargetError, OSError) as error:
                self._begin_s = time.monotonic() + _BEGIN_S
                self._warn(f"note: a worker cannot be started: {error}")
                return
            self._owed_workers -= 1

    def _close_chain(self, worker: WorkerProcess, reason: str) -> int:
        if self._audit is None or worker.chain is None:
            return 0
        try:
            interrupted = self._audit.ended(worker.chain, reason=reason)
        except (HoldfastError, OSError) as error:
            self._warn(f"note: the audit chain of {worker.name} could not be completed: {error}")
            return 0
        self.telemetry.count("holdfast_interrupted_total", n=interrupted)
        return interrupted

    def _record_heads(self) -> None:
        """Record from time to time how far the chains of the workers are."""
        now = time.monotonic()
        if self._audit is None or now - self._recorded_s < _HEADS_S:
            return
        self._recorded_s = now
        chains = ((worker.chain, worker.chain_head) for worker in self._workers)
        try:
            self._audit.record_heads({path.name: head for path, head in chains if path and head})
        except TargetError as error:
            self._warn(f"note: {error}")

    def _record(self, kind: str, **facts: Any) -> None:
        if self._audit is not None:
            try:
                self._audit.record(kind, **facts)
            except TargetError as error:
                self._warn(f"note: {error}")

    def _sample(self) -> None:
        """Let the workers sample inputs while a run of `holdfast adapt` holds the server, and forget them after it."""
        held = self.adaptations.holder is not None
        for worker in self._workers:
            if worker.ready and worker.sampling != held:
                worker.sampling = held
                # as if there were a canary and a worker more, because a worker keeps its limit
                n_bytes = ALL_BYTES // (self.setup.workers + 2) if held else 0
                worker.child.send(b"K" + str(n_bytes).encode())

    def samples(self) -> bytes:
        """Return the inputs that the workers sample as an .npz file. Any thread may call it. Raises `Refused` if no run
        of `holdfast adapt` holds the server.
        """
        if self.adaptations.holder is None:
            raise Refused(409, "inputs are sampled only while a run of holdfast adapt holds the server")

        def ask(number: int) -> int:
            asked = [worker for worker in list(self._workers) if worker.ready]
            for worker in asked:
                worker.child.send(b"I" + str(number).encode())
            return len(asked)

        return self.sampled.collected(ask, (lambda *_: -1) if self.live is None else self.live.class_of)

    # --- readiness

    def not_ready(self) -> dict[str, str]:
        """Return why every request is refused, with details, by reason; empty if a worker answers requests."""
        if self._stopping:
            return {"draining": "the server ends"}
        ready = [worker for worker in list(self._workers) if worker.ready]
        if not ready:
            return {"workers": self._last_loss or "the workers are starting"}
        if not all(worker.failures for worker in ready):
            return {}
        return {reason: failure for worker in ready for reason, failure in worker.failures.items()}

    def _report_reasons(self, reasons: Mapping[str, str]) -> None:
        """Report the beginning and the end of a time in which every request is refused."""
        if self._started and not self._stopping and reasons.keys() != self._reasons.keys():
            now = time.monotonic()
            if reasons:
                text = "; ".join(f"{reason}: {failure}" for reason, failure in reasons.items())
                self._warn(f"note: every request is refused: {text}")
                self._refusing_s = now if not self._reasons else self._refusing_s
            else:
                reason = ", ".join(self._reasons)
                self._notify(
                    f"note: requests are answered again, after {now - self._refusing_s:.1f} s: {reason}"
                )
            self._reasons = reasons

    def _stand_in_for_workers(self) -> None:
        """Answer requests with 503 while no worker has started for a while, so that they do not wait."""
        now = time.monotonic()
        if self._stopping or any(worker.ready for worker in self._workers):
            self._answered_s = now
            if self._stand_in is not None:
                self._stand_in.end()
                self._stand_in = None
        elif self._stand_in is None and now - self._answered_s > _UNANSWERED_S:
            assert self._listener is not None
            self._stand_in = StandIn(self._listener, self.telemetry)

    # --- end

    def _drain_delay_s(self) -> float:
        """Return the seconds for which requests are answered after probes were told that the server drains."""
        if self.setup.drain_delay_s is not None:
            return self.setup.drain_delay_s
        probed_s = max((worker.probed_s for worker in self._workers), default=-math.inf)
        return _DRAIN_DELAY_S if time.monotonic() - probed_s < _PROBED_S else 0.0

    def _drain(self) -> None:
        """Let load balancers notice that the server ends, then let the workers answer what they received."""
        assert self._listener is not None
        self._reloading.give_up()
        for worker in self._workers:
            worker.child.send(b"N")
        until = time.monotonic() + self._drain_delay_s()
        while self._workers and time.monotonic() < until:
            self._step()
        self._listener.close()
        for worker in self._workers:
            worker.child.send(b"D")
        until = time.monotonic() + self.setup.worker.drain_s + _KILLED_S
        while self._workers and time.monotonic() < until:
            self._step()

    def _kill(self) -> None:
        for worker in self._workers:
            worker.child.process.kill()

    def _end(self) -> None:
        """Kill workers that remain, write the last answers, and close chains and sockets."""
        self._stopping = True
        self._kill()
        for worker in list(self._workers):
            with suppress(HoldfastError):
                self._replace(worker)
        if self._swaps is not None:
            self._swaps.end()
        if self.live is not None:
            self.live.close()
        if self._audit is not None:
            self._audit.close()
            self._audit = None
        if self._stand_in is not None:
            self._stand_in.end()
        if self._listener is not None:
            self._listener.close()

    # --- state for the operator

    def status(self, *, detailed: bool = True) -> dict[str, Any]:
        """Return the state of the server for its operator; without the settings of the model unless it is
        `detailed`.
        """
        settings = {"settings": dict(self.setup.settings)} if detailed else {}
        not_ready = self.not_ready()
        state: dict[str, Any] = {
            "ready": not not_ready,
            "not_ready": not_ready,
            "workers": [
                {
                    "name": worker.name,
                    "pid": worker.child.process.pid,
                    "started": worker.ready,
                    "set": worker.set_name,
                    "not_ready": dict(worker.failures),
                    "checks": dict(worker.checks),
                }
                for worker in list(self._workers)
            ],
            "draining": self._stopping,
        }
        if self._swaps is not None:
            state["pool"] = {**self._swaps.status(), **settings}
        else:
            state["model"] = {**self._reloading.status(), **settings}
            state["canary"] = self.canary.status()
        return {**state, "sets": self.canary.sets()}
