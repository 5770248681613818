"""Answers of HTTP servers with limits of size and time."""

import time
from collections.abc import Callable
from http.client import HTTPConnection, HTTPException, HTTPResponse
from io import BufferedReader, RawIOBase
from socket import SocketIO, socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_CONNECT_S = 10.0
"""seconds in which a connection to one address of a host must be accepted"""
_HEAD_BYTES = 96 * 1024
"""largest number of bytes before the content of an answer, with informational responses"""
_FRAMED = 2
"""largest number of received bytes for each byte of a content, which may be sent in chunks"""
_CHUNK = 1 << 16


class LimitedReader(RawIOBase):
    """Reader of a socket that raises `TimeoutError` when no seconds remain, even if data still arrive in small pieces,
    and `HTTPException` after `most` bytes.
    """

    def __init__(
        self, sock: socket, raw: SocketIO, remaining_s: Callable[[], float], most: float = float("inf")
    ) -> None:
        self._sock, self._raw, self._remaining_s, self.left = sock, raw, remaining_s, most

    def readable(self) -> bool:
        """Return that bytes can be read."""
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int | None:
        """Read bytes into a buffer, and return their number."""
        remaining_s = self._remaining_s()
        if remaining_s <= 0:
            raise TimeoutError
        self._sock.settimeout(remaining_s)
        n = self._raw.readinto(buffer)
        self.left -= n or 0
        if self.left < 0:
            raise HTTPException("the answer is too large")
        return n

    def close(self) -> None:
        """Close the reader of the socket."""
        self._raw.close()
        super().close()


def whole_answer(
    connection: HTTPConnection,
    method: str,
    path: str,
    body: bytes | None,
    headers: dict[str, str],
    *,
    timeout_s: float,
    most: int,
) -> tuple[HTTPResponse, bytes]:
    """Send a request over a new connection, which is closed then, and return the response with its whole content.

    Both together, with the connection, take at most `timeout_s` seconds, and the content has at most `most` bytes.
    Raises `HTTPException` and `OSError`, of which `TimeoutError` is one.
    """
    end, readers = time.monotonic() + timeout_s, list[LimitedReader]()

    def remaining_s() -> float:
        return end - time.monotonic()

    def response_of(sock: socket, method: str | None) -> HTTPResponse:
        response = HTTPResponse(sock, method=method)
        # The file object that HTTPResponse opened has no limits, so it is replaced before anything is read from it.
        response.fp.close()
        readers.append(LimitedReader(sock, sock.makefile("rb", buffering=0), remaining_s, _HEAD_BYTES))
        response.fp = BufferedReader(readers[0])
        return response

    connection.response_class = response_of  # type: ignore[assignment]
    connection.timeout = min(_CONNECT_S, timeout_s)
    try:
        connection.connect()
        connection.sock.settimeout(max(remaining_s(), 1e-3))
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        readers[0].left += _FRAMED * most
        pieces, size = [], 0
        while piece := response.read1(_CHUNK):
            pieces.append(piece)
            size += len(piece)
            if size > most:
                raise HTTPException(f"the answer has more than {most:,} bytes")
        if response.length:  # read1 returns no error if the server closes the connection early
            raise ConnectionError(f"the answer was cut off {response.length:,} bytes before its end")
        return response, b"".join(pieces)
    finally:
        connection.close()
        for reader in readers:  # a response without a length is not closed with its connection
            reader.close()
