"""The supervisor of a server: it binds the sockets, starts and replaces workers, swaps parameter sets, and drains.

It alone opens the pool with its key, and the folder of audit chains. It serves metrics and the requests of the operator
on a port of their own.
"""

import json
import math
import os
import pickle
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from holdfast.core.errors import HoldfastError, TargetError, UsageError
from holdfast.engine.executor import ERRORS
from holdfast.engine.processes import unshared
from holdfast.engine.progress import Notify, ignore
from holdfast.serving.audit_folder import AuditFolder
from holdfast.serving.live_pool import LivePool, NextSet
from holdfast.serving.telemetry import MetricTotals, Telemetry
from holdfast.serving.worker import ServingSetup
from holdfast.serving.worker_processes import Inbox, WorkerProcess, bound_socket

_TICK_S = 0.1
"""largest time between two looks at workers and triggers"""
_POOL_S = 0.5
"""seconds between two reads of the ledger, which other processes may change"""
_DEATHS = 3
"""number of deaths of workers before any was ready after which the server gives up"""
_KILLED_S = 5.0
"""seconds that a worker gets to end after it drained, before it is killed"""
_BEGIN_S = 10.0
"""seconds until a worker that could not be started is started again"""
_LOADING_S = 120.0
"""seconds in which a worker must load a set before it is replaced"""


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


@dataclass(eq=False)
class _Swap:
    """A swap in progress: the next set, its test, and the workers that have not loaded it yet."""

    following: NextSet
    test: Future[None]
    """test of the set on the canary inputs"""
    waiting: set[WorkerProcess] | None = None
    """workers that have not loaded it; None before the test is done"""
    sent_s: float = math.inf


def _lower_priority() -> None:
    """Give this thread the processor only where no other thread needs it, so that a test delays no request."""
    if sys.platform == "linux":  # elsewhere the priority is that of the whole process
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


