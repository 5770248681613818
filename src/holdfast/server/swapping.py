"""Swaps of the parameter sets of a pool while its server runs: the steps that the supervisor takes with its workers."""

import math
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from holdfast.core.errors import TargetError
from holdfast.runs.engine.progress import Notify
from holdfast.server.live_pool import LivePool, NextSet
from holdfast.server.telemetry import Telemetry
from holdfast.server.worker_processes import WorkerProcess

_POOL_S = 0.5
"""seconds between two reads of the ledger, which other processes may change"""
_LOADING_S = 120.0
"""seconds in which a worker must load a set before it is replaced"""


class Record(Protocol):
    """Protocol of the function that adds a record to the audit chain of the supervisor."""

    def __call__(self, kind: str, **facts: Any) -> None:
        """Add a record."""


@dataclass(eq=False)
class _Swap:
    """A swap in progress: the next set, its test, and the workers that have not loaded it yet."""

    following: NextSet
    test: Future[None]
    """test of the set on the canary inputs"""
    waiting: set[WorkerProcess] | None = None
    """workers that have not loaded it; None before the test is done"""
    sent_s: float = math.inf


def lower_priority() -> None:
    """Give this thread the processor only where no other thread needs it, so that it delays no request."""
    if sys.platform == "linux":  # elsewhere the priority is that of the whole process
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


class PoolSwaps:
    """The serving set of a pool and the swap in progress. `workers` is the list of the supervisor, which changes it.

    The first set begins to serve. Raises `Inconclusive` and `TargetError` if there is none that can serve.
    """

    def __init__(
        self,
        pool: LivePool,
        workers: Sequence[WorkerProcess],
        telemetry: Telemetry,
        record: Record,
        notify: Notify,
    ) -> None:
        self.pool, self._workers = pool, workers
        self._telemetry, self._record, self._notify = telemetry, record, notify
        self._tests = ThreadPoolExecutor(1, "test", lower_priority)
        self._swap: _Swap | None = None
        self._looked_s = 0.0
        self.serving = pool.first()
        record("set", set=self.serving.name, epoch=self.serving.epoch)

    def request(self, why: str) -> None:
        """Swap as soon as possible. May be called by any thread."""
        self.pool.request_swap(why)
        self._looked_s = 0.0

    def introduce(self, worker: WorkerProcess) -> None:
        """Send the serving set to a new worker."""
        worker.child.send(self.serving.message)
        worker.child.send(b"A" + str(self.serving.epoch).encode())

    def joined(self, worker: WorkerProcess) -> None:
        """Send the next set to a worker that became ready during a swap."""
        if self._swap is not None and self._swap.waiting is not None:
            self._swap.waiting.add(worker)
            self._swap.sent_s = time.monotonic()  # it has as much time as the others had
            worker.child.send(self._swap.following.message)

    def left(self, worker: WorkerProcess) -> None:
        """Do not wait for a worker that has ended."""
        if self._swap is not None and self._swap.waiting is not None:
            self._swap.waiting.discard(worker)

    def answered(self, answers: Sequence[tuple[str, int, Mapping[str, int]]]) -> None:
        """Count answers that a worker reports."""
        for _, epoch, principals in answers:
            self.pool.answered(int(epoch), {str(k): int(n) for k, n in principals.items()})
        self._looked_s = 0.0 if answers else self._looked_s

    def poll(self) -> None:
        """Write answers to the ledger, and begin the next swap if one is due."""
        pool, now = self.pool, time.monotonic()
        if self._swap is not None:
            self._pass_on(self._swap, now)
        if now - self._looked_s < _POOL_S:
            return
        self._looked_s = now
        pool.write()
        if self._swap is None and any(worker.ready for worker in self._workers):
            before = pool.alarm
            following = pool.due(self.serving)
            if pool.alarm and pool.alarm != before:
                self._notify(f"note: alarm {pool.alarm}: {pool.reason}")
            if following is not None:
                self._swap = _Swap(following, self._tests.submit(pool.test, following))
        for reason in ("empty", "limit", "error"):
            self._telemetry.set("holdfast_pool_alarm", pool.alarm == reason, reason)
        self._telemetry.set("holdfast_pool_epoch", self.serving.epoch)
        self._telemetry.set("holdfast_pool_waiting", len(pool.pool.ahead))

    def _pass_on(self, swap: _Swap, now: float) -> None:
        """Send the next set to the workers once its test is done, and replace workers that do not load it in time."""
        if swap.waiting is None and swap.test.done():
            error = swap.test.exception()
            if error is not None:
                self._refuse(swap, str(error))
                return
            swap.waiting, swap.sent_s = {worker for worker in self._workers if worker.ready}, now
            for worker in swap.waiting:
                worker.child.send(swap.following.message)
        elif now - swap.sent_s > _LOADING_S:
            for worker in swap.waiting or ():
                worker.kill(f"it did not load the set within {_LOADING_S:g} s")

    def _refuse(self, swap: _Swap, reason: str) -> None:
        self._swap = None
        self._notify(f"note: {reason}")
        self.pool.refuse(swap.following, reason)

    def loaded(self, worker: WorkerProcess, epoch: int) -> None:
        """Note that a worker has loaded the next set. When all have, the ledger records it and they serve it."""
        swap, pool = self._swap, self.pool
        if swap is None or swap.waiting is None or epoch != swap.following.epoch:
            return
        swap.waiting.discard(worker)
        if swap.waiting:
            return
        self._swap = None
        pool.write(now=True)
        if not pool.commit(swap.following, self.serving):
            return  # the prepared set is replaced by the next one
        self.serving = swap.following
        for each in self._workers:
            each.child.send(b"A" + str(epoch).encode())
        self._telemetry.count("holdfast_swaps_total")
        self._record("set", set=swap.following.name, epoch=epoch, why=swap.following.why)
        self._notify(
            f"{swap.following.name} serves as epoch {epoch}: {swap.following.why or 'swapped elsewhere'}"
        )

    def unusable(self, worker: WorkerProcess, epoch: int, reason: str) -> None:
        """Refuse a set that a worker cannot load."""
        if self._swap is not None and epoch == self._swap.following.epoch:
            self._refuse(self._swap, reason)
        elif not worker.ready:  # the serving set itself cannot be loaded by a new worker
            worker.error = TargetError(reason)
            worker.child.process.kill()

    def end(self) -> None:
        """Write the last answers to the ledger."""
        self._tests.shutdown(wait=False, cancel_futures=True)
        self.pool.write(now=True)

    def status(self) -> dict[str, Any]:
        """Return the state for the operator."""
        return {
            "set": self.serving.name,
            "epoch": self.serving.epoch,
            "alarm": self.pool.alarm,
            "reason": self.pool.reason,
        }
