"""Bodies of requests and responses of an ASGI application that are read or kept as a whole before they are used."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from holdfast.server.guarded_routes import Scope

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApplication = Callable[[Scope, Receive, Send], Awaitable[None]]


class WholeResponse:
    """The response of an application, which is kept until it is sent."""

    def __init__(self) -> None:
        self.start: Message = {}
        self.body = b""

    @property
    def status(self) -> int:
        """Status code of the response."""
        return int(self.start.get("status", 500))

    async def __call__(self, message: Message) -> None:
        """Keep a part of the response."""
        if message["type"] == "http.response.start":
            self.start = message
        elif message["type"] == "http.response.body":
            self.body += message.get("body", b"")

    def replace_body(self, body: bytes) -> None:
        """Send other content."""
        kept = [
            (name, value)
            for name, value in self.start.get("headers", ())
            if name.lower() != b"content-length"
        ]
        self.start = {**self.start, "headers": [*kept, (b"content-length", str(len(body)).encode())]}
        self.body = body

    async def send_to(self, send: Send) -> None:
        """Send the response, if the application has answered."""
        if self.start:
            await send(self.start)
            await send({"type": "http.response.body", "body": self.body})


async def whole_body(receive: Receive, most: int) -> bytes | None:
    """Return the body of a request; None if it has more than `most` bytes, or if the client disconnects."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            return None
        if not message.get("more_body", False):
            return b"".join(parts)


def replayed(body: bytes, receive: Receive) -> Receive:
    """Return a function that returns the body that was read already, and then what the server sends."""
    sent = False

    async def again() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
