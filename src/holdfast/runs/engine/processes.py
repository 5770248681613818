"""Worker processes that measure the shards of a run. They are started when needed, and replaced if they end."""

import json
import math
import os
import pickle
import queue
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import safetensors.torch

from holdfast.core.errors import (
    HoldfastError,
    Remedy,
    TargetError,
    UsageError,
    failure_from_json,
    failure_to_json,
)
from holdfast.core.evidence import Columns, Seconds
from holdfast.runs.engine.run import DEATHS, ERRORS, Measure, Moved, Run, Stopwatch, Task

_START = """\
import os, sys
inbox, outbox = os.dup(0), os.dup(1)
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
os.dup2(2, 1)
sys.path[:] = sys.argv[1:]
from {module} import main
sys.exit(main(inbox, outbox, *{arguments}))
"""
"""Code of a child process, which sets `sys.path` before any import of a library."""
_BEGINNING = b"\0holdfast worker\0"
"""First bytes of the messages of a child. All output of Python before them, such as from a `sitecustomize`, is
skipped."""
_LENGTH = struct.Struct("<Q")
"""Format of the number of bytes that precedes each message."""
_READ_S = 1.0
"""Seconds in which the last messages of a child that has ended are read."""
Send = Callable[[bytes, Any], None]
"""Function that sends the kind of a message, one letter, and its content as JSON."""


class Child:
    """A child process that runs `main(inbox, outbox, *arguments)` of a module, with a thread that reads its messages
    and one that writes those to it, which could block until the child has imported its libraries.

    `received` is called with each message of the child, and with an empty one at the end of its pipe.
    """

    def __init__(
        self, module: str, received: Callable[[bytes], object], *arguments: int, **options: Any
    ) -> None:
        # a session of its own, since Ctrl-C is handled by this process, which ends its children
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START.format(module=module, arguments=arguments), *import_path()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            **options,
        )
        self._received = received
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        threading.Thread(target=self._write, daemon=True).start()

    def has_ended(self) -> bool:
        """Return whether the process has ended. If it has, `received` was called with its last messages, unless another
        process keeps its pipe open for longer than a second.
        """
        if self.process.poll() is None:
            return False
        self._reader.join(_READ_S)
        return True

    def send(self, content: bytes) -> None:
        """Send a message to the child."""
        self._outgoing.put(content)

    def close(self) -> None:
        """Close the pipe to the child after the messages that were sent."""
        self._outgoing.put(None)

    def _read(self) -> None:
        assert self.process.stdout is not None
        try:
            with suppress(OSError, ValueError), self.process.stdout as pipe:
                _skip_to(_BEGINNING, pipe)
                while (message := read_message(pipe)) is not None:
                    self._received(message)
        finally:
            self._received(b"")

    def _write(self) -> None:
        assert self.process.stdin is not None
        # the end of the child is noticed by the thread that reads
        with suppress(OSError), self.process.stdin as pipe:
            while (content := self._outgoing.get()) is not None:
                write_message(pipe, content)


def serve_parent(inbox: int, outbox: int, work: Callable[[IO[bytes], IO[bytes], Send], object]) -> int:
    """Call `work` in a child process with its two pipes and a function that sends messages, and return the exit code.
    An error is sent to the parent as a message of the kind E, with its remedies.
    """
    lock = threading.Lock()
    # unbuffered: a buffer would be written again when it is closed, and is locked while a thread reads into it
    with os.fdopen(inbox, "rb", buffering=0) as tasks, os.fdopen(outbox, "wb", buffering=0) as pipe:

        def send(kind: bytes, content: Mapping[str, Any]) -> None:
            # the end of the parent is noticed by the thread that reads
            message = kind + json.dumps(content).encode()
            with lock, suppress(BrokenPipeError, ValueError):  # a closed pipe, as the process ends
                write_message(pipe, message)

        with suppress(BrokenPipeError):
            pipe.write(_BEGINNING)
        try:
            work(tasks, pipe, send)
        except HoldfastError as error:
            send(b"E", failure_to_json(error))
        except Exception:  # noqa: BLE001 - the parent raises or reports it
            message = f"a worker failed:\n{traceback.format_exc()}"
            send(b"E", failure_to_json(HoldfastError(message)))
        else:
            return 0
    return 1


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
    """Write a message and its length to the pipe between two processes."""
    for part in (_LENGTH.pack(len(content)), content):
        left = memoryview(part)
        while left:  # an unbuffered file may write a part
            left = left[file.write(left) :]
    file.flush()


def _skip_to(beginning: bytes, file: IO[bytes]) -> None:
    """Read and discard the bytes of a pipe until the bytes `beginning` were read, or until the end of the pipe."""
    last = b""
    while last != beginning and (byte := file.read(1)):
        last = (last + byte)[-len(beginning) :]


def read_message(file: IO[bytes]) -> bytes | None:
    """Return the next message from a pipe, or None if the pipe ends before the message is complete."""
    head = _read(file, _LENGTH.size)
    return None if head is None else _read(file, _LENGTH.unpack(head)[0])


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
        self, run: Run, stage: str, tasks: Mapping[int, Task], until: float, moved: Moved
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
            moved(sum(finished.values()), 0)  # a shard has one batch, and is counted when it is stored
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
