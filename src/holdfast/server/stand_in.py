"""Answers at the socket of the workers while none of them has started: probes learn the reason, and clients may retry.

Otherwise connections would wait in the system without an answer.
"""

import asyncio
import socket
import threading
from contextlib import suppress

from holdfast.server.connections import raw_response
from holdfast.server.readiness import REASONS
from holdfast.server.telemetry import Telemetry
from holdfast.server.worker_processes import BACKLOG

_LIVE = raw_response("200 OK", {"live": True})
_REFUSED = raw_response("503 Service Unavailable", {"error": REASONS["workers"]}, "retry-after: 1\r\n")
_HEADERS = 65_536
"""largest number of bytes of the headers of a request"""
_READ_S = 0.5
"""seconds in which a client must send its headers, and in which it may read the response"""
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
