"""What all applications of a server share: the server of uvicorn, whole bodies of requests, headers, and which requests
reach a guarded route.
"""

import fnmatch
import re
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Collection, Iterator, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from glob import escape
from importlib.util import find_spec
from itertools import product
from typing import Any, Self
from urllib.parse import unquote

import uvicorn

from holdfast.reports.formats.html import template_text

if find_spec("starlette") is not None:
    from starlette.applications import Starlette
    from starlette.convertors import CONVERTOR_TYPES
    from starlette.routing import BaseRoute, Host, Match, Mount, Route, Router, WebSocketRoute
else:  # an application of another framework
    Starlette = Router = ()  # type: ignore[assignment, misc]
    CONVERTOR_TYPES = {}

Scope = MutableMapping[str, Any]

_PARAMETER = re.compile(r"\{\w+(?::(\w+))?\}")
_EXAMPLES = {"int": "0", "float": "0", "uuid": "00000000-0000-0000-0000-000000000000"}
"""values of parameters that a route of the type accepts; of the other types, any text such as the parameter itself"""
_END = re.compile(r"[\0?#]")
_DEPTH = 64
"""largest number of middlewares inside of one another"""
_ENCODINGS = 4
"""largest number of encodings of a path that are undone"""
_LONGEST = 4096
"""characters of a path beyond which it is not compared in all its forms, which would take long"""


@dataclass(eq=False)
class GuardedRoutes:
    """The routes of an application that are guarded, given by their paths."""

    app: object
    """the application inside of the middleware"""
    paths: Collection[str]
    """paths of requests, such as `/predict`, or of routes, such as `/models/{name}/predict`"""

    def endpoints(self, scope: Scope) -> "Endpoints":
        """Return what the router calls for the guarded paths, for requests like this one to other paths."""
        within = _router_within(self.app)
        router = within or _router_within(scope.get("app"))
        if router is None:
            return Endpoints(None, [], self.paths, self.paths)
        calls, others = list[object](), list[str]()
        for path in self.paths:
            example = _PARAMETER.sub(lambda found: _EXAMPLES.get(found[1], found[0]), path)
            places = dict.fromkeys((example, f"{router.root_of(scope)}{example}"))
            found = [router.endpoint({**scope, "path": place}) for place in places]
            calls += [endpoint for endpoint in found if endpoint is not None]
            others += [] if within and any(endpoint is not None for endpoint in found) else [path]
        return Endpoints(within, calls, self.paths, others)


@dataclass(frozen=True, eq=False)
class Endpoints:
    """What the router of an application calls for guarded paths."""

    router: "_Router | None"
    """the routes inside of the middleware; None if they are not known"""
    calls: Sequence[object]
    """functions or applications"""
    paths: Collection[str]
    """guarded paths"""
    others: Collection[str]
    """those for which the router calls nothing, as if a middleware in between changes the path"""

    def include(self, scope: Scope) -> bool:
        """Return whether a request is for a guarded route."""
        patterns = [_pattern(path, after_prefix=True) for path in self.others]
        places = {scope["path"]}
        if self.router is not None:
            places.add(scope["path"].removeprefix(self.router.root_of(scope).rstrip("/")))
            endpoint = self.router.endpoint(dict(scope))
            if self._are_called(endpoint) or any(
                _exact(path).match(place) for path in self.paths for place in places
            ):
                return True
            if isinstance(endpoint, _Mounted):
                patterns += [_pattern(path, after_prefix=False) for path in self.paths]
                patterns += [
                    _pattern(call.path, after_prefix=True)
                    for call in self.calls
                    if isinstance(call, _Mounted) and call.app == endpoint.app
                ]
        if not patterns or len(scope["path"]) > _LONGEST:
            return bool(patterns)
        return any(pattern.match(form) for place in places for form in _forms(place) for pattern in patterns)

    def were_reached(self, scope: Scope) -> bool:
        """Return whether the router has chosen a guarded route for a request, whose scope it changes then."""
        return self._are_called(scope.get("endpoint"))

    def _are_called(self, endpoint: object) -> bool:
        return endpoint is not None and any(
            endpoint == (call.app if isinstance(call, _Mounted) and call.path == "/" else call)
            for call in self.calls
        )


