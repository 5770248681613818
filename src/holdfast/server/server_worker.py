"""A worker process of a server. It answers requests at the socket that it inherits, and keeps no state of its own.

It ends when the pipe from the supervisor is closed, after it has answered the requests that it received.
"""

import asyncio
import gc
import logging
import math
import os
import pickle
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from mmap import mmap
from pathlib import Path
from typing import IO

import safetensors.torch
import torch
from torch import Tensor

from holdfast.certifiers.patch_masks import MaskedVote
from holdfast.core.errors import HoldfastError, TargetError
from holdfast.core.model import Classifier
from holdfast.guard.detectors.outputs import LastFeatures
from holdfast.guard.guard import GuardPipeline
from holdfast.guard.query_rule import QueryRule
from holdfast.guard.rules import RequestGuard, release_of
from holdfast.guard.state_in_sqlite import SQLiteState
from holdfast.io.models.byte_models import shortest_file
from holdfast.rotation.rotating_model import loaded
from holdfast.runs.engine.processes import Send, read_message, serve_parent, unshared
from holdfast.server import messages
from holdfast.server.answering_requests import (
    Answer,
    Answerer,
    ChainAudit,
    Job,
    Outcome,
    ServedSet,
    log_requests,
)
from holdfast.server.app import ServedModel, application
from holdfast.server.asgi import UvicornServer
from holdfast.server.audit_chain import ChainFile
from holdfast.server.connections import (
    Check,
    ModelTest,
    audit_fault,
    limited_protocol,
    refuse_connections,
    state_fault,
)
from holdfast.server.keys import KeyFile, Quotas
from holdfast.server.live_monitor import Reservoir, SampledInputs
from holdfast.server.messages import FIRST_LETTER, refuse_damaged
from holdfast.server.protocol_v2 import Signature
from holdfast.server.requests import Batcher, ErrorLog, log_to_stderr
from holdfast.server.server_setup import WorkerSetup
from holdfast.server.telemetry import MEMORY_BYTES, Telemetry
from holdfast.server.traffic import Profile
from holdfast.settings.grammar import seconds

_ENDING_S = 3.0
"""seconds in which a worker without a supervisor must end after its drain"""
_SLOW = 4
"""a worker is not replaced before so many times the usual time of a batch of the largest size"""
_BEAT_S, _SHORT_BEAT_S = 0.1, 0.02
"""seconds between two signs of life of the loop of the server, and during the drain"""
_BEGUN_S, _ACCEPTED_S = 0.1, 0.05
"""seconds in which connections that clients have begun are complete, and in which those are known that were accepted"""
_LINGER_S = 1.0
"""seconds for which a worker that drains leaves idle connections open, whose clients may be sending a request"""
_KEEP_ALIVE_S = 30.0
"""seconds after which an idle connection is closed"""
_REPORT_S, _HASTE_S = 0.5, 0.02
"""seconds between two reports to the supervisor, and after answers of a pool, whose number may cause a swap"""

_SPACE = "free some space on the disk of the audit folder, or check its permissions"
_OBSERVED = ("holdfast_guard_inputs_total", "holdfast_guard_alarms_total")
_SWITCH_S = 0.001
"""Seconds after which a thread must let another one run. Each operation of torch in the thread of the batches waits for
this time at its end if the thread that parses requests is busy; the default of Python is 5 ms."""
_GATHER_S = 0.003
"""longest time in which requests are gathered for one transaction of the state of the query detector"""
_YOUNG = 10_000
"""Number of new objects from which the garbage collector looks for cycles. Requests of some batches are fewer, so that
they are gone before; the default of Python is 700."""


@dataclass(eq=False)
class AnswerCounts:
    """Numbers of answered inputs by epoch and principal since the last report, for the ledger of the pool."""

    arrived: threading.Event = field(default_factory=threading.Event)
    _counts: dict[tuple[str, int], dict[str, int]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, served: ServedSet, principal: str, rows: int) -> None:
        """Count the answers to one request. May be called by any thread."""
        with self._lock:
            counts = self._counts.setdefault((served.name, served.epoch), {})
            counts[principal] = counts.get(principal, 0) + rows
        self.arrived.set()

    def taken(self) -> list[tuple[str, int, dict[str, int]]]:
        """Return name of the set, epoch and numbers by principal since the last call, and begin at zero again."""
        with self._lock:
            counts, self._counts = self._counts, {}
        return [(name, epoch, principals) for (name, epoch), principals in counts.items()]


