"""A worker process as the supervisor sees it, and the socket that all workers share."""

import math
import os
import queue
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field
from mmap import mmap
from pathlib import Path
from typing import IO, Any

from holdfast.core.errors import HoldfastError, UsageError
from holdfast.runs.engine.children import Child
from holdfast.runs.store.encryption import KEY_VARIABLE
from holdfast.server.telemetry import MEMORY_BYTES

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
    generation: int = 0
    """number of reloads of the model before it"""
    canary: bool = False
    """whether it serves a candidate instead of the served model"""
    set_name: str = ""
    """name of the model that it serves; empty for a pool, whose sets change"""
    ready: bool = False
    sampling: bool = False
    """whether it samples inputs for `holdfast adapt`"""
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
    checks: Mapping[str, Mapping[str, str | bool]] = field(default_factory=dict)
    """failing checks by reason: what is wrong (`failure`), and whether it refuses every request (`refuses`)"""
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
    def failures(self) -> dict[str, str]:
        """Why it refuses every request, by reason."""
        return {reason: str(check["failure"]) for reason, check in self.checks.items() if check["refuses"]}

    def report_readiness(self, checks: Mapping[str, Mapping[str, Any]], unprobed_s: float | None) -> None:
        """Note its failing checks, and how long ago it was probed."""
        self.checks = {
            str(reason): {"failure": str(check["failure"])[:_SHOWN], "refuses": bool(check["refuses"])}
            for reason, check in checks.items()
        }
        if unprobed_s is not None:
            self.probed_s = time.monotonic() - float(unprobed_s)

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
