"""The supervisor of a server: it binds the sockets, starts and replaces workers, swaps and reloads models, and drains.

It alone opens the pool with its key, and the folder of audit chains. It serves metrics and the requests of the operator
on a port of their own.
"""

import math
import os
import pickle
import queue
import secrets
import signal
import socket
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from msgspec import to_builtins

from holdfast.core.errors import HoldfastError, TargetError, UsageError
from holdfast.runs.engine.processes import unshared
from holdfast.runs.engine.progress import Notify, ignore
from holdfast.server import messages
from holdfast.server.adaptations import Adaptations
from holdfast.server.asgi import handled_signals
from holdfast.server.audit_chain import AuditKey
from holdfast.server.audit_folder import AuditFolder
from holdfast.server.live_monitor import ALL_BYTES, CollectedSamples, LiveMonitor
from holdfast.server.messages import Generation, Inbox, WorkerProcess, bound_socket, hang_up_signals
from holdfast.server.requests import Refused
from holdfast.server.served_weights import ServedWeights
from holdfast.server.server_setup import ServerSetup, WorkerSetup
from holdfast.server.telemetry import MetricTotals, Telemetry
from holdfast.server.traffic import Traffic
from holdfast.settings.grammar import seconds

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
_STARTED_S = 300.0
"""seconds in which a worker must be ready"""
_PAUSED_S = 2.0
"""seconds without a step after which this process itself may not have run, so that silence of workers means nothing"""


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
        self.weights = ServedWeights(
            setup,
            self._workers,
            self._start_worker,
            self.totals,
            self.telemetry,
            self._record,
            notify,
            self._warn,
        )
        key = setup.worker.audit_key
        self._records: queue.SimpleQueue[tuple[str, dict[str, Any]]] = queue.SimpleQueue()
        self.adaptations = Adaptations(
            self._record_soon,
            key.pseudonym if key else str,
            keys=setup.worker.keys,
            single_operator=setup.settings.single_operator,
        )
        self.sampled = CollectedSamples((key or AuditKey(secrets.token_bytes(32))).pseudonym)
        monitor = setup.worker.monitor
        self.live = (
            None
            if monitor is None
            else LiveMonitor(monitor, self._record_soon, self.telemetry, self._warn, setup.renewed)
        )
        self._monitored = setup.worker.digest
        self._drain_s = seconds(setup.settings.drain, "drain")
        self._begin_s, self._refusing_s, self._last_loss = 0.0, 0.0, ""
        self._reasons: Mapping[str, str] = {}
        self._stepped_s = self._recorded_s = time.monotonic()
        self._owed_workers = 0
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
        setup, settings = self.setup, self.setup.settings
        self._listener = bound_socket(settings.host, settings.port)
        self.address = self._listener.getsockname()[:2]
        try:
            if self.live is not None:
                self.live.start()
            if settings.audit is not None:
                fail_open = settings.on_audit_failure == "answer"
                self._audit = AuditFolder.open(Path(settings.audit), setup.about, fail_open=fail_open)
                if self._audit.recovered:
                    self.telemetry.count("holdfast_interrupted_total", n=self._audit.recovered)
            self.weights.open()
            for _ in range(settings.workers):
                self._start_worker(self.weights.serving)
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
        with handled_signals(self._ended_by_signal, signal.SIGTERM, signal.SIGINT):
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
        self.weights.request(why)
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
            if not worker.drained and not worker.ready and worker.child.has_ended():
                self._inbox.put((worker, b""))  # behind its last messages, such as the error that ended it
        self._replace_hung()
        self._record_heads()
        self._start_owed()
        if not self._stopping and (self._started or self.setup.pool is not None):
            self.weights.poll(self.adaptations.holder)
            self._follow_model()
        self._sample()
        self._record_waiting()
        if self._listener is not None:
            self.weights.stand_in_for_workers(self._listener, stopping=self._stopping)
        self.telemetry.set("holdfast_workers", sum(worker.ready for worker in self._workers))
        reasons = self.not_ready()
        self._report_reasons(reasons)
        self.traffic.sample()
        self.telemetry.set("holdfast_ready", not reasons)
        for reason in ("workers", "draining"):
            self.telemetry.set("holdfast_not_ready", reason in reasons, reason)

    def _follow_model(self) -> None:
        """Let the monitor leave samples out while workers exchange the model."""
        digest = self.weights.serving.digest
        if self.live is not None and digest != self._monitored:
            self.live.model_changes(done=self.weights.settled)
            self._monitored = digest if self.weights.settled else self._monitored

    def _receive(self, worker: WorkerProcess, message: bytes) -> None:
        if worker not in self._workers:
            return
        worker.heard_s = time.monotonic()
        if not message:
            self._replace(worker)
            return
        try:
            self._take(worker, messages.decoded_by_supervisor(message))
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            self._warn(f"note: {worker.name} sent an invalid message and is replaced: {error}")
            worker.child.process.kill()

    def _take(self, worker: WorkerProcess, notice: messages.Notice) -> None:
        match notice:
            case HoldfastError():
                worker.error = notice
            case messages.Opened():
                self.weights.opened(worker, notice)
            case messages.Ready():
                worker.ready, self._early_deaths = True, 0
                worker.patience_s = self.setup.worker.hung_s  # until its first report
                if self.weights.ready(worker) and not self._stopping:
                    self._make_room()
            case messages.Report():
                worker.reported(notice)
                self.weights.answered(notice.answers)
            case messages.Loaded():
                self.weights.loaded(worker, notice.epoch)
            case messages.Unusable():
                self.weights.unusable(worker, notice.epoch, notice.reason)
            case messages.Observations():
                if self.live is not None:
                    self.live.received(notice, canary=worker.generation.candidate is not None)
            case messages.Samples():
                self.sampled.received(notice)
            case messages.Drained():
                worker.drained = True

    # --- workers

    def _start_worker(self, generation: Generation, setup: WorkerSetup | None = None) -> WorkerProcess:
        """Start a worker for a generation, with the setup of a candidate if one is given."""
        assert self._listener is not None
        chain = None if self._audit is None else self._audit.new_worker()
        self._number += 1
        worker = WorkerProcess(self._number, self._listener, self._inbox, chain, generation)
        worker.child.send(pickle.dumps((setup or self.setup.worker, chain)))
        self.totals.follow(worker.name, worker.memory)
        self.weights.introduce(worker)
        self._workers.append(worker)
        return worker

    def _make_room(self) -> None:
        """Let an old worker answer what it received and end, since a new one is in its place."""
        if self._owed_workers:  # one has ended before
            self._owed_workers -= 1
        else:
            self.weights.retire_old()

    def _replace_hung(self) -> None:
        """Kill workers that make no progress, or that do not start or end in time."""
        now = time.monotonic()
        paused, self._stepped_s = now - self._stepped_s > _PAUSED_S, now
        for worker in list(self._workers):
            if paused:
                worker.heard_s = now
            if worker.killed:
                continue
            silent_s, drain_s = now - worker.heard_s, self._drain_s + _KILLED_S
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
        replaced = not self.weights.left(worker, cause)
        self.totals.forget(worker.name)
        end = "drained" if worker.drained else worker.killed or "the worker died"
        interrupted = self._close_chain(worker, end)
        note = f"; {interrupted} requests were interrupted" if interrupted else ""
        if self._stopping and self._started and worker.ready and not worker.drained:
            self.drained = False
            self._warn(f"note: {worker.name} was lost while the server ended: {cause}{note}")
        if self._stopping or worker.drained or not replaced:
            return
        error = worker.error
        self._last_loss = f"{worker.name}: {cause}"
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
            self.weights.cannot_start(cause)
        self.telemetry.count("holdfast_worker_restarts_total")
        self._warn(f"note: {worker.name} is replaced: {cause}{note}")
        self._owed_workers += 1
        self._start_owed()

    def _start_owed(self) -> None:
        """Start workers in the place of those that ended; later if a chain cannot be begun, as on a full disk."""
        while self._owed_workers and not self._stopping and time.monotonic() >= self._begin_s:
            if self.weights.testing:  # which decides with which model they start
                return
            try:
                self._start_worker(self.weights.serving)
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

    def _record_waiting(self) -> None:
        """Add the records of other threads."""
        with suppress(queue.Empty):
            while True:
                kind, facts = self._records.get_nowait()
                self._record(kind, **facts)

    def _record_soon(self, kind: str, **facts: Any) -> None:
        """Add a record as soon as possible, in the next step, as another thread may not write to the chain."""
        self._records.put((kind, facts))
        self._inbox.put((None, b""))

    def _sample(self) -> None:
        """Let the workers sample inputs while a run of `holdfast adapt` holds the server, and forget them after it."""
        held = self.adaptations.holder is not None
        for worker in self._workers:
            if worker.ready and worker.sampling != held:
                worker.sampling = held
                # as if there were a canary and a worker more, because a worker keeps its limit
                n_bytes = ALL_BYTES // (self.setup.settings.workers + 2) if held else 0
                worker.send(messages.SampleInputs(n_bytes))

    def samples(self) -> bytes:
        """Return the inputs that the workers sample as an .npz file. Any thread may call it. Raises `Refused` if no run
        of `holdfast adapt` holds the server.
        """
        if self.adaptations.holder is None:
            raise Refused(409, "inputs are sampled only while a run of holdfast adapt holds the server")

        def ask(number: int) -> int:
            asked = [worker for worker in list(self._workers) if worker.ready]
            for worker in asked:
                worker.send(messages.SendSamples(number))
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

    # --- end

    def _drain_delay_s(self) -> float:
        """Return the seconds for which requests are answered after probes were told that the server drains."""
        delay = self.setup.settings.drain_delay
        if delay is not None:
            return 0.0 if delay == "0s" else seconds(delay, "drain_delay")
        probed_s = max((worker.probed_s for worker in self._workers), default=-math.inf)
        return _DRAIN_DELAY_S if time.monotonic() - probed_s < _PROBED_S else 0.0

    def _drain(self) -> None:
        """Let load balancers notice that the server ends, then let the workers answer what they received."""
        assert self._listener is not None
        self.weights.give_up()
        for worker in self._workers:
            worker.send(messages.AnnounceEnd())
        until = time.monotonic() + self._drain_delay_s()
        while self._workers and time.monotonic() < until:
            self._step()
        self._listener.close()
        for worker in self._workers:
            worker.send(messages.Drain(last=True))
        until = time.monotonic() + self._drain_s + _KILLED_S
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
        self.weights.end()
        if self.live is not None:
            self.live.close()
        self._record_waiting()
        if self._audit is not None:
            self._audit.close()
            self._audit = None
        if self._listener is not None:
            self._listener.close()

    # --- state for the operator

    def status(self, *, detailed: bool = True) -> dict[str, Any]:
        """Return the state of the server for its operator; without the settings of the model unless it is
        `detailed`.
        """
        settings = {"settings": dict(self.setup.opening)} if detailed else {}
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
                    "checks": {reason: to_builtins(check) for reason, check in worker.checks.items()},
                }
                for worker in list(self._workers)
            ],
            "draining": self._stopping,
        }
        return {**state, **self.weights.status(settings), "sets": self.weights.counts.sums()}
