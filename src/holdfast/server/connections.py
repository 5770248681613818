"""Limits of connections, whether a worker can answer requests, and what answers at the socket of the workers while none
has started.
"""

import asyncio
import ctypes
import logging
import math
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from holdfast.guard.detectors.queries import QueryState, Wanted
from holdfast.server.audit_chain import ChainFile
from holdfast.server.messages import BACKLOG
from holdfast.server.protocol_v2 import JSON, compact
from holdfast.server.requests import ErrorLog, shown
from holdfast.server.telemetry import Telemetry

_ATTACH_FILTER = 26
"""SO_ATTACH_FILTER of Linux, which the module `socket` does not define"""
_WITHOUT_SYN = (
    (0x30, 0, 0, 13),  # load the byte of the TCP header with its flags
    (0x45, 0, 1, 0x02),  # if SYN is set,
    (0x06, 0, 0, 0),  # drop the packet;
    (0x06, 0, 0, 0xFFFFFFFF),  # otherwise accept it
)
"""instructions of BPF (code, jump if true, jump if false, operand), see McCanne and Jacobson, "The BSD Packet Filter",
USENIX 1993"""


def refuse_connections(listener: socket.socket) -> None:
    """Let a listening socket begin no further connections, while those that were begun can still be accepted.

    A connection that arrives between the last call of `accept` and the close would be reset, and its request lost. A
    client whose packet is dropped sends it again after a second, when the port is closed, and connects elsewhere.
    Without the filter, on other systems than Linux, connections of this moment may be reset.
    """
    if sys.platform == "linux":
        content = b"".join(struct.pack("HBBI", *instruction) for instruction in _WITHOUT_SYN)
        program = ctypes.create_string_buffer(content)
        option = struct.pack("HL", len(_WITHOUT_SYN), ctypes.addressof(program))
        with suppress(OSError):  # of a kernel without filters
            listener.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, option)


def raw_response(status: str, content: object, headers: str = "") -> bytes:
    """Return the bytes of a response with JSON after which the connection ends."""
    body = compact(content)
    headers = f"content-type: {JSON}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n{headers}"
    return f"HTTP/1.1 {status}\r\n{headers}\r\n".encode() + body


def _raw(status: str, reason: str) -> bytes:
    return raw_response(status, {"error": reason})


_FULL = _raw("503 Service Unavailable", "the server has too many connections; connect again later")
_SLOW = _raw("408 Request Timeout", "the headers did not arrive in time")
_INVALID = _raw("400 Bad Request", "the request is not valid HTTP")
_LARGE = _raw("431 Request Header Fields Too Large", "the headers are too large")
_HEADERS = 65_536
"""largest number of bytes of the headers of a request; the parser httptools has no limit of its own"""
_CHUNKED = 8
"""largest number of received bytes for each byte of a body, whose chunks have sizes and trailers"""
_READ_S = 0.5
"""seconds in which a client reads why its connection ends"""


class JoinedWrites:
    """Transport of one request that writes the head of its response together with the beginning of the body, in one
    call of the system instead of two. The response must have a body, as that to a POST request has.
    """

    def __init__(self, cycle: Any, transport: Any) -> None:
        self._cycle, self._transport = cycle, transport
        self._head: bytes | None = None
        self.is_closing, self.close = transport.is_closing, transport.close

    def write(self, data: bytes) -> None:
        """Write bytes; the head of the response with the next ones."""
        if self._head is None and self._cycle.response_started:
            self._head = data
            return
        if self._head:
            data, self._head = self._head + data, b""
        self._transport.write(data)


class LimitedProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """HTTP protocol that refuses further connections, and closes those whose headers do not arrive in time or whose
    responses are not read in time.
    """

    max_connections: int
    header_timeout_s: float
    write_timeout_s: float
    most: int
    """largest number of bytes of a request"""
    refused: Callable[[str], object]
    """called with the cause of each refusal"""
    errors: ErrorLog
    """log of what clients cause"""
    limited_log: logging.Logger
    """logger of uvicorn that writes to that log"""
    ending: set["LimitedProtocol"]
    """connections that end, which are no longer counted as open"""
    waiting: asyncio.TimerHandle | None = None
    unread: asyncio.TimerHandle | None = None
    """timer that runs while the client does not read"""
    received = 0
    """number of bytes since the last response"""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.logger = self.limited_log

    def connection_made(self, transport: Any) -> None:
        """Accept a connection, or refuse it if too many are open."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # writing is paused whenever the system accepts no further bytes
        if len(self.connections) > self.max_connections:
            self._end(_FULL, "overload")
            return
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Receive bytes, and measure the time until the headers are complete."""
        if self in self.ending or self.transport.is_closing():
            return
        self.received += len(data)
        super().data_received(data)
        if self in self.ending or self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
            if self.cycle.transport is self.transport and self.cycle.scope["method"] == "POST":
                self.cycle.transport = JoinedWrites(self.cycle, self.transport)
            if self.received > self.most:
                self.transport.close()
        elif self.received > _HEADERS:
            self._end(_LARGE)
        elif self.waiting is None:
            self._wait()

    def pause_writing(self) -> None:
        """Cut the connection if the client does not read in time. A transport that is closed would wait for it."""
        super().pause_writing()
        self.unread = self.loop.call_later(self.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """Continue, because the system has accepted all bytes."""
        self._stop_unread()
        super().resume_writing()

    def on_response_complete(self) -> None:
        """Prepare for the next request of the connection."""
        self.received = 0
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget a closed connection."""
        self._stop_waiting()
        self._stop_unread()
        self.ending.discard(self)
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer a request that is not valid HTTP."""
        self._end(_INVALID)

    def _unsupported_upgrade_warning(self) -> None:
        """Log a request for an upgrade of the connection, which is answered like any other. uvicorn advises to install
        a library.
        """
        self.errors("a client asked for an upgrade of its connection, which is not supported")

    def _wait(self) -> None:
        self.waiting = self.loop.call_later(self.header_timeout_s, self._too_slow)

    def _stop_waiting(self) -> None:
        if self.waiting is not None:
            self.waiting.cancel()
            self.waiting = None

    def _stop_unread(self) -> None:
        if self.unread is not None:
            self.unread.cancel()
            self.unread = None

    def _too_slow(self) -> None:
        self.waiting = None
        if self not in self.ending and not self.transport.is_closing():
            self._end(_SLOW)

    def _end(self, response: bytes, cause: str = "request") -> None:
        """Send a response and end the connection, but after a short time if the client may still be sending. Closed at
        once, the connection would be reset, and the client would not see the response.
        """
        self._stop_waiting()
        self.refused(cause)
        self.transport.write(response)
        self.connections.discard(self)
        unused = self.cycle is None or self.cycle.response_complete
        if not unused or len(self.ending) >= self.max_connections:
            self.transport.close()
            return
        self.ending.add(self)
        self.transport.write_eof()
        self.loop.call_later(_READ_S, self.transport.close)


class _LimitedHandler(logging.Handler):
    """Handler that writes the records of uvicorn, each of which a client can cause at any rate, to the limited log."""

    def __init__(self, errors: ErrorLog) -> None:
        super().__init__(logging.WARNING)
        self._errors = errors

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        error = record.exc_info[1] if record.exc_info else None
        self._errors(record.getMessage().rstrip("."), error)


def _limited_log(errors: ErrorLog) -> logging.Logger:
    logger = logging.Logger("uvicorn.error", logging.WARNING)  # noqa: LOG001 - that of this server alone
    logger.addHandler(_LimitedHandler(errors))
    return logger


def limited_protocol(
    max_connections: int,
    header_timeout_s: float,
    max_body: int = 0,
    refused: Callable[[str], object] = lambda cause: None,
    write_timeout_s: float = 30.0,
    errors: ErrorLog | None = None,
) -> type[asyncio.Protocol]:
    """Return uvicorn's HTTP protocol with limits of open connections and of the bytes of a request, and time limits
    for its headers and for the time in which a client must read.

    A connection over which more bytes arrive than a request with `max_body` bytes can need is closed. `refused` is
    called with the cause of each refusal, as the metrics name it. `errors` is the log of what clients cause.
    """
    errors = errors or ErrorLog()
    limits = {
        "errors": errors,
        "limited_log": _limited_log(errors),
        "max_connections": max_connections,
        "header_timeout_s": header_timeout_s,
        "write_timeout_s": write_timeout_s,
        "most": _HEADERS + _CHUNKED * max_body,
        "refused": staticmethod(refused),
        "ending": set(),
    }
    return type("LimitedProtocol", (LimitedProtocol,), limits)


Reason = Literal["audit", "state", "quota", "model", "workers", "draining"]
REASONS: Mapping[Reason, str] = {
    "audit": "the audit log cannot be written",
    "state": "the state of the query detector cannot be reached",
    "quota": "the limits of the keys cannot be checked",
    "model": "the model fails on every input",
    "workers": "no worker process has started",
    "draining": "the server is draining",
}
"""Why a server refuses every request, as its clients may know it"""
_EVERY_S = 0.75
"""seconds between two runs of a check"""
_LATE_S = 0.6
"""seconds after which a check that has not ended counts as failed, as while another process locks a database"""


@dataclass(eq=False)
class Check:
    """A check that a thread of its own repeats, because a disk or a database may let it wait."""

    reason: Reason
    fault: Callable[[], str]
    """returns what is wrong, for the operator; empty if nothing is"""
    late_s: float = _LATE_S
    """seconds after which a run that has not ended counts as failed"""
    refuses: bool = True
    """whether every request is refused while it fails"""
    found: str = ""
    """result of the last run"""
    _began_s: float = math.inf

    @property
    def failure(self) -> str:
        """What is wrong; empty if nothing is."""
        waited_s = time.monotonic() - self._began_s
        return self.found or (f"no answer for {waited_s:.1f} s" if waited_s > self.late_s else "")

    def run(self) -> None:
        """Run the check once."""
        self._began_s = time.monotonic()
        try:
            self.found = self.fault()
        except Exception as error:  # noqa: BLE001 - of a model or a library; the thread must go on
            self.found = f"{type(error).__name__}: {shown(str(error))}"
        self._began_s = math.inf

    def repeat(self) -> None:
        """Run the check as long as the process runs."""
        while True:
            self.run()
            time.sleep(_EVERY_S)


def audit_fault(chain: ChainFile) -> str:
    """Return why an audit chain cannot be written; empty if it can."""
    try:
        chain.refuse_full_disk()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def state_fault(state: QueryState) -> str:
    """Return why a shared state cannot be written; empty if it can."""
    nothing = Wanted(np.empty((0, 0), np.uint64), (), ())
    return "" if state.exchange(nothing, time.time(), lambda view: None) else state.health.error


@dataclass(eq=False)
class ModelTest:
    """Function that tests the model with one input after requests for which it failed, whose inputs may be the cause.
    It returns what is wrong, which is empty if nothing is, or raises the error of the model.
    """

    failed: Callable[[], float]
    """returns the number of these requests"""
    answers: Callable[[], bool]
    """calls the model, and returns whether its scores are finite"""
    _tested: float = 0.0
    _failing: bool = False

    def __call__(self) -> str:
        failed = self.failed()
        if failed > self._tested or self._failing:
            self._tested, self._failing = failed, True
            if not self.answers():
                return "it returned NaN or infinite scores"
            self._failing = False
        return ""


@dataclass(eq=False)
class Readiness:
    """The checks of a worker, and whether its server drains."""

    checks: Sequence[Check] = ()
    draining: bool = False
    """whether the server ends, so that a load balancer is to send no further requests"""
    probed_s: float = field(default=-math.inf, init=False)
    """time of the last probe"""

    def start(self) -> None:
        """Run every check once, and then repeat each in a thread."""
        for check in self.checks:
            check.run()
            threading.Thread(target=check.repeat, name=check.reason, daemon=True).start()

    @property
    def failures(self) -> dict[Reason, str]:
        """Why every request is refused, with details for the operator, by reason."""
        return {check.reason: check.failure for check in self.checks if check.refuses and check.failure}

    def probe(self) -> str:
        """Return why requests are not answered, as clients may know it, and note the time. It is empty if they are."""
        self.probed_s = time.monotonic()
        draining: tuple[Reason, ...] = ("draining",) if self.draining else ()
        return "; ".join(REASONS[reason] for reason in (*draining, *self.failures))

    @property
    def unprobed_s(self) -> float | None:
        """Seconds since the last probe; None before the first one."""
        return None if self.probed_s == -math.inf else time.monotonic() - self.probed_s


_LIVE = raw_response("200 OK", {"live": True})
_REFUSED = raw_response("503 Service Unavailable", {"error": REASONS["workers"]}, "retry-after: 1\r\n")
_ACCEPTED_S = 0.05
"""seconds after which the connections that were just accepted are handled"""


class StandIn:
    """A thread that answers requests at a listening socket until `end` is called. Only `/v2/health/live` gets 200, so
    that the server is not killed while its workers start.
    """

    def __init__(self, listener: socket.socket, telemetry: Telemetry) -> None:
        self._listener, self._telemetry = listener.dup(), telemetry
        self._begun, self._closed = threading.Event(), threading.Event()
        self._open: set[asyncio.Task[None]] = set()
        self._ended = False
        threading.Thread(target=lambda: asyncio.run(self._serve()), name="stand-in", daemon=True).start()

    def end(self) -> None:
        """Accept no further connections. Those that are open are answered by the thread."""
        self._ended = True  # for a thread that begins later
        if self._begun.wait(_READ_S):
            with suppress(RuntimeError):  # of the loop of a thread that is over
                self._loop.call_soon_threadsafe(self._end.set)
            self._closed.wait(_READ_S)

    async def _serve(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(
            self._answer, sock=self._listener, limit=_HEADERS, backlog=BACKLOG, start_serving=False
        )
        self._begun.set()
        if not self._ended:
            await server.start_serving()
            await self._end.wait()
        server.close()
        self._closed.set()
        await asyncio.sleep(_ACCEPTED_S)
        if self._open:
            await asyncio.wait(self._open)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request, and close its connection."""
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        task.add_done_callback(self._open.discard)
        head = b""
        with suppress(TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            async with asyncio.timeout(_READ_S):
                head = await reader.readuntil(b"\r\n\r\n")
        live = head.startswith(b"GET /v2/health/live ")
        if head.startswith(b"POST "):
            self._telemetry.count("holdfast_requests_total", "503")
            self._telemetry.count("holdfast_refused_total", "workers")
        with suppress(TimeoutError, OSError):
            if head:
                writer.write(_LIVE if live else _REFUSED)
                writer.write_eof()
            async with asyncio.timeout(_READ_S):  # closed at once, the connection would be reset
                while await reader.read(_HEADERS):
                    pass
        writer.close()
