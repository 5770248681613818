"""Limits of connections, which an ASGI application cannot enforce, and the close of a listening socket."""

import asyncio
import ctypes
import logging
import socket
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from holdfast.server.error_log import ErrorLog
from holdfast.server.protocol_v2 import JSON, compact

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
