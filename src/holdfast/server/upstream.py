"""Requests to an upstream server, whose redirects are not followed and whose responses are limited in size and time."""

import json
import os
import queue
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import httpcore

from holdfast.core.errors import UsageError
from holdfast.io.remote.remote import header_variable
from holdfast.server.protocol_v2 import JSON, LENGTH_HEADER
from holdfast.server.requests import Refused, is_sendable, wait_first

METADATA_BYTES = 1 << 22
"""largest number of bytes of metadata"""
_HEAD_BYTES = 96 * 1024
"""largest number of bytes before the body of a response, with informational responses"""
_FRAMED = 2
"""largest number of received bytes for each byte of a body, which may be sent in chunks"""
_IN_PATH = "/%:@!$&'()*+,;=~"
_REFUSED = frozenset({400, 413, 415, 422})
"""status codes with which a server refuses the content of a request"""
_BUSY = frozenset({429, 503})
_NO_KEY = frozenset({401, 403})


class KeyRefused(Refused):
    """A request to which the upstream server answers that its key is missing or not valid."""


def _lost(reason: str) -> Refused:
    return wait_first(f"the upstream server {reason}", 0.0, cause="upstream")


def unusable(reason: str) -> Refused:
    """Return the refusal of a request whose response cannot be used, with status 502."""
    return Refused(502, f"the upstream server {reason}", (), "upstream")


@dataclass(frozen=True)
class UpstreamAddress:
    """Where requests are sent: the address of the server, further headers, and the time for one response."""

    url: str
    """address of the server, without a path of a model"""
    headers: tuple[str, ...] = ()
    """headers of each request, each `NAME: env:VARIABLE`"""
    timeout_s: float = 10.0
    """seconds from the beginning of a request, with its connection, until the whole response must have arrived"""

    def connect(self) -> "Connection":
        """Return a connection with the headers, whose values are read from the environment.

        Raises `UsageError` for a variable that is not set, or whose value cannot be that of a header.
        """
        headers = {}
        for name, variable in map(header_variable, self.headers):
            if variable not in os.environ:
                raise UsageError(f"the variable {variable} of the header {name} is not set; set it")
            headers[name] = os.environ[variable].strip()
            if not is_sendable(headers[name]):
                raise UsageError(
                    f"the variable {variable} of the header {name} contains other characters than printable ASCII; "
                    "correct it"
                )
        return Connection(self, headers)


@dataclass(eq=False)
class _Allowance:
    """What the response to the current request may take: the end of its time, and a number of bytes."""

    end: float = 0.0
    left: int = 0

    @property
    def remaining_s(self) -> float:
        """Seconds that are left. Raises `TimeoutException` if there are none."""
        remaining_s = self.end - time.monotonic()
        if remaining_s <= 0:
            raise httpcore.TimeoutException
        return remaining_s

    def take(self, n_bytes: int) -> None:
        """Count received bytes."""
        self.left -= n_bytes
        if self.left < 0:
            raise unusable("returned a response that is too large")


class _LimitedStream(httpcore.NetworkStream):
    """A connection whose operations together have the time of the request. The time limits of httpcore are those of
    single operations, of which a server can cause any number.
    """

    def __init__(self, stream: httpcore.NetworkStream, allowance: _Allowance) -> None:
        self._stream, self._allowance = stream, allowance

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Return bytes that were received."""
        data = self._stream.read(max_bytes, self._allowance.remaining_s)
        self._allowance.take(len(data))
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send bytes."""
        sock, view = self._stream.get_extra_info("socket"), memoryview(buffer)
        while view:
            sock.settimeout(self._allowance.remaining_s)
            try:
                view = view[sock.send(view) :]
            except TimeoutError as error:
                raise httpcore.WriteTimeout from error
            except OSError as error:
                raise httpcore.WriteError from error

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        """Return the connection with TLS."""
        stream = self._stream.start_tls(ssl_context, server_hostname, self._allowance.remaining_s)
        return _LimitedStream(stream, self._allowance)

    def get_extra_info(self, info: str) -> Any:
        """Return a fact about the connection, such as its socket."""
        return self._stream.get_extra_info(info)

    def close(self) -> None:
        """Close the connection."""
        self._stream.close()


