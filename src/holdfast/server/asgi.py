"""What all applications of a server share: the server of uvicorn, whole bodies of requests, and headers of pages."""

import signal
import threading
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager, nullcontext
from typing import Any, Self

import uvicorn

from holdfast.reports.formats.html import template_text
from holdfast.server.guarded_routes import Scope


@contextmanager
def handled_signals(handler: Callable[[], object], *numbers: int) -> Iterator[None]:
    """Context manager in which signals call a function. In another thread than the main one, they are not handled."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: handler()) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)


class UvicornServer(uvicorn.Server):
    """A server of uvicorn, which leaves signals to its process unless `ends_by_signals`."""

    ends_by_signals = False

    @classmethod
    def of(cls, app: Any, protocol: Any = "auto", *, drain_s: float = 1.0, **settings: Any) -> Self:
        """Return a server of an ASGI application, which gets `drain_s` seconds for the requests in progress at the
        end.
        """
        return cls(
            uvicorn.Config(
                app,
                http=protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=max(1, round(drain_s)),
                **settings,
            )
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Let Ctrl-C and SIGTERM end the server without an error while it runs, if they do."""

        def stop() -> None:
            self.should_exit = True

        with handled_signals(stop, signal.SIGINT, signal.SIGTERM) if self.ends_by_signals else nullcontext():
            yield


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


def page_headers(style: str = "'self'") -> dict[str, str]:
    """Return the headers of a page without scripts. `style` is the source of its style sheet in a content security
    policy.
    """
    return {
        "content-security-policy": f"default-src 'none'; style-src {style}; img-src data:; form-action 'self'; "
        "base-uri 'none'; frame-ancestors 'none'",
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        "referrer-policy": "no-referrer",
        "cache-control": "no-store",
    }


def style_sheet() -> str:
    """Return the style sheet of all pages, which begins with that of reports."""
    return template_text("report.css") + template_text("pages.css")
