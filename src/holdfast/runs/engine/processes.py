"""Worker processes that measure the shards of a run. They are started when needed, and replaced if they end
unexpectedly.

The process of the run sends tasks and stores the returned columns; a worker (`worker.py`) writes no files. If a worker
dies, its shard is measured again.
"""

import json
import math
import pickle
import queue
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch

from holdfast.core.errors import TargetError, failure_from_json
from holdfast.core.evidence import Columns, Seconds
from holdfast.runs.engine.children import Child, unshared
from holdfast.runs.engine.executor import DEATHS, ERRORS, Measure, Task
from holdfast.runs.engine.run import Run
from holdfast.runs.engine.store import Stopwatch

Setup = Callable[[], AbstractContextManager[Measure]]
"""Context manager that opens the model and the data in a worker, and yields the function that measures tasks.

It can be pickled.
"""

_WAIT_S = 0.5  # time without messages after which dead workers are looked for and the used time is stored
_AWAITED_S = 1.0
"""Seconds for which the messages of a worker that has ended are still awaited. A child process of it may keep the pipe
open for longer."""


@dataclass(eq=False)
class _Worker:
    """A worker process, and what the process of the run knows about it."""

    messages: "queue.Queue[tuple[_Worker, bytes]]"
    shard: int | None = None
    """the shard that it measures"""
    ready: bool = False
    error: Mapping[str, Any] | None = None
    ended_at: float = math.inf
    """`time.monotonic()` at which the end of the process was noticed"""

    def __post_init__(self) -> None:
        self.child = Child("holdfast.runs.engine.worker", lambda message: self.messages.put((self, message)))

    def has_ended(self) -> bool:
        """Return whether the worker process has ended and enough time has passed to receive its last messages."""
        if self.child.process.poll() is not None and math.isinf(self.ended_at):
            self.ended_at = time.monotonic()
        return time.monotonic() - self.ended_at > _AWAITED_S

    def end(self) -> None:
        """Kill the worker process, and wait for its end."""
        self.child.process.kill()
        self.child.process.wait()
        self.child.close()


@dataclass
class Processes:
    """Executor that measures shards in at most `size` worker processes. Each process opens the model and the data by
    calling `setup`.
    """

    setup: bytes
    """the pickled `Setup` that each worker calls"""
    size: int
    _workers: list[_Worker] = field(default_factory=list)
    _messages: "queue.Queue[tuple[_Worker, bytes]]" = field(default_factory=queue.Queue)
    _deaths: Counter[tuple[str, int]] = field(default_factory=Counter)

    def measure(
        self,
        run: Run,
        stage: str,
        tasks: Mapping[int, Task],
        until: float,
        moved: Callable[[int], None],
    ) -> Iterator[tuple[int, Columns]]:
        """Measure the shards of a stage in worker processes, and yield the index and the columns of each shard when it
        is stored.

        After the deadline `until`, no further shard is started.
        """
        waiting, finished = deque(tasks), dict[int, int]()
        # wall time is that of all workers, and is stored once
        stopwatch = Stopwatch(run.store, stage, next(iter(tasks)), cpu=False)
        while True:
            if time.perf_counter() >= until:
                waiting.clear()
            self._notice_ends()
            self._start(min(self.size, len(waiting) + len(finished)))
            for worker in self._workers:
                if worker.ready and worker.shard is None and waiting and worker.child.process.poll() is None:
                    worker.shard = waiting.popleft()
                    finished[worker.shard] = 0
                    run.store.begin(stage, worker.shard)
                    room = run.room(stage, worker.shard)
                    left_s = until - time.perf_counter()
                    task = tasks[worker.shard], room.size, dict(room.known), left_s
                    worker.child.send(pickle.dumps(task))
            if not waiting and not finished:
                break
            try:
                worker, message = self._messages.get(timeout=_WAIT_S)
            except queue.Empty:
                stopwatch.tick()
                continue
            if worker not in self._workers:  # a message of a worker that was removed
                continue
            columns = self._receive(worker, message, run, stage, finished)
            if columns is not None:
                assert worker.shard is not None
                shard, worker.shard = worker.shard, None
                run.keep(stage, shard, columns)
                del finished[shard]
                yield shard, columns
            elif worker not in self._workers and worker.shard is not None:  # it died
                waiting.appendleft(worker.shard)
                del finished[worker.shard]
            moved(sum(finished.values()))
            stopwatch.tick()
        stopwatch.tick(least=0.0)

    def _receive(
        self, worker: _Worker, message: bytes, run: Run, stage: str, finished: dict[int, int]
    ) -> Columns | None:
        """Handle a message of a worker; returns the columns of a finished shard.

        Raises the error that a worker reports, and `TargetError` after three deaths in the same shard.
        """
        kind, content = message[:1], message[1:]
        if kind == b"C":
            return safetensors.torch.load(content)
        shard = worker.shard
        if kind == b"R":
            worker.ready = True
        elif kind == b"T" and shard is not None:
            times = json.loads(content)
            finished[shard] += times["examples"]
            run.store.spend(stage, shard, Seconds(times["cpu_s"], 0.0), done=False)
        elif kind == b"S" and shard is not None:
            run.split(stage, shard, **json.loads(content))
        elif kind == b"L" and shard is not None:
            worker.shard = None
            del finished[shard]
        elif kind == b"E":
            worker.error = json.loads(content)
        elif not kind:
            self._remove(worker, stage)
        return None

    def _start(self, wanted: int) -> None:
        """Start missing workers."""
        while len(self._workers) < wanted:
            worker = _Worker(self._messages)
            worker.child.send(self.setup)
            self._workers.append(worker)

    def _notice_ends(self) -> None:
        """Handle workers that have ended without closing their pipe, which a child process of theirs may hold open."""
        for worker in self._workers:
            if worker.has_ended():
                self._messages.put((worker, b""))

    def _remove(self, worker: _Worker, stage: str) -> None:
        """Remove a worker that has ended. Raises the error that it reported, or counts its death."""
        self._workers.remove(worker)
        worker.end()
        if worker.error is not None:
            raise failure_from_json(worker.error, ERRORS)
        if worker.ready and worker.shard is None:
            return
        at = ("", -1) if worker.shard is None else (stage, worker.shard)
        self._deaths[at] += 1
        if self._deaths[at] >= DEATHS:
            where = "before it had started" if worker.shard is None else f"on shard {worker.shard} of {stage}"
            raise TargetError(
                f"a worker died {DEATHS} times {where}, the last time with status {worker.child.process.returncode}; "
                "if memory ran out, fewer workers or smaller batches need less"
            )

    def pause(self) -> None:
        """Kill all worker processes and wait for their end, so that their memory is released. A later stage starts new
        ones.
        """
        for worker in self._workers:
            worker.child.process.kill()
        for worker in self._workers:
            worker.end()
        self._workers.clear()


@contextmanager
def worker_processes(setup: Setup, size: int) -> Iterator[Processes]:
    """Context manager that yields an executor with worker processes, which are killed at the end of the context."""
    try:
        content = pickle.dumps(setup)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise unshared(error) from error
    executor = Processes(content, size)
    try:
        yield executor
    finally:
        executor.pause()