class Worker:
    """One worker: the model, the thread that answers batches, the thread that reports, and the loop of the server."""

    def __init__(self, setup: WorkerSetup, chain: Path | None, send: Send, memory: mmap) -> None:
        self.setup, self._send, settings = setup, send, setup.settings
        self.telemetry, self.ledger, self.errors = Telemetry(memory), AnswerCounts(), ErrorLog()
        self.device = torch.device(setup.device)
        opened = setup.opening()
        self.digest = opened.digest
        self._pristine = opened.model.to(self.device).eval().requires_grad_(False)
        self._prepared: dict[int, ServedSet] = {}
        self._row_s, self._beat_s = 0.0, math.inf
        self._leaving, self._last = threading.Event(), False
        self._lost, self._observed = 0, (0, 0)
        fail_open = settings.on_audit_failure == "answer"
        self.chain = None if chain is None else ChainFile(chain, fail_open=fail_open)
        keys = setup.keys
        self._limits = None if keys is None else SQLiteState(keys.with_name(f"{keys.name}.quota"))
        self.answering = self._answerer(setup.guard(opened.guard_digest))
        guard = self.answering.guard
        self.telemetry.begin(guard.rules if isinstance(guard, GuardPipeline) else {})
        self.batcher: Batcher[Job, Answer] = Batcher(
            self.answering,
            max_rows=settings.max_rows,
            max_latency_s=seconds(settings.max_latency, "max_latency"),
            gather_s=_GATHER_S if isinstance(guard, GuardPipeline) and guard.queries is not None else 0.0,
            seen=self._seen,
        )
        self.answering.progress = self.batcher.progress
        self.reservoir = None if setup.monitor is None else Reservoir(setup.monitor)
        self._next_observed_s = 0.0
        self.sampled = SampledInputs()
        self.answering.observed = self.sampled.add if self.reservoir is None else self._observe
        self.profile = Profile() if settings.profile else None
        self.served = ServedModel(
            setup.signature or self._signature(),
            self.batcher,
            None if keys is None else KeyFile(keys),
            None if chain is None else setup.audit_key,
            settings,
            self.telemetry,
            tuple(name.lower() for name in settings.forward_headers),
            self.errors,
            setup.hosts,
        )
        if self.profile is not None:
            self.answering.timing = self.served.timing = self.profile
        self.served.readiness.checks = self._checks()
        self.server = self._server()

    def _answerer(self, guard: RequestGuard) -> Answerer:
        """Return the function that answers batches with this guard."""
        setup = self.setup
        audit = None
        if self.chain is not None:
            assert setup.audit_key is not None
            audit = ChainAudit(self.chain, setup.audit_key)
        return Answerer(
            ServedSet(self._pristine, setup.set_name, 1),
            guard,
            audit,
            None if self._limits is None else Quotas(self._limits),
            self.telemetry,
            setup.settings.on_guard_failure == "answer",
            self.ledger.add if setup.rotating else lambda served, principal, rows: None,
            self.device,
            self.errors,
            logged=partial(log_requests, setup.audit_key),
            features=LastFeatures(self._pristine.net, setup.monitor.layer if setup.monitor else None),
            release=release_of(setup.settings.scores),
        )

    def _checks(self) -> list[Check]:
        """Return the checks of the audit chain, of the states of the guard and of limits, and of the model."""
        checks, guard, keys = [], self.answering.guard, self.served.keys
        if self.chain is not None:
            refuses = self.setup.settings.on_audit_failure == "refuse"
            checks.append(Check("audit", partial(audit_fault, self.chain), refuses=refuses))
        if isinstance(guard, GuardPipeline) and isinstance(guard.queries, QueryRule):
            state = guard.queries.detector.state
            refuses = guard.needs_state and state.fail == "closed"
            checks.append(Check("state", partial(state_fault, state), refuses=refuses))
        if keys is not None and self._limits is not None:
            limits = self._limits
            checks.append(Check("quota", lambda: state_fault(limits) if keys.all_limited else ""))
        if self.setup.signature is None:  # and not a model behind another server, which has probes of its own
            test = ModelTest(
                partial(self.telemetry.value, "holdfast_refused_total", "model"), self._is_finite
            )
            checks.append(Check("model", test, math.inf))
        return checks

    def _is_finite(self) -> bool:
        """Return whether the scores of the served model for one input are finite."""
        return bool(self._logits_of_one(self.answering.served.model).isfinite().all())

    def _server(self) -> UvicornServer:
        """Return the HTTP server, which leaves the limits of connections to the protocol."""
        settings = self.setup.settings
        return UvicornServer.of(
            application(self.served),
            limited_protocol(
                settings.max_connections,
                seconds(settings.header_timeout, "header_timeout"),
                self.served.max_body,
                partial(self.telemetry.count, "holdfast_refused_total"),
                self.served.body_timeout_s,  # in which a client must read a response as well
                self.errors,
            ),
            drain_s=seconds(settings.drain, "drain"),
            timeout_keep_alive=round(_KEEP_ALIVE_S),
            proxy_headers=False,
        )

    def _signature(self) -> Signature:
        """Return the signature of the model, which is called to find the number of classes."""
        setup = self.setup
        if not setup.rotating:
            refuse_damaged(self._pristine, setup.shape, self.device, symbols=self._of_symbols)
        if isinstance(vote := self._pristine.net, MaskedVote):
            vote.refuse_random()
        begin = time.perf_counter()
        classes = self._n_classes(self._pristine)
        self._row_s = time.perf_counter() - begin
        settings, bounds = setup.settings, self._pristine.bounds
        return Signature(
            setup.name,
            () if self._of_symbols else setup.shape,
            classes,
            bounds,
            settings.model_version,
            settings.max_rows,
            input_type="BYTES" if self._of_symbols else "FP32",
            sampling_rate=settings.sampling_rate,
            certified_patch=str(vote.mask_set.patch) if isinstance(vote, MaskedVote) else None,
            kind=settings.inputs or "numbers",
            lengths=(shortest_file(self._pristine.net), setup.shape[0]) if self._of_symbols else (1, 1),
        )

    @property
    def _of_symbols(self) -> bool:
        """Whether inputs are files or texts."""
        return self.setup.settings.inputs in ("files", "texts")

    def _n_classes(self, model: Classifier) -> int:
        """Return the number of classes, after a first forward pass, which is the slowest one."""
        return int(self._logits_of_one(model).shape[1])

    def _logits_of_one(self, model: Classifier) -> Tensor:
        """Return the logits (1, classes) of the input with the smallest values, or of a row of letters."""
        low = FIRST_LETTER if self._of_symbols else self._pristine.bounds.low
        x = torch.zeros(1, *self.setup.shape) + (low if isinstance(low, float | int) else low.cpu())
        with torch.inference_mode():
            logits: Tensor = model(x.float().to(self.device))
        return logits

    def _seen(self, rows: int, seconds: float) -> None:
        """Count a batch, before its answers are sent."""
        self.telemetry.observe("holdfast_batch_rows", rows)
        self.telemetry.observe("holdfast_batch_seconds", seconds)
        if self.chain is not None:
            lost = self.chain.lost_in_total
            self.telemetry.count("holdfast_audit_lost_total", n=lost - self._lost)
            if lost > self._lost:
                self.errors(
                    "requests are answered without audit records, which cannot be written", advice=_SPACE
                )
            self._lost = lost
        if isinstance(self.answering.guard, GuardPipeline):
            observed = self.answering.guard.observed
            counts = observed.n, observed.alarms
            for name, now, before in zip(_OBSERVED, counts, self._observed, strict=True):
                self.telemetry.count(name, n=now - before)
            self._observed = counts

    # --- messages of the supervisor

    def take(self, message: messages.ToWorker) -> None:
        """Do what a message of the supervisor states."""
        match message:
            case messages.Prepare():
                self._prepare(message)
            case messages.Activate():
                self.answering.served = self._prepared[message.epoch]
                self._prepared = {}
            case messages.Serve():
                self.answering.served = ServedSet(self._pristine, message.name, message.epoch)
            case messages.AnnounceEnd():
                self.announce_end()
            case messages.SendSamples():
                self.send(self.sampled.answer(message.number))
            case messages.SampleInputs():
                self.sampled.limit(message.most_bytes)
            case messages.Drain():
                self.drain(last=message.last)

    def _prepare(self, message: messages.Prepare) -> None:
        """Load a parameter set into a copy of the network, and report whether it can serve. The supervisor has tested
        it on the canary inputs.
        """
        try:
            model = loaded(self._pristine, safetensors.torch.load(message.weights), message.name)
            self._n_classes(model)
        except HoldfastError as error:
            self.send(messages.Unusable(message.epoch, error.on_command_line()))
            return
        self._prepared[message.epoch] = ServedSet(model, message.name, message.epoch)
        self.send(messages.Loaded(message.epoch))

    # --- progress

    @property
    def patience_s(self) -> float:
        """Seconds without progress after which this worker is to be replaced."""
        row_s = self.batcher.row_s or self._row_s
        return max(self.setup.hung_s, _SLOW * self.setup.settings.max_rows * row_s)

    @property
    def stalled(self) -> str:
        """What makes no progress: the loop of the server or a batch; empty if both do."""
        if time.monotonic() - self._beat_s > self.patience_s:
            return "the event loop"
        return "a batch" if self.batcher.busy_s > self.patience_s else ""

    # --- reports

    def report(self) -> None:
        """Set the gauges, and send the counts of answers and the state to the supervisor."""
        readiness = self.served.readiness
        failures = readiness.failures
        for check in readiness.checks:
            self.telemetry.set("holdfast_not_ready", check.reason in failures, check.reason)
            if check.reason == "audit":
                self.telemetry.set("holdfast_audit_failing", bool(check.failure))
        self.telemetry.set("holdfast_connections", len(self.server.server_state.connections))
        self.telemetry.set("holdfast_waiting_inputs", self.batcher.waiting)
        if self.served.keys is not None:
            self.telemetry.set("holdfast_keys_failing", bool(self.served.keys.failure))
        if self.profile is not None:
            self.profile.report(self.telemetry)
        self.send(
            messages.Report(
                self.ledger.taken(),
                self.stalled,
                self.patience_s,
                None if self.chain is None else self.chain.flushed,
                {
                    check.reason: messages.FailingCheck(failure, check.refuses)
                    for check in readiness.checks
                    if (failure := check.failure)
                },
                readiness.unprobed_s,
            )
        )
        # answers of a pool are reported more often, and each report for the monitor takes milliseconds
        if self.reservoir is None or time.monotonic() < self._next_observed_s:
            return
        self._next_observed_s = time.monotonic() + _REPORT_S
        if (observations := self.reservoir.taken()) is not None:
            self.send(observations)

    def _observe(self, outcomes: Sequence[Outcome], served: ServedSet) -> None:
        assert self.reservoir is not None, "there is a monitor"
        self.reservoir.add(outcomes)
        self.sampled.add(outcomes, served)

    def send(self, message: messages.FromWorker) -> None:
        """Send a message to the supervisor."""
        messages.send_to_supervisor(self._send, message)

    def _report_often(self) -> None:
        while True:
            self.ledger.arrived.wait(_REPORT_S)
            self.ledger.arrived.clear()
            self.report()
            time.sleep(_HASTE_S)

    def _flush_often(self) -> None:
        """Flush the audit chain, in a thread of its own because a slow disk must not delay the reports."""
        while self.chain is not None:
            with suppress(OSError):  # the next write reports it
                self.chain.flush()
            time.sleep(_REPORT_S)

    # --- service

    def run(self, listener: socket.socket) -> None:
        """Answer requests until `drain` is called, and then those that were received before."""
        self.served.readiness.start()
        # A full collection visits every object of torch and of the model, which takes 0.1 s; these objects stay.
        gc.freeze()
        gc.set_threshold(_YOUNG)
        for repeated in (self._report_often, self._flush_often):
            threading.Thread(target=repeated, daemon=True).start()
        with asyncio.Runner(
            loop_factory=self.server.config.get_loop_factory()
        ) as runner:  # uvloop if installed
            runner.run(self._serve(listener))
        self.batcher.close()
        self._close_states()
        self._next_observed_s = 0.0  # the last observations are reported as well
        self.report()
        if self.chain is not None:
            self.chain.close()
        self.send(messages.Drained())

    def _close_states(self) -> None:
        """Close the files of the states, so that the last worker removes the logs beside them."""
        guard = self.answering.guard
        if isinstance(guard, GuardPipeline) and isinstance(guard.queries, QueryRule):
            guard.queries.detector.state.close()
        if self._limits is not None:
            self._limits.close()

    async def _serve(self, listener: socket.socket) -> None:
        serving = asyncio.create_task(self.server.serve([listener]))
        while not self.server.started and not serving.done():
            await asyncio.sleep(0.005)
        self.send(messages.Ready())
        beating = asyncio.create_task(self._beat(listener))
        await serving
        beating.cancel()
        self._beat_s = math.inf

    async def _beat(self, listener: socket.socket) -> None:
        """Give signs of life. To drain, stop accepting connections, and close those that are idle after a while: a
        client may have sent a request over one of them. If the whole server ends, the connections that the system has
        accepted for it are accepted first.
        """
        until, refusing = math.inf, False
        while True:
            now = self._beat_s = time.monotonic()
            accepted = now > until - _LINGER_S + _ACCEPTED_S  # connections that were accepted just before
            if now >= until or (accepted and not self.server.server_state.connections):
                self.server.should_exit = True
            if self._leaving.is_set() and until == math.inf:
                if self._last and not refusing:
                    refuse_connections(listener)
                    refusing = True
                    await asyncio.sleep(_BEGUN_S)
                elif not (refusing and _has_pending(listener)):
                    until = now + _LINGER_S
                    for server in self.server.servers:
                        server.close()
            await asyncio.sleep(_SHORT_BEAT_S if self._leaving.is_set() else _BEAT_S)

    def announce_end(self) -> None:
        """Answer probes that the server is not ready, and close each connection after its next response."""
        self.served.readiness.draining = self.served.closing = True

    def drain(self, *, last: bool) -> None:
        """Accept no further connections, answer what was received, and end. `last` states whether the whole server
        ends, so that its socket, which all workers share, accepts no connections any more.
        """
        self.served.closing = True
        self._last = last
        self._leaving.set()