class Supervisor:
    """A server: `start` returns when it answers requests, `run` keeps it running until `stop` is called."""

    def __init__(self, setup: ServerSetup, notify: Notify = ignore) -> None:
        if os.name == "nt":
            raise UsageError("serve needs Linux or macOS: worker processes share a socket; use a container")
        self.setup, self._notify = setup, notify
        try:
            self._pickled: Callable[[Path | None], bytes] = lambda chain: pickle.dumps((setup.worker, chain))
            self._pickled(None)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise unshared(error) from error
        self.totals, self.telemetry = MetricTotals(), Telemetry()
        self._inbox: Inbox = queue.SimpleQueue()
        self._workers: list[WorkerProcess] = []
        self._number = self._early_deaths = 0
        self._serving: NextSet | None = None
        self._tests = ThreadPoolExecutor(1, "test", _lower_priority)
        self._swap: _Swap | None = None
        self._looked_s = self._begin_s = 0.0
        self._owed_workers = 0
        self._stopping = False
        self._audit: AuditFolder | None = None
        self._listener: socket.socket | None = None
        self.address, self.admin_address = ("", 0), ("", 0)

    # --- life

    def start(self, *, timeout_s: float = 300.0) -> None:
        """Bind the sockets, start all workers, and wait until they answer requests.

        Raises the error of a worker that cannot open the model, and `TargetError` if workers die before.
        """
        setup = self.setup
        self._listener = bound_socket(setup.host, setup.port)
        self.address = self._listener.getsockname()[:2]
        try:
            if setup.audit is not None:
                fail_open = setup.worker.audit_fails_open
                self._audit = AuditFolder.open(setup.audit, setup.about, fail_open=fail_open)
                if self._audit.recovered:
                    self.telemetry.count("holdfast_interrupted_total", n=self._audit.recovered)
            if setup.pool is not None:
                self._serving = setup.pool.first()
                self._record("set", set=self._serving.name, epoch=self._serving.epoch)
            for _ in range(setup.workers):
                self._start_worker()
            until = time.monotonic() + timeout_s
            while not all(worker.ready for worker in self._workers):
                self._step()
                if time.monotonic() > until:
                    raise TargetError(f"the workers were not ready within {timeout_s:g} s; check the model")
        except BaseException:
            self._end()
            raise

    def run(self) -> None:
        """Supervise until `stop` is called or SIGTERM or SIGINT arrives, then drain. A second signal kills the
        workers.
        """
        with self._signals():
            try:
                while not self._stopping:
                    self._step()
                self._drain()
            finally:
                self._end()

    def stop(self) -> None:
        """Let `run` drain and return. May be called by any thread and by a signal handler."""
        self._stopping = True
        self._inbox.put((None, b""))

    def request_swap(self, why: str) -> None:
        """Swap the parameter set as soon as possible. May be called by any thread."""
        if self.setup.pool is None:
            raise UsageError("the server has no pool, so there is no other set; serve one with rotating:POOL")
        self.setup.pool.request_swap(why)
        self._looked_s = 0.0
        self._inbox.put((None, b""))

    @contextmanager
    def _signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: FrameType | None) -> None:
            if self._stopping:
                self._kill()
            self.stop()

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    # --- one step

    def _step(self) -> None:
        """Handle the messages that arrived, then look at the pool."""
        with suppress(queue.Empty):
            worker, message = self._inbox.get(timeout=_TICK_S)
            while True:
                if worker is not None:
                    self._receive(worker, message)
                worker, message = self._inbox.get_nowait()
        for worker in list(self._workers):
            if worker.process.poll() is not None and worker.ended is None and not worker.ready:
                self._receive(worker, b"")
        self._start_owed()
        self._rotate()
        self.telemetry.set("holdfast_workers", sum(worker.ready for worker in self._workers))
        self.totals.add("supervisor", self.telemetry.report())

    def _receive(self, worker: WorkerProcess, message: bytes) -> None:
        if worker not in self._workers:
            return
        try:
            self._take(worker, message[:1], message[1:])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self._notify(f"note: {worker.name} sent an invalid message and is replaced: {error}")
            worker.process.kill()

    def _take(self, worker: WorkerProcess, kind: bytes, text: bytes) -> None:
        if not kind:
            self._replace(worker)
            return
        content = json.loads(text)
        match kind:
            case b"R":
                worker.ready, self._early_deaths = True, 0
                if self._swap is not None and self._swap.waiting is not None:
                    self._swap.waiting.add(worker)
                    worker.send(self._swap.following.message)
            case b"T":
                self.totals.add(worker.name, content["metrics"])
                if self.setup.pool is not None:
                    for _, epoch, principals in content["answers"]:
                        self.setup.pool.answered(int(epoch), {str(k): int(n) for k, n in principals.items()})
                    self._looked_s = 0.0 if content["answers"] else self._looked_s
            case b"L":
                self._loaded(worker, int(content["epoch"]))
            case b"U":
                self._unusable(worker, int(content["epoch"]), str(content["reason"]))
            case b"E":
                worker.error = content
            case b"X":
                worker.ended = content

    # --- workers

    def _start_worker(self) -> None:
        assert self._listener is not None
        chain = None if self._audit is None else self._audit.new_worker()
        self._number += 1
        worker = WorkerProcess.begin(self._number, self._listener, self._inbox, chain)
        worker.send(self._pickled(chain))
        if self._serving is not None:
            worker.send(self._serving.message)
            worker.send(b"A" + str(self._serving.epoch).encode())
        self._workers.append(worker)

    def _replace(self, worker: WorkerProcess) -> None:
        """Remove a worker that has ended, complete its audit chain, and start another one unless the server stops."""
        worker.process.kill()
        code = worker.process.wait()
        worker.close()
        self._workers.remove(worker)
        self.totals.forget(worker.name)
        if self._swap is not None and self._swap.waiting is not None:
            self._swap.waiting.discard(worker)
        interrupted = self._close_chain(worker, "drained" if worker.ended is not None else "the worker died")
        if worker.ended is not None or self._stopping:
            return
        if worker.error is not None:
            raise ERRORS.get(worker.error["error"], HoldfastError)(worker.error["message"])
        self._early_deaths += not worker.ready
        if self._early_deaths >= _DEATHS:
            raise TargetError(
                f"workers died {_DEATHS} times before they were ready, the last time with status {code}; if memory "
                "ran out, use fewer --workers"
            )
        self.telemetry.count("holdfast_worker_restarts_total")
        note = f", {interrupted} requests were interrupted" if interrupted else ""
        self._notify(f"note: {worker.name} ended with status {code}{note}; it is replaced")
        self._owed_workers += 1
        self._start_owed()

    def _start_owed(self) -> None:
        """Start workers in the place of those that ended; later if a chain cannot be begun, as on a full disk."""
        while self._owed_workers and not self._stopping and time.monotonic() >= self._begin_s:
            try:
                self._start_worker()
            except TargetError as error:
                self._begin_s = time.monotonic() + _BEGIN_S
                self._notify(f"note: a worker cannot be started: {error}")
                return
            self._owed_workers -= 1

    def _close_chain(self, worker: WorkerProcess, reason: str) -> int:
        if self._audit is None or worker.chain is None:
            return 0
        try:
            interrupted = self._audit.ended(worker.chain, reason=reason)
        except (HoldfastError, OSError) as error:
            self._notify(f"note: the audit chain of {worker.name} could not be completed: {error}")
            return 0
        self.telemetry.count("holdfast_interrupted_total", n=interrupted)
        return interrupted

    def _record(self, kind: str, **facts: Any) -> None:
        if self._audit is not None:
            try:
                self._audit.record(kind, **facts)
            except TargetError as error:
                self._notify(f"note: {error}")

    # --- swaps

    def _rotate(self) -> None:
        """Write answers to the ledger, and begin the next swap if one is due."""
        pool, serving = self.setup.pool, self._serving
        now = time.monotonic()
        if self._swap is not None:
            self._pass_on(self._swap, now)
        if pool is None or serving is None or self._stopping or now - self._looked_s < _POOL_S:
            return
        self._looked_s = now
        pool.write()
        if self._swap is None and any(worker.ready for worker in self._workers):
            before = pool.alarm
            following = pool.due(serving)
            if pool.alarm and pool.alarm != before:
                self._notify(f"note: alarm {pool.alarm}: {pool.reason}")
            if following is not None:
                self._swap = _Swap(following, self._tests.submit(pool.test, following))
        for reason in ("empty", "limit", "error"):
            self.telemetry.set("holdfast_pool_alarm", pool.alarm == reason, reason)
        self.telemetry.set("holdfast_pool_epoch", serving.epoch)
        self.telemetry.set("holdfast_pool_waiting", len(pool.pool.ahead))

    def _pass_on(self, swap: _Swap, now: float) -> None:
        """Send the next set to the workers once its test is done, and replace workers that do not load it in time."""
        if swap.waiting is None and swap.test.done():
            error = swap.test.exception()
            if error is not None:
                self._refuse(swap, str(error))
                return
            swap.waiting, swap.sent_s = {worker for worker in self._workers if worker.ready}, now
            for worker in swap.waiting:
                worker.send(swap.following.message)
        elif now - swap.sent_s > _LOADING_S:
            for worker in swap.waiting or ():
                worker.process.kill()

    def _refuse(self, swap: _Swap, reason: str) -> None:
        self._swap = None
        self._notify(f"note: {reason}")
        if self.setup.pool is not None:
            self.setup.pool.refuse(swap.following, reason)

    def _loaded(self, worker: WorkerProcess, epoch: int) -> None:
        """Note that a worker has loaded the next set. When all have, the ledger records it and they serve it."""
        swap, pool = self._swap, self.setup.pool
        if swap is None or swap.waiting is None or pool is None or epoch != swap.following.epoch:
            return
        swap.waiting.discard(worker)
        if swap.waiting:
            return
        self._swap = None
        assert self._serving is not None
        pool.write(now=True)
        if not pool.commit(swap.following, self._serving):
            return  # the prepared set is replaced by the next one
        self._serving = swap.following
        for each in self._workers:
            each.send(b"A" + str(epoch).encode())
        self.telemetry.count("holdfast_swaps_total")
        self._record("set", set=swap.following.name, epoch=epoch, why=swap.following.why)
        self._notify(
            f"{swap.following.name} serves as epoch {epoch}: {swap.following.why or 'swapped elsewhere'}"
        )

    def _unusable(self, worker: WorkerProcess, epoch: int, reason: str) -> None:
        if self._swap is None or epoch != self._swap.following.epoch:
            if not worker.ready:  # the serving set itself cannot be loaded by a new worker
                worker.error = {"error": "TargetError", "message": reason}
                worker.process.kill()
            return
        self._refuse(self._swap, reason)

    # --- end

    def _drain(self) -> None:
        """Let the workers answer what they received, and wait for their end."""
        assert self._listener is not None
        self._listener.close()
        for worker in self._workers:
            worker.send(b"D")
        until = time.monotonic() + self.setup.worker.drain_s + _KILLED_S
        while self._workers and time.monotonic() < until:
            self._step()

    def _kill(self) -> None:
        for worker in self._workers:
            worker.process.kill()

    def _end(self) -> None:
        """Kill workers that remain, write the last answers, and close chains and sockets."""
        self._stopping = True
        self._tests.shutdown(wait=False, cancel_futures=True)
        self._kill()
        for worker in list(self._workers):
            with suppress(HoldfastError):
                self._replace(worker)
        if self.setup.pool is not None:
            self.setup.pool.write(now=True)
        if self._audit is not None:
            self._audit.close()
            self._audit = None
        if self._listener is not None:
            self._listener.close()

    # --- state for the operator

    def status(self) -> dict[str, Any]:
        """Return the state of the server for its operator."""
        pool = self.setup.pool
        state: dict[str, Any] = {
            "workers": [
                {"name": worker.name, "pid": worker.process.pid, "ready": worker.ready}
                for worker in list(self._workers)
            ],
            "draining": self._stopping,
        }
        if pool is not None and self._serving is not None:
            state["pool"] = {
                "set": self._serving.name,
                "epoch": self._serving.epoch,
                "alarm": pool.alarm,
                "reason": pool.reason,
            }
        return state
