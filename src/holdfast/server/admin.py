"""The port of the operator: metrics for Prometheus, the state of the server, swaps, reloads and canaries, runs of
`holdfast adapt`, the monitor, stored and sampled inputs, and the page `/ui`.
"""

import json
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from holdfast.core.errors import TargetError, UsageError
from holdfast.core.remedies import Placeholder, Remedy
from holdfast.server.app import REASONS, json_response
from holdfast.server.asgi import ASGIApplication, UvicornServer
from holdfast.server.connections import limited_protocol
from holdfast.server.error_log import ErrorLog
from holdfast.server.flagged_inputs import MOST
from holdfast.server.generation import Candidate
from holdfast.server.keys import ADMIN, ApiKey, KeyFile
from holdfast.server.live_monitor import LiveMonitor
from holdfast.server.operator_authentication import (
    OperatorAuthentication,
    OperatorSessions,
    proven_key,
)
from holdfast.server.requests import Refused
from holdfast.server.supervisor import Supervisor
from holdfast.server.ui import ui_routes

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_CONNECTIONS, _HEADER_S = 64, 10.0
_STARTED_S = 10.0
_MOST_BODY = 1 << 20
"""largest number of bytes of a request"""
_BYTES = "application/octet-stream"


@dataclass(frozen=True)
class _Operated:
    """The requests of an operator to one server, and which of them are permitted."""

    supervisor: Supervisor
    keys: KeyFile | None
    sessions: OperatorSessions

    def refuse_other_host(self, request: Request) -> None:
        self.supervisor.setup.worker.admin_hosts.refuse_other(request.scope["headers"])

    def permitted(self, request: Request, *scopes: str) -> ApiKey | None:
        """Return the key of a request, None on a server without keys. Raises `Refused` for a key without any of the
        scopes.
        """
        self.refuse_other_host(request)
        if self.keys is None:
            return None
        key = proven_key(request.scope)
        if key is not None:
            key.refuse_unpermitted(*scopes)
            return key
        header = request.headers.get("authorization")
        return self.keys.authenticated(None if header is None else header.encode("latin-1"), *scopes)

    def changing(self, request: Request, *scopes: str) -> ApiKey | None:
        """Return the key of a request that changes the server, which no web page may send."""
        key = self.permitted(request, *scopes)
        # a page in the operator's browser could send this request without a key
        if "origin" in request.headers:
            raise Refused(403, "requests of web pages are not accepted")
        return key

    # --- the server

    async def metrics(self, request: Request) -> Response:
        self.permitted(request, "metrics")
        return Response(self.supervisor.totals.text(), media_type=METRICS_TYPE)

    async def status(self, request: Request) -> Response:
        key = self.permitted(request, "metrics", "adapt")
        return json_response(self.supervisor.status(detailed=key is None or key.permits("adapt")))

    async def swap(self, request: Request) -> Response:
        self.changing(request, ADMIN)
        try:
            self.supervisor.request_swap("requested by the operator")
        except UsageError as error:
            raise Refused(409, str(error)) from error
        return json_response({"requested": True}, 202)

    async def session(self, request: Request) -> Response:
        self.refuse_other_host(request)
        body = await _body_of(request)
        host = request.headers.get("host", "")
        return json_response(self.sessions.begin(body.get("key"), body.get("nonce"), host))

    # --- runs of holdfast adapt

    async def runs(self, request: Request) -> Response:
        self.permitted(request, "adapt", "approve")
        return json_response({"runs": self.supervisor.adaptations.runs()})

    async def step(self, request: Request) -> Response:
        key = self.changing(request, "adapt")
        body, adaptations = await _body_of(request), self.supervisor.adaptations
        adaptations.took(body.get("run"), body.get("step"), body.get("facts", {}), key)
        if body.get("ended") is True:
            adaptations.release(body.get("run"))
        return json_response({"run": body.get("run")})

    async def begin_canary(self, request: Request) -> Response:
        key = self.changing(request, "adapt")
        body = await _body_of(request)
        run = self.supervisor.adaptations.note_request(body.get("run"), key)
        model, digest = body.get("model"), body.get("digest")
        if not isinstance(model, str) or not isinstance(digest, str):
            raise Refused(400, "model (the path of a file) or digest (that of the model in it) is missing")
        self.supervisor.weights.request_canary(Candidate(run, model, digest))
        return json_response({"requested": True}, 202)

    async def end_canary(self, request: Request) -> Response:
        self.changing(request, "adapt")
        self.supervisor.weights.end_canary("requested by the operator")
        return json_response({"requested": True}, 202)

    async def reload(self, request: Request) -> Response:
        key = self.changing(request, "adapt")
        run = self.supervisor.adaptations.note_request((await _body_of(request)).get("run"), key)
        if not self.supervisor.setup.reloadable:
            raise Refused(409, "the server does not serve a file that could be reloaded")
        self.supervisor.request_swap(f"requested by the run {run}")
        return json_response({"requested": True}, 202)

    async def approve(self, request: Request) -> Response:
        key = self.changing(request, "approve")
        body = await _body_of(request)
        self.supervisor.adaptations.approve(body.get("run"), body.get("approved"), key)
        return json_response({"run": body.get("run"), "approved": body.get("approved")})

    # --- the monitor, and inputs

    @property
    def live(self) -> LiveMonitor:
        if self.supervisor.live is None:
            raise Refused(409, "the server has no monitor; start it with --monitor DATA")
        return self.supervisor.live

    async def monitor(self, request: Request) -> Response:
        self.permitted(request, "metrics", "adapt")
        return json_response(await run_in_threadpool(self.live.summary))

    async def labels(self, request: Request) -> Response:
        self.changing(request, "labels")
        given = (await _body_of(request)).get("labels")
        if not isinstance(given, dict):
            raise Refused(400, 'labels is no object, as in {"labels": {"REQUEST": [3]}}')
        return json_response(self.live.label(given))

    async def restart_monitor(self, request: Request) -> Response:
        self.changing(request, "adapt")
        self.live.restart()
        return json_response({"restarted": True})

    async def samples(self, request: Request) -> Response:
        self.permitted(request, "adapt")
        return Response(await run_in_threadpool(self.supervisor.samples), media_type=_BYTES)

    def flagged(self, request: Request) -> Response:
        self.permitted(request, "adapt")
        flagged = self.supervisor.setup.flagged
        if flagged is None:
            raise Refused(
                409,
                "the guard stores no inputs; its settings need store: {inputs: flagged}, then restart the server",
            )
        text = request.query_params.get("n", str(MOST))
        n = int(text) if text.isascii() and text.isdecimal() and len(text) <= len(str(MOST)) else 0
        if not 1 <= n <= MOST:
            raise Refused(400, f"n is {text[:20]!r}; expected 1 to {MOST} inputs, as in n=100")
        try:
            return Response(flagged.npz(n), media_type=_BYTES)
        except (TargetError, OSError) as error:
            raise Refused(409, f"the stored inputs cannot be read: {error}") from error


