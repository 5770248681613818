"""A worker process that measures shards of a run. It reads tasks from a pipe and writes columns to another pipe.

It ends when the pipe is closed, which happens whenever the process of the run ends. The first letter of a message is
its kind: R ready, T time and progress, S batch split, C columns, L out of time, E error.
"""

import os
import pickle
import queue
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import IO, Any

import safetensors.torch
import torch

from holdfast.core.meter import Room
from holdfast.runs.engine.processes import Send, Setup, read_message, serve_parent, unshared, write_message
from holdfast.runs.engine.run import Measure, OutOfTime, Task

_REPORTED_S = 1.0
"""Interval in seconds at which time and progress are sent."""


def main(inbox: int, outbox: int) -> int:
    """Measure the tasks that arrive at the file descriptor `inbox` until its end, write the results to `outbox`, and
    return the exit code of the process.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    return serve_parent(inbox, outbox, lambda tasks, pipe, send: _serve(_Driver(tasks), pipe, send))


@dataclass
class _Driver:
    """The pipe from the process of the run. At its end this process ends, at once if it is `busy` with a shard."""

    tasks: IO[bytes]
    busy: bool = False
    _messages: "queue.Queue[bytes | None]" = field(default_factory=queue.Queue)

    def __post_init__(self) -> None:
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while (message := read_message(self.tasks)) is not None:
            self._messages.put(message)
        if self.busy:
            os._exit(1)
        self._messages.put(None)

    def next(self) -> Any:
        """Return the next object that was sent to the worker process, or None at the end of the pipe."""
        message = self._messages.get()
        # sent by the process that started this one
        return None if message is None else pickle.loads(message)  # noqa: S301


def _serve(driver: _Driver, pipe: IO[bytes], send: Send) -> None:
    try:
        setup: Setup | None = driver.next()
    except Exception as error:
        raise unshared(error) from error
    if setup is None:
        return
    with ExitStack() as stack:
        try:
            measure = stack.enter_context(setup())
        except ModuleNotFoundError as error:  # a module of a script, which a worker does not run
            raise unshared(error) from error
        send(b"R", {})
        while (message := driver.next()) is not None:
            driver.busy = True
            _measure(pipe, send, measure, *message)
            driver.busy = False


def _measure(
    pipe: IO[bytes],
    send: Send,
    measure: Measure,
    task: Task,
    size: int,
    splits: dict[int, int],
    left_s: float,
) -> None:
    """Measure a task, and send its columns, or that time ran out."""
    cpu, wall, examples = time.process_time(), time.perf_counter(), 0
    until = wall + left_s

    def send_time() -> None:
        nonlocal cpu, wall, examples
        now = time.process_time()
        send(b"T", {"cpu_s": now - cpu, "examples": examples})
        cpu, wall, examples = now, time.perf_counter(), 0

    def progress(n: int) -> None:
        nonlocal examples
        examples += n
        if time.perf_counter() - wall >= _REPORTED_S:
            send_time()

    def halved(row: int, size: int) -> None:
        send(b"S", {"row": row, "size": size})

    try:
        columns = measure(task, Room(size, splits, halved, progress), until)
    except OutOfTime:
        send_time()
        send(b"L", {})
        return
    send_time()
    write_message(
        pipe, b"C" + safetensors.torch.save({name: x.contiguous().clone() for name, x in columns.items()})
    )
