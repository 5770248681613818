"""A worker process as the supervisor sees it, the socket that all workers share, and the signals of the
supervisor.
"""

import math
import os
import pickle
import queue
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import InitVar, dataclass, field
from mmap import mmap
from pathlib import Path
from typing import IO

from holdfast.core.errors import HoldfastError, UsageError
from holdfast.runs.engine.processes import Child
from holdfast.runs.store.encryption import KEY_VARIABLE
from holdfast.server.asgi import handled_signals
from holdfast.server.generation import Generation
from holdfast.server.messages import Drain, FailingCheck, Report, ToWorker
from holdfast.server.telemetry import MEMORY_BYTES


@contextmanager
def hang_up_signals(stop: Callable[[], object], swap: Callable[[], object]) -> Iterator[None]:
    """Context manager in which SIGHUP calls `swap`.

    SIGHUP also reports that the terminal of a process in its foreground was closed. It then calls `stop`, unless it was
    ignored, as `nohup` has it. A process in the background receives no such report.
    """
    foreground, ignored = in_foreground(), signal.getsignal(signal.SIGHUP) is signal.SIG_IGN

    def hung_up() -> None:
        nonlocal foreground
        if not foreground or has_terminal():
            swap()
            return
        foreground = False
        if not ignored:
            stop()

    with handled_signals(hung_up, signal.SIGHUP):
        yield


def has_terminal() -> bool:
    """Return whether this process has a terminal."""
    return _foreground_group() is not None


def in_foreground() -> bool:
    """Return whether this process is in the foreground of a terminal."""
    return _foreground_group() == os.getpgrp()


def _foreground_group() -> int | None:
    """Return the process group in the foreground of the terminal of this process; None without a terminal."""
    try:
        terminal = os.open(os.ctermid(), os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return None
    try:
        return os.tcgetpgrp(terminal)
    except OSError:
        return None
    finally:
        os.close(terminal)


BACKLOG = 2048
"""largest number of connections that the system accepts before a worker does"""
_SHOWN = 300
"""largest number of characters of a reason that is shown"""


@dataclass(eq=False)
class WorkerProcess:
    """A worker process, and what the supervisor knows about it."""

    number: int
    listener: InitVar[socket.socket]
    """listening socket, which the process inherits"""
    inbox: "Inbox"
    """where its messages are put"""
    chain: Path | None
    memory: mmap = field(init=False)
    """values of its metrics, which outlast the process"""
    generation: Generation
    """the weights that it serves, or opens to serve them"""
    opened: bool = False
    """whether it has opened them"""
    ready: bool = False
    sampling: bool = False
    """whether it samples inputs for `holdfast adapt`"""
    error: HoldfastError | None = None
    drained: bool = False
    """whether it has answered all requests, and ends"""
    retired_s: float = math.inf
    """time at which the supervisor let it drain, because another worker has its place"""
    begun_s: float = field(default_factory=time.monotonic)
    heard_s: float = field(default_factory=time.monotonic)
    """time of its last message"""
    patience_s: float = math.inf
    """seconds without progress after which it is replaced"""
    chain_head: tuple[int, str] | None = None
    """length and head of its audit chain, as it last reported them"""
    checks: Mapping[str, FailingCheck] = field(default_factory=dict)
    """failing checks by reason"""
    probed_s: float = -math.inf
    """time of the last probe of its readiness"""
    stalled: str = ""
    """what makes no progress, as the worker itself reports it"""
    _suspected: bool = False
    killed: str = ""
    """why the supervisor killed it"""

    def __post_init__(self, listener: socket.socket) -> None:
        with _memory_file() as counters:
            self.memory = mmap(counters.fileno(), MEMORY_BYTES)
            passed = (listener.fileno(), counters.fileno())
            self.child = Child(
                "holdfast.server.server_worker",
                lambda message: self.inbox.put((self, message)),
                *passed,
                pass_fds=passed,
                # a worker parses what clients send, so it must not have the key of the pool
                env={name: value for name, value in os.environ.items() if name != KEY_VARIABLE},
            )

    @property
    def name(self) -> str:
        """Name of the worker in metrics."""
        return f"worker-{self.number}"

    @property
    def set_name(self) -> str:
        """Name of the weights that it serves; empty before it has opened them."""
        return self.generation.name if self.opened else ""

    @property
    def failures(self) -> dict[str, str]:
        """Why it refuses every request, by reason."""
        return {reason: check.failure for reason, check in self.checks.items() if check.refuses}

    def send(self, message: ToWorker) -> None:
        """Send a message to it."""
        self.child.send(pickle.dumps(message))

    def reported(self, report: Report) -> None:
        """Note its state. What makes no progress counts if the report before stated it too: after a pause of the
        machine, the first report may be too early.
        """
        self.stalled = report.stalled if self._suspected else ""
        self._suspected, self.patience_s = bool(report.stalled), report.patience_s
        self.chain_head = report.chain or self.chain_head
        self.checks = {
            reason: FailingCheck(check.failure[:_SHOWN], check.refuses)
            for reason, check in report.checks.items()
        }
        if report.unprobed_s is not None:
            self.probed_s = time.monotonic() - report.unprobed_s

    def retire(self) -> None:
        """Let it answer what it received and end, because another worker has its place."""
        self.retired_s = time.monotonic()
        self.send(Drain(last=False))

    @property
    def retiring(self) -> bool:
        """Whether it drains because another worker has its place."""
        return self.retired_s < math.inf

    def kill(self, why: str) -> None:
        """Kill the process, and keep the reason for the audit."""
        self.killed = self.killed or why
        self.child.process.kill()


def _memory_file() -> IO[bytes]:
    """Return an open file without a name for the metrics of a worker, in memory where the system supports it. The
    worker cannot shorten it then, which would end the supervisor with SIGBUS.
    """
    if sys.platform == "linux":
        import fcntl

        handle = os.memfd_create("holdfast-metrics", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(handle, MEMORY_BYTES)
        fcntl.fcntl(handle, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    else:
        handle, name = tempfile.mkstemp()
        os.unlink(name)  # noqa: PTH108
        os.ftruncate(handle, MEMORY_BYTES)
    return os.fdopen(handle, "r+b")


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
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise UsageError(
            f"the address {host}:{port} cannot be used: {error.strerror or error}; choose another port, or end the "
            "program that uses it"
        ) from error
    return listener