@dataclass(frozen=True, eq=False)
class _Router:
    routes: Sequence["BaseRoute"]
    root_path: str = ""
    """root path that the application sets for itself"""

    def root_of(self, scope: Scope) -> str:
        return self.root_path or str(scope.get("root_path", ""))

    def endpoint(self, scope: Scope) -> object:
        """Return the function or the application that a request reaches; None if there is none. Changes the scope."""
        scope["root_path"] = self.root_of(scope)
        chosen: tuple[object, Scope] | None = None
        for route in _with_included(self.routes):
            match, changes = route.matches(scope)
            if match is Match.FULL or (match is Match.PARTIAL and chosen is None):
                chosen = route, changes
            if match is Match.FULL:
                break
        if chosen is None:
            return None
        route, changes = chosen
        endpoint = changes.get("endpoint", route)
        inner, scope = _router_within(endpoint), {**scope, **changes}
        if inner is not None:
            return inner.endpoint(scope)
        if isinstance(route, Mount | Host) or isinstance(
            getattr(route, "original_route", None), Mount | Host
        ):
            return _Mounted(endpoint, scope["path"].removeprefix(scope["root_path"]) or "/")
        return endpoint


@dataclass(frozen=True)
class _Mounted:
    """A path within an application whose routes are not known. The path / is that of the whole application."""

    app: object
    path: str


def _router_within(app: object) -> _Router | None:
    """Return the routes of an application inside of middlewares, which have it as the attribute `app`."""
    root_path = ""
    for _ in range(_DEPTH):
        if isinstance(app, Starlette):
            return _Router(app.routes, root_path or _root_of(app))
        if isinstance(app, Router):
            return _Router(app.routes, root_path)
        app = getattr(app, "app", None)  # a convention of middlewares, without a common class
    return None


def _root_of(app: object) -> str:
    return str(getattr(app, "root_path", ""))  # of FastAPI


def _with_included(routes: Sequence["BaseRoute"]) -> Iterator[Any]:
    """Yield routes, and in the place of a router that FastAPI includes those of this router."""
    fastapi = sys.modules.get("fastapi.routing")
    expand: Any = (
        None if fastapi is None else vars(fastapi).get("iter_route_contexts")
    )  # absent in older versions
    for route in routes:
        if expand is None or isinstance(route, Route | Mount | Host | WebSocketRoute):
            yield route
        else:
            yield from expand([route])


@lru_cache
def _exact(path: str) -> re.Pattern[str]:
    """Return the expression with which Starlette matches the paths of a route."""
    parts, start = [], 0
    for parameter in _PARAMETER.finditer(path):
        convertor = CONVERTOR_TYPES.get(parameter[1] or "str")
        parts += [
            re.escape(path[start : parameter.start()]),
            f"(?:{convertor.regex if convertor else '[^/]+'})",
        ]
        start = parameter.end()
    return re.compile("".join((*parts, re.escape(path[start:]), "$")))


@lru_cache
def _pattern(path: str, *, after_prefix: bool) -> re.Pattern[str]:
    """Return an expression for forms of paths, in which a parameter is any text, also none or several segments.

    The expressions of fnmatch need linear time. `after_prefix` allows other segments before the path.
    """
    parts = ["*"] if after_prefix else []
    for segment in _segments(path):
        glob = "*".join(map(escape, _PARAMETER.split(segment)[::2]))
        parts.append("*" if glob == "*" else f"/{glob}/")
    return re.compile(fnmatch.translate("".join(parts)))


def _forms(path: str) -> set[str]:
    """Return what routers may make of a path, with each segment between two slashes.

    Some of them undo encodings, and ignore the rest after a character, parameters of segments, or relative segments.
    """
    forms = set[str]()
    for _ in range(_ENCODINGS + 1):
        texts = {path, _END.split(path)[0], path.partition(";")[0]}
        for text, parameters, relative in product(texts, (True, False), (True, False)):
            kept: list[str] = []
            for segment in _segments(text if parameters else re.sub(";[^/\\\\]*", "", text)):
                if relative or segment not in (".", ".."):
                    kept.append(segment)
                elif segment == "..":
                    del kept[-1:]
            forms.add("".join(f"/{segment}/" for segment in kept))
        path, before = unquote(path), path
        if path == before:
            break
    return forms


def _segments(path: str) -> list[str]:
    """Return the segments of a path that are not empty, without case, space and characters that are not printed."""
    printed = "".join(letter for letter in path.replace("\\", "/") if letter.isprintable()).casefold()
    return [segment.strip() for segment in printed.split("/") if segment.strip()]


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
        "content-security-policy": f"default-src 'none'; style-src {style}; img-src data:; media-src data:; "
        "form-action 'self'; "
        "base-uri 'none'; frame-ancestors 'none'",
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        "referrer-policy": "no-referrer",
        "cache-control": "no-store",
    }


def style_sheet() -> str:
    """Return the style sheet of all pages, which begins with that of reports."""
    return template_text("report.css") + template_text("pages.css")
