"""The port of the operator: metrics for Prometheus, the state of the server, swaps and reloads, and the page `/ui`."""

import socket
import threading
import time
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from holdfast.core.errors import TargetError, UsageError
from holdfast.core.remedies import Placeholder, Remedy
from holdfast.server.adaptation_routes import MOST_BODY, adaptation_routes, body_of
from holdfast.server.connections import limited_protocol
from holdfast.server.error_log import ErrorLog
from holdfast.server.flagged_inputs import flagged_routes
from holdfast.server.host_names import HostNames
from holdfast.server.http_refusals import Refused
from holdfast.server.keys import ADMIN, ApiKey, KeyFile
from holdfast.server.monitor_routes import monitor_routes
from holdfast.server.operator_authentication import (
    OperatorAuthentication,
    OperatorSessions,
    proven_key,
)
from holdfast.server.protocol_v2 import JSON, compact
from holdfast.server.supervisor import Supervisor
from holdfast.server.ui import ui_routes
from holdfast.server.uvicorn_server import UvicornServer
from holdfast.server.whole_messages import ASGIApplication

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_CONNECTIONS, _HEADER_S = 64, 10.0
_STARTED_S = 10.0


@dataclass(frozen=True)
class _Access:
    """Decides which requests are permitted."""

    hosts: HostNames
    keys: KeyFile | None

    def refuse_other_host(self, request: Request) -> None:
        self.hosts.refuse_other(request.scope["headers"])

    def permitted(self, request: Request, *scopes: str) -> ApiKey | None:
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
        key = self.permitted(request, *scopes)
        # a page in the operator's browser could send this request without a key
        if "origin" in request.headers:
            raise Refused(403, "requests of web pages are not accepted")
        return key


def admin_application(supervisor: Supervisor, keys: KeyFile | None) -> ASGIApplication:
    """Return the ASGI application of the operator's port. With `keys`, requests need a key with the scope of the
    request.
    """
    sessions, access = OperatorSessions(keys), _Access(supervisor.setup.worker.admin_hosts, keys)
    permitted, changing = access.permitted, access.changing

    async def metrics(request: Request) -> Response:
        permitted(request, "metrics")
        return Response(supervisor.totals.text(), media_type=METRICS_TYPE)

    async def status(request: Request) -> Response:
        key = permitted(request, "metrics", "adapt")
        detailed = key is None or key.permits("adapt")
        return Response(compact(supervisor.status(detailed=detailed)), media_type=JSON)

    async def swap(request: Request) -> Response:
        changing(request, ADMIN)
        try:
            supervisor.request_swap("requested by the operator")
        except UsageError as error:
            raise Refused(409, str(error)) from error
        return Response(compact({"requested": True}), 202, media_type=JSON)

    async def session(request: Request) -> Response:
        access.refuse_other_host(request)
        body = await body_of(request)
        begun = sessions.begin(body.get("key"), body.get("nonce"), request.headers.get("host", ""))
        return Response(compact(begun), media_type=JSON)

    async def refused(request: Request, error: Exception) -> Response:
        if isinstance(error, Refused):
            return Response(
                compact({"error": error.reason}), error.status, dict(error.headers), media_type=JSON
            )
        status = error.status_code if isinstance(error, HTTPException) else 500
        reason = {404: "there is nothing at this path", 405: "this method is not supported at this path"}
        return Response(compact({"error": reason.get(status, "internal error")}), status, media_type=JSON)

    handlers: dict[Any, Any] = {Refused: refused, HTTPException: refused, Exception: refused}
    routes = [
        Route("/metrics", metrics, methods=["GET"]),
        Route("/status", status, methods=["GET"]),
        Route("/swap", swap, methods=["POST"]),
        Route("/session", session, methods=["POST"]),
        *adaptation_routes(supervisor, permitted, changing),
        *monitor_routes(supervisor, permitted, changing),
        *flagged_routes(supervisor.setup.flagged, lambda request: permitted(request, "adapt")),
        *ui_routes(supervisor, access.refuse_other_host, keys),
    ]
    app = Starlette(routes=routes, exception_handlers=handlers)
    return OperatorAuthentication(app, sessions, MOST_BODY)


class AdminServer:
    """The operator's port, served by a thread of the supervisor."""

    def __init__(self, supervisor: Supervisor, listener: socket.socket, keys: KeyFile | None) -> None:
        protocol = limited_protocol(_CONNECTIONS, _HEADER_S, MOST_BODY, errors=ErrorLog())
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
