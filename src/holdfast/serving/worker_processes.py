"""A worker process as the supervisor sees it, and the socket that all workers share."""

import math
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast.core.errors import HoldfastError, UsageError
from holdfast.engine.processes import BEGINNING, import_path, read_message, skip_to, write_message
from holdfast.store.encryption import KEY_VARIABLE

_BACKLOG = 2048
_START = """\
import os, sys
inbox, outbox = os.dup(0), os.dup(1)
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
os.dup2(2, 1)
listener, sys.path[:] = int(sys.argv[1]), sys.argv[2:]
from holdfast.serving.worker import main
sys.exit(main(inbox, outbox, listener))
"""
"""Code of a worker process, which keeps the pipes for itself and sets `sys.path` before any import of a library."""


@dataclass(eq=False)
class WorkerProcess:
    """A worker process with a thread that reads its messages and one that writes."""

    number: int
    process: "subprocess.Popen[bytes]"
    inbox: "Inbox"
    chain: Path | None
    generation: int = 0
    """number of reloads of the model before it"""
    set_name: str = ""
    """name of the model that it serves; empty for a pool, whose sets change"""
    ready: bool = False
    error: HoldfastError | None = None
    ended: Mapping[str, Any] | None = None
    """the last message of a worker that drained"""
    retired_s: float = math.inf
    """time at which the supervisor let it drain, because another worker has its place"""
    begun_s: float = field(default_factory=time.monotonic)
    heard_s: float = field(default_factory=time.monotonic)
    """time of its last message"""
    patience_s: float = math.inf
    """seconds without progress after which it is replaced"""
    chain_head: tuple[int, str] | None = None
    """length and head of its audit chain, as it last reported them"""
    stalled: str = ""
    """what makes no progress, as the worker itself reports it"""
    _suspected: bool = False
    killed: str = ""
    """why the supervisor killed it"""
    _outgoing: "queue.SimpleQueue[bytes | None]" = field(default_factory=queue.SimpleQueue)

    def __post_init__(self) -> None:
        for work in (self._read, self._write):
            threading.Thread(target=work, daemon=True).start()

    @classmethod
    def begin(
        cls, number: int, listener: socket.socket, inbox: "Inbox", chain: Path | None
    ) -> "WorkerProcess":
        """Start a process that inherits a listening socket. Its messages are put into `inbox`."""
        # a session of its own, since Ctrl-C is handled by the supervisor
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, str(listener.fileno()), *import_path()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(listener.fileno(),),
            # a worker parses what clients send, so it must not have the key of the pool
            env={name: value for name, value in os.environ.items() if name != KEY_VARIABLE},
            start_new_session=True,
        )
        return cls(number, process, inbox, chain)

    def _read(self) -> None:
        assert self.process.stdout is not None
        with suppress(OSError, ValueError), self.process.stdout as pipe:
            skip_to(BEGINNING, pipe)
            while (message := read_message(pipe)) is not None:
                self.inbox.put((self, message))
        self.inbox.put((self, b""))

    def _write(self) -> None:
        assert self.process.stdin is not None
        with suppress(OSError), self.process.stdin as pipe:
            while (content := self._outgoing.get()) is not None:
                write_message(pipe, content)

    @property
    def name(self) -> str:
        """Name of the worker in metrics."""
        return f"worker-{self.number}"

    def report_progress(self, stalled: str, patience_s: float) -> None:
        """Note what makes no progress by a report of the worker, if the report before it stated it too: after a pause
        of the machine, the first report may be too early.
        """
        self.stalled, self._suspected = stalled if self._suspected else "", bool(stalled)
        if not patience_s < math.inf:
            raise ValueError(f"the patience is {patience_s} s; expected a finite number")
        self.patience_s = patience_s

    @property
    def retiring(self) -> bool:
        """Whether it drains because another worker has its place."""
        return self.retired_s < math.inf

    def kill(self, why: str) -> None:
        """Kill the process, and keep the reason for the audit."""
        self.killed = self.killed or why
        self.process.kill()

    def send(self, content: bytes) -> None:
        """Send a message to the worker."""
        self._outgoing.put(content)

    def close(self) -> None:
        """Close the pipe to the worker."""
        self._outgoing.put(None)


Inbox = queue.SimpleQueue[tuple[WorkerProcess | None, bytes]]
"""messages of all workers; one without a worker only wakes the supervisor"""


def bound_socket(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises `UsageError` if the address is in use or invalid."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(_BACKLOG)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise UsageError(
            f"the address {host}:{port} cannot be used: {error.strerror or error}; choose another port, or end the "
            "program that uses it"
        ) from error
    return listener