class _LimitedBackend(httpcore.NetworkBackend):
    """Opens connections in the time of the request."""

    def __init__(self, allowance: _Allowance) -> None:
        self._allowance, self._sockets = allowance, httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        """Connect to one of the addresses of a host; each gets an equal part of the time that is left."""
        failure: Exception = httpcore.ConnectError("the host has no address")
        addresses = _addresses(host, port, self._allowance.remaining_s)
        for number, address in enumerate(addresses):
            part_s = self._allowance.remaining_s / (len(addresses) - number)
            try:
                stream = self._sockets.connect_tcp(address, port, part_s, socket_options=socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
                continue
            return _LimitedStream(stream, self._allowance)
        raise failure


def _addresses(host: str, port: int, timeout_s: float) -> list[str]:
    """Return the addresses of a host. A thread looks them up, because the resolver has time limits of its own."""
    found: queue.SimpleQueue[list[str] | Exception] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found.put(list(dict.fromkeys(str(entry[4][0]) for entry in entries)))
        except (OSError, UnicodeError) as error:
            found.put(error)

    threading.Thread(target=look_up, daemon=True).start()
    try:
        addresses = found.get(timeout=timeout_s)
    except queue.Empty:
        raise httpcore.ConnectTimeout from None
    if isinstance(addresses, Exception):
        raise httpcore.ConnectError(str(addresses)) from addresses
    return addresses


class Connection:
    """A connection to an upstream server that is kept open. It is used by one thread at a time."""

    def __init__(self, address: UpstreamAddress, headers: Mapping[str, str]) -> None:
        self._url, self._timeout_s = address.url, address.timeout_s
        self._headers = [("accept-encoding", "identity"), ("user-agent", "holdfast"), *headers.items()]
        self._allowance = _Allowance()
        self._connections = httpcore.ConnectionPool(
            ssl.create_default_context(), max_connections=1, network_backend=_LimitedBackend(self._allowance)
        )

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. The next request opens another one."""
        self._connections.close()

    def request(
        self,
        path: str,
        body: bytes | None = None,
        *,
        headers: Iterable[tuple[str, str]] = (),
        most: int = METADATA_BYTES,
    ) -> tuple[bytes, int | None]:
        """Return the body of the response to a GET, or to a POST of `body`, and the number of bytes of its JSON if
        tensors follow as bytes.

        A request whose connection was closed before the response is sent once more, within the same time. Raises
        `Refused` with status 400 if the server refuses the content, 502 for an unusable response and 503 if there is
        none.
        """
        url, sent = self._url + quote(path, _IN_PATH), [*self._headers, *headers]
        self._allowance.end = time.monotonic() + self._timeout_s
        for attempt in range(2):
            try:
                response, content = self._answer(url, body, sent, most)
                break
            except httpcore.TimeoutException as error:
                raise _lost("did not answer in time") from error
            except (httpcore.RemoteProtocolError, httpcore.ReadError, httpcore.WriteError) as error:
                if attempt:
                    raise _lost("closed the connection") from error
            except (
                httpcore.ConnectError,
                httpcore.LocalProtocolError,
                httpcore.UnsupportedProtocol,
            ) as error:
                raise _lost("cannot be reached") from error
        _refuse_status(response.status)
        length = _header(response, LENGTH_HEADER.encode())
        if length is not None and not re.fullmatch(rb"[0-9]{1,12}", length):
            raise unusable("returned an invalid header")
        return content, None if length is None else int(length)

    def _answer(
        self, url: str, body: bytes | None, headers: list[tuple[str, str]], most: int
    ) -> tuple[httpcore.Response, bytes]:
        self._allowance.left = _HEAD_BYTES
        method = "GET" if body is None else "POST"
        with self._connections.stream(method, url, headers=headers, content=body) as response:
            if (_header(response, b"content-encoding") or b"identity").lower() != b"identity":
                raise unusable("returned a compressed response")
            self._allowance.left += _FRAMED * most
            parts, size = [], 0
            for part in response.iter_stream():
                size += len(part)
                if size > most:
                    raise unusable("returned a response that is too large")
                parts.append(part)
        return response, b"".join(parts)

    def json(self, path: str, body: bytes | None = None) -> Any:
        """Return the content of a response in JSON; see `request`."""
        try:
            return json.loads(self.request(path, body, headers=(("content-type", JSON),))[0])
        except (ValueError, RecursionError) as error:
            raise unusable("returned invalid JSON") from error


def _header(response: httpcore.Response, name: bytes) -> bytes | None:
    return next((value for key, value in response.headers if key.lower() == name), None)


def _refuse_status(status: int) -> None:
    if 200 <= status < 300:
        return
    if status in _REFUSED:
        raise Refused(400, "the upstream server refuses the request", (), "upstream")
    if status in _BUSY:
        raise _lost("is overloaded or not ready")
    if 300 <= status < 400:
        raise unusable("redirects the request, which is not followed")
    if status in _NO_KEY:
        raise KeyRefused(502, f"the upstream server answered with status {status}", (), "upstream")
    raise unusable(f"answered with status {status}")