def admin_application(supervisor: Supervisor, keys: KeyFile | None) -> ASGIApplication:
    """Return the ASGI application of the operator's port. With `keys`, requests need a key with the scope of the
    request.
    """
    sessions = OperatorSessions(keys)
    port = _Operated(supervisor, keys, sessions)

    async def refused(request: Request, error: Exception) -> Response:
        if isinstance(error, Refused):
            return json_response({"error": error.reason}, error.status, dict(error.headers))
        status = error.status_code if isinstance(error, HTTPException) else 500
        return json_response({"error": REASONS.get(status, "internal error")}, status)

    handlers: dict[Any, Any] = {Refused: refused, HTTPException: refused, Exception: refused}
    routes = {
        ("GET", "/metrics"): port.metrics,
        ("GET", "/status"): port.status,
        ("POST", "/swap"): port.swap,
        ("POST", "/session"): port.session,
        ("GET", "/adaptation"): port.runs,
        ("POST", "/adaptation"): port.step,
        ("POST", "/canary"): port.begin_canary,
        ("DELETE", "/canary"): port.end_canary,
        ("POST", "/reload"): port.reload,
        ("POST", "/approval"): port.approve,
        ("GET", "/monitor"): port.monitor,
        ("POST", "/labels"): port.labels,
        ("GET", "/samples"): port.samples,
        ("POST", "/monitor/restart"): port.restart_monitor,
        ("GET", "/flagged"): port.flagged,
    }
    app = Starlette(
        routes=[
            *(Route(path, endpoint, methods=[method]) for (method, path), endpoint in routes.items()),
            *ui_routes(supervisor, port.refuse_other_host, keys),
        ],
        exception_handlers=handlers,
    )
    return OperatorAuthentication(app, sessions, _MOST_BODY)


async def _body_of(request: Request) -> Mapping[str, Any]:
    """The JSON object in the body of a request, which `OperatorAuthentication` limits."""
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise Refused(400, "the body is no JSON object")
    return body


class AdminServer:
    """The operator's port, served by a thread of the supervisor."""

    def __init__(self, supervisor: Supervisor, listener: socket.socket, keys: KeyFile | None) -> None:
        protocol = limited_protocol(_CONNECTIONS, _HEADER_S, _MOST_BODY, errors=ErrorLog())
        self._server = UvicornServer.of(admin_application(supervisor, keys), protocol)
        self._listener = listener
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [listener]}, name="admin", daemon=True
        )

    def start(self) -> None:
        """Start the thread, and wait until it answers."""
        self._thread.start()
        until = time.monotonic() + _STARTED_S
        while not self._server.started:
            if time.monotonic() > until or not self._thread.is_alive():
                raise TargetError(
                    "the operator's port did not start",
                    Remedy("admin_port", Placeholder("PORT"), reason="for another port"),
                )
            time.sleep(0.01)

    def stop(self) -> None:
        """Close the port, and wait for the end of the thread."""
        self._server.should_exit = True
        if self._thread.is_alive():
            self._thread.join()
        self._listener.close()
