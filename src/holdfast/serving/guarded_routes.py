"""Which requests an application sends to a guarded route.

The routes of an application of Starlette or FastAPI are matched by their own methods, so that a request is guarded if
the router calls the same function for it as for a guarded path. Where the routes are not known, as in a mounted
application of another framework, paths are compared after a normalisation that merges more of them than routers do.
"""

import re
import sys
from collections.abc import Collection, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any
from urllib.parse import unquote

if find_spec("starlette") is not None:
    from starlette.applications import Starlette
    from starlette.routing import BaseRoute, Host, Match, Mount, Route, Router, WebSocketRoute
else:  # an application of another framework
    Starlette = Router = ()  # type: ignore[assignment, misc]

Scope = MutableMapping[str, Any]

_PARAMETER = re.compile(r"\{\w+(?::(\w+))?\}")
_EXAMPLES = {"int": "0", "float": "0", "uuid": "00000000-0000-0000-0000-000000000000"}
"""values of parameters that a route of the type accepts; of the other types, any text"""
_ORIGIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/]*")
_END = re.compile(r"[\0?#]")
_DEPTH = 64
"""largest number of middlewares inside of one another, and of encodings of a path"""


@dataclass(eq=False)
class GuardedRoutes:
    """The routes of an application that are guarded, given by their paths."""

    app: object
    """the application inside of the middleware"""
    paths: Collection[str]
    """paths of requests, such as `/predict`, or of routes, such as `/models/{name}/predict`"""
    _patterns: dict[str, re.Pattern[str]] = field(init=False)

    def __post_init__(self) -> None:
        self._patterns = {path: _pattern(path) for path in self.paths}

    def endpoints(self, scope: Scope) -> "Endpoints":
        """Return what the router calls for the guarded paths, for requests like this one to other paths."""
        within = _router_within(self.app)
        router = within or _router_within(scope.get("app"))
        if router is None:
            return Endpoints(None, [], [*self._patterns.values()])
        calls, others = list[object](), list[re.Pattern[str]]()
        for path, pattern in self._patterns.items():
            example = _PARAMETER.sub(lambda name: _EXAMPLES.get(name[1], "x"), path)
            places = dict.fromkeys((example, f"{router.root_of(scope)}{example}"))
            found = [router.endpoint({**scope, "path": place}) for place in places]
            calls += [endpoint for endpoint in found if endpoint is not None]
            others += [] if within and any(endpoint is not None for endpoint in found) else [pattern]
        return Endpoints(within, calls, others)


@dataclass(frozen=True, eq=False)
class Endpoints:
    """What the router of an application calls for guarded paths."""

    router: "_Router | None"
    """the routes inside of the middleware; None if they are not known"""
    calls: Sequence[object]
    """functions or applications"""
    others: Sequence[re.Pattern[str]]
    """guarded paths for which the router calls nothing, as if a middleware in between changes the path"""

    def include(self, scope: Scope) -> bool:
        """Return whether a request is for a guarded route."""
        if self.router is not None and self.calls and self._are_called(self.router.endpoint(dict(scope))):
            return True
        path, root = scope["path"], scope.get("root_path", "").rstrip("/")
        candidates = {_folded(path), _folded(path.removeprefix(root))}
        return any(pattern.fullmatch(each) for pattern in self.others for each in candidates)

    def were_reached(self, scope: Scope) -> bool:
        """Return whether the router has chosen a guarded route for a request, whose scope it changes then."""
        return self._are_called(scope.get("endpoint"))

    def _are_called(self, endpoint: object) -> bool:
        return endpoint is not None and any(_is_called(endpoint, call) for call in self.calls)


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
            return _Mounted(endpoint, _folded(scope["path"].removeprefix(scope["root_path"])))
        return endpoint


@dataclass(frozen=True)
class _Mounted:
    """A path within an application whose routes are not known. The path / is that of the whole application."""

    app: object
    path: str


def _is_called(endpoint: object, call: object) -> bool:
    """Return whether an endpoint of a request is that of a guarded path."""
    if isinstance(call, _Mounted) and call.path == "/":
        return endpoint == call.app or (isinstance(endpoint, _Mounted) and endpoint.app == call.app)
    return endpoint == call


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


def _pattern(path: str) -> re.Pattern[str]:
    """Return the expression that normalised paths match."""
    parts, start = [], 0
    folded = _folded(path)
    for parameter in _PARAMETER.finditer(folded):
        parts += [re.escape(folded[start : parameter.start()]), ".*" if parameter[1] == "path" else "[^/]+"]
        start = parameter.end()
    return re.compile("".join((*parts, re.escape(folded[start:]))), re.DOTALL)


def _folded(path: str) -> str:
    """Return a path without what some router ignores: encodings, case, space, and empty or relative segments."""
    for _ in range(_DEPTH):
        path, before = unquote(path), path
        if path == before:
            break
    path = _END.split(_ORIGIN.sub("", path.replace("\\", "/"), count=1))[0]
    segments: list[str] = []
    for segment in path.split("/"):
        name = "".join(letter for letter in segment.partition(";")[0] if letter.isprintable())
        name = name.strip().casefold()
        if name == "..":
            del segments[-1:]
        elif name not in ("", "."):
            segments.append(name)
    return "/" + "/".join(segments)