def _has_pending(listener: socket.socket) -> bool:
    """Return whether a connection at a listening socket was not accepted yet."""
    poll = select.poll()  # select.select supports only small descriptors
    poll.register(listener, select.POLLIN)
    return bool(poll.poll(0))


def main(inbox: int, outbox: int, listener: int, counters: int) -> int:
    """Run a worker with the pipes to the supervisor, the socket and the memory of the metrics at these file
    descriptors. Return the exit code.
    """
    sys.setswitchinterval(_SWITCH_S)
    # Ctrl-C is sent to all processes of a terminal; the supervisor handles it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
    log_to_stderr("text")  # until the setup has arrived
    return serve_parent(inbox, outbox, lambda tasks, pipe, send: _run(tasks, listener, counters, send))


def _run(tasks: IO[bytes], listener: int, counters: int, send: Send) -> None:
    content = read_message(tasks)
    if content is None:
        return
    try:
        # sent by the process that started this one
        setup, chain = pickle.loads(content)  # noqa: S301
    except Exception as error:
        raise unshared(error) from error
    log_to_stderr(setup.settings.log_format)
    if setup.threads is not None:
        torch.set_num_threads(setup.threads)
    worker = Worker(setup, chain, send, mmap(counters, MEMORY_BYTES))
    if not setup.rotating:
        worker.send(messages.Opened(worker.digest, worker.served.signature.classes))
    if not _served(worker, tasks):
        return
    threading.Thread(target=_follow, args=(worker, tasks), daemon=True).start()
    worker.run(socket.socket(fileno=listener))


def _served(worker: Worker, tasks: IO[bytes]) -> bool:
    """Take messages until a model or a set serves, and return whether one does. They are those of the process that
    started this one.
    """
    while (content := read_message(tasks)) is not None:
        message: messages.ToWorker = pickle.loads(content)  # noqa: S301
        if isinstance(message, messages.Drain):
            return False
        worker.take(message)
        if isinstance(message, messages.Activate | messages.Serve):
            return True
    return False


def _follow(worker: Worker, tasks: IO[bytes]) -> None:
    while (content := read_message(tasks)) is not None:
        try:
            worker.take(pickle.loads(content))  # noqa: S301
        except (KeyError, ValueError, RuntimeError) as error:
            raise TargetError(f"the supervisor sent an invalid message: {error}") from error
    worker.announce_end()
    worker.drain(last=True)
    # The supervisor may have been killed. Its successor waits until this process has ended, which must not take longer
    # than the drain even if the model hangs.
    time.sleep(seconds(worker.setup.settings.drain, "drain") + _ENDING_S)
    os._exit(1)
