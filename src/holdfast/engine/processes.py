"""Worker processes that measure the shards of a run. They are started when needed, and replaced if they end
unexpectedly.

The process of the run sends tasks and stores the returned columns; a worker (`worker.py`) writes no files. If a worker
dies, its shard is measured again.
"""

import json
import math
import pickle
import queue
import struct
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import safetensors.torch

from holdfast.core.errors import TargetError, UsageError, failure_from_json
from holdfast.core.evidence import Columns, Seconds
from holdfast.core.remedies import Remedy
from holdfast.engine.executor import DEATHS, ERRORS, Measure, Task
from holdfast.engine.run import Run
from holdfast.engine.store import Stopwatch

Setup = Callable[[], AbstractContextManager[Measure]]
"""Context manager that opens the model and the data in a worker, and yields the function that measures tasks.

It can be pickled.
"""

_WAIT_S = 0.5  # time without messages after which dead workers are looked for and the used time is stored
_START = """\
import os, sys
inbox, outbox = os.dup(0), os.dup(1)
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
os.dup2(2, 1)
sys.path[:] = sys.argv[1:]
from holdfast.engine.worker import main
sys.exit(main(inbox, outbox))
"""
"""Code of a worker process. It keeps the pipes for itself, so that neither the libraries and the model nor their child
processes read tasks or write messages, and sets `sys.path` before any import of a library."""
BEGINNING = b"\0holdfast worker\0"
"""First bytes of the messages of a worker. All output of Python before them, such as from a `sitecustomize`, is
skipped."""
LENGTH = struct.Struct("<Q")
"""Format of the number of bytes that precedes each message."""
_AWAITED_S = 1.0
"""Seconds for which the messages of a worker that has ended are still awaited. A child process of it may keep the pipe
open for longer."""


@dataclass(eq=False)
class _Worker:
    """A worker process, with a thread that reads its messages and one that writes its tasks.

    Writing in the thread of the run could block until the worker has imported its libraries.
    """

    process: "subprocess.Popen[bytes]"
    messages: "queue.Queue[tuple[_Worker, bytes]]"
    shard: int | None = None
    """the shard that it measures"""
    ready: bool = False
    error: Mapping[str, Any] | None = None
    ended_at: float = math.inf
    """`time.monotonic()` at which the end of the process was noticed"""
    _outgoing: "queue.SimpleQueue[bytes | None]" = field(default_factory=queue.SimpleQueue)

    def __post_init__(self) -> None:
        for work in (self._read, self._write):
            threading.Thread(target=work, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        try:
            with self.process.stdout as pipe:
                skip_to(BEGINNING, pipe)
                while (message := read_message(pipe)) is not None:
                    self.messages.put((self, message))
        finally:
            self.messages.put((self, b""))

    def _write(self) -> None:
        assert self.process.stdin is not None
        # the end of the worker is noticed by the thread that reads
        with suppress(OSError), self.process.stdin as pipe:
            while (content := self._outgoing.get()) is not None:
                write_message(pipe, content)

    def send(self, content: bytes) -> None:
        """Send a message to the worker process."""
        self._outgoing.put(content)

    def has_ended(self) -> bool:
        """Return whether the worker process has ended and enough time has passed to receive its last messages."""
        if self.process.poll() is not None and math.isinf(self.ended_at):
            self.ended_at = time.monotonic()
        return time.monotonic() - self.ended_at > _AWAITED_S

    def end(self) -> None:
        """Kill the worker process, and wait for its end."""
        self.process.kill()
        self.process.wait()
        self._outgoing.put(None)


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
                if worker.ready and worker.shard is None and waiting and worker.process.poll() is None:
                    worker.shard = waiting.popleft()
                    finished[worker.shard] = 0
                    run.store.begin(stage, worker.shard)
                    room = run.room(stage, worker.shard)
                    left_s = until - time.perf_counter()
                    task = tasks[worker.shard], room.size, dict(room.known), left_s
                    worker.send(pickle.dumps(task))
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
            # a separate session, since Ctrl-C is handled by the process of the run, which ends the workers
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", _START, *import_path()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
            worker = _Worker(process, self._messages)
            worker.send(self.setup)
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
                f"a worker died {DEATHS} times {where}, the last time with status {worker.process.returncode}; if "
                "memory ran out, fewer workers or smaller batches need less"
            )

    def pause(self) -> None:
        """Kill all worker processes and wait for their end, so that their memory is released. A later stage starts new
        ones.
        """
        for worker in self._workers:
            worker.process.kill()
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


def unshared(error: Exception) -> UsageError:
    """Return the error for a model or data that cannot be pickled, and so cannot be sent to a worker process."""
    return UsageError(
        f"a worker process cannot receive the model, the data or an attack ({type(error).__name__}: {error}); define "
        "them in a file that can be imported, or give addresses such as file.py:factory",
        Remedy("workers"),
    )


def import_path() -> list[str]:
    """Return the module search path of a worker process, which is that of this process without the current folder.

    If this process has imported a module from the current folder, as a script may do, the folder is added at the end.
    """
    here = Path.cwd()
    known = [getattr(module, "__dict__", {}) for name, module in list(sys.modules.items()) if "." not in name]
    places = [each.get("__path__") or [each.get("__file__") or ""] for each in known]
    others = [entry for entry in sys.path if entry and Path(entry).absolute() != here]
    imported = any(Path(place).parent == here for of_one in places for place in of_one if place)
    return [*others, str(here)] if imported else others


def write_message(file: IO[bytes], content: bytes) -> None:
    """Write a message and its length to the pipe between the process of a run and a worker process."""
    for part in (LENGTH.pack(len(content)), content):
        left = memoryview(part)
        while left:  # an unbuffered file may write a part
            left = left[file.write(left) :]
    file.flush()


def skip_to(beginning: bytes, file: IO[bytes]) -> None:
    """Read and discard the bytes of a pipe until the bytes `beginning` were read, or until the end of the pipe."""
    last = b""
    while last != beginning and (byte := file.read(1)):
        last = (last + byte)[-len(beginning) :]


def read_message(file: IO[bytes]) -> bytes | None:
    """Return the next message from a pipe, or None if the pipe ends before the message is complete."""
    head = _read(file, LENGTH.size)
    return None if head is None else _read(file, LENGTH.unpack(head)[0])


def _read(file: IO[bytes], n: int) -> bytes | None:
    """The next `n` bytes of a pipe, of which each read may return a part; None if it ends before."""
    parts: list[bytes] = []
    while n:
        part = file.read(n)
        if not part:
            return None
        parts.append(part)
        n -= len(part)
    return b"".join(parts)
