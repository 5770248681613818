"""The port of the operator: authentication, metrics for Prometheus, the state of the server, swaps, reloads and
canaries.
"""

import asyncio
import json
import re
import secrets
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hmac import compare_digest
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from holdfast.core.errors import Placeholder, Remedy, TargetError, UsageError
from holdfast.io.remote.operator_port import (
    ANSWER_HEADER,
    NO_SESSION,
    SCHEME,
    OperatorSession,
    ProvenRequest,
    hash_of,
    new_nonce,
)
from holdfast.server.app import REASONS, json_response
from holdfast.server.asgi import (
    ASGIApplication,
    Message,
    Receive,
    Scope,
    Send,
    UvicornServer,
    WholeResponse,
    replayed,
    whole_body,
)
from holdfast.server.connections import limited_protocol
from holdfast.server.keys import ADMIN, ApiKey, KeyFile
from holdfast.server.live_monitor import LiveMonitor
from holdfast.server.messages import Candidate
from holdfast.server.protocol_v2 import JSON, compact
from holdfast.server.requests import ErrorLog, Refused
from holdfast.server.server_setup import MOST
from holdfast.server.supervisor import Supervisor
from holdfast.server.ui import ui_routes

SESSION_S, UNPROVEN_S = 3600.0, 30.0
"""seconds after its beginning in which a session is used, and in which its first request must arrive"""
_MOST_PROVEN, _MOST_UNPROVEN = 64, 256
"""numbers of sessions above which the oldest ones end. Only a client with a key can have one of the first kind."""
_BODY_S = 10.0
"""seconds in which the body of a request must arrive"""
_PROOF = re.compile(
    rf"{SCHEME} ([0-9a-f]{{16}}) ([0-9a-f]{{32}}) ([0-9a-f]{{32}}) ([0-9]{{1,15}}) ((?:[0-9a-f]{{2}}){{1,1000}})"
)
"""header Authorization: name of the key, nonces of client and server, number and proof of the request"""
_SINGLE = (b"authorization", b"content-type", b"host")
_BEGIN = re.compile(r"[0-9a-f]{16} [0-9a-f]{32}")
"""name of a key and nonce of the client in a request that begins a session"""
_KEY = "operator_key"
"""entry of the state of a request with the key that its client has proven"""


def proven_key(scope: Scope) -> ApiKey | None:
    """Return the key that the client of a request has proven; None without a proof."""
    key: ApiKey | None = scope.get("state", {}).get(_KEY)
    return key


@dataclass(eq=False)
class _Begun:
    """A session with the time of its beginning and the number of its last request."""

    session: OperatorSession
    begun_s: float
    last: int = 0


@dataclass(eq=False)
class OperatorSessions:
    """The sessions of the operator's port. Its methods are called by one thread."""

    keys: KeyFile | None
    clock: Callable[[], float] = time.monotonic
    _unknown: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)
    """hash in place of that of a key that does not exist"""
    _unproven: OrderedDict[str, _Begun] = field(default_factory=OrderedDict, repr=False)
    _proven: OrderedDict[str, _Begun] = field(default_factory=OrderedDict, repr=False)

    def begin(self, key: object, nonce: object, authority: str) -> dict[str, str]:
        """Return the nonce and the proof of the server for a client that names its key.

        An answer for a key that does not exist differs only for a client that has the key. Raises `Refused`.
        """
        if self.keys is None:
            raise Refused(409, "the server has no keys")
        if not isinstance(key, str) or not isinstance(nonce, str) or not _BEGIN.fullmatch(f"{key} {nonce}"):
            raise Refused(400, "key or nonce is missing, or not hexadecimal")
        session, found = OperatorSession(key, nonce, new_nonce(), authority), self.keys.named(key)
        if found is not None:
            self._unproven[session.server] = _Begun(session, self.clock())
            while len(self._unproven) > _MOST_UNPROVEN:
                self._unproven.popitem(last=False)
        stored = self._unknown if found is None else bytes.fromhex(found.hash)
        return {"nonce": session.server, "proof": session.server_proof(stored)}

    def take(self, session: OperatorSession, number: int) -> None:
        """Note a request of a session whose proof is right. Raises `Refused` for a session that the server does not
        have, and for a request that it has received before.
        """
        now, name = self.clock(), session.server
        begun = self._proven.get(name) or self._unproven.pop(name, None)
        lasts_s = SESSION_S if name in self._proven else UNPROVEN_S
        if begun is None or begun.session != session or now - begun.begun_s > lasts_s:
            raise Refused(NO_SESSION, "the session has ended; begin another one")
        if number <= begun.last:
            raise Refused(409, "the request was received before, and is not answered again")
        begun.last = number
        self._proven[name] = begun
        self._proven.move_to_end(name)
        while len(self._proven) > _MOST_PROVEN:
            self._proven.popitem(last=False)


@dataclass(eq=False)
class OperatorAuthentication:
    """ASGI middleware that reads bodies as a whole, in limited time, and authenticates requests and answers.

    Requests without a proof are passed on; the application refuses them if they need a key and contain none.
    """

    app: ASGIApplication
    sessions: OperatorSessions
    most_body: int

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(_BODY_S):
                body = await whole_body(receive, self.most_body)
        except TimeoutError:
            await _refuse(send, Refused(408, "the body did not arrive in time"))
            return
        if body is None:
            await _refuse(send, Refused(413, f"the body has more than {self.most_body} bytes"))
            return
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if not any(value.startswith(f"{SCHEME} ".encode()) for value in given):
            await self.app(scope, replayed(body, receive), send)
            return
        try:
            key, session, number, request = self._received(scope, body)
        except Refused as error:
            await _refuse(send, error)
            return
        stored, response = bytes.fromhex(key.hash), WholeResponse()
        try:
            self.sessions.take(session, number)
            scope.setdefault("state", {})[_KEY] = key
            await self.app(scope, replayed(body, receive), response)
        except Refused as error:
            await _refuse(response, error)
        finally:
            proof = request.answer_proof(stored, response.status, response.body)
            if response.start:
                headers = [*response.start.get("headers", ()), (ANSWER_HEADER.encode(), proof.encode())]
                response.start = {**response.start, "headers": headers}
            await response.send_to(send)

    def _received(self, scope: Scope, body: bytes) -> tuple[ApiKey, OperatorSession, int, ProvenRequest]:
        """Return the key, the session, the number and the content of a request whose proof is right. Raises
        `Refused` for others, to which the answer has no proof.
        """
        values = {name: _single_value(scope["headers"], name) for name in _SINGLE}
        found = _PROOF.fullmatch(values[b"authorization"])
        if found is None:
            raise Refused(401, "the header Authorization is not valid", (), "key")
        name, client, server, number, proof = found.groups()
        key = None if self.sessions.keys is None else self.sessions.keys.named(name)
        session = OperatorSession(name, client, server, values[b"host"])
        raw = scope.get("raw_path") or scope["path"].encode()
        path = b"?".join(part for part in (raw, scope["query_string"]) if part).decode("latin-1")
        request = session.request(int(number), scope["method"], path, body, values[b"content-type"])
        stored = b"" if key is None else bytes.fromhex(key.hash)
        if key is None or not compare_digest(hash_of(request.veiled(bytes.fromhex(proof), stored)), stored):
            raise Refused(401, "the proof is not right", (), "key")
        return key, session, int(number), request


def _single_value(headers: Sequence[tuple[bytes, bytes]], name: bytes) -> str:
    """Return the value of a header that a request has at most once."""
    values = [value for key, value in headers if key == name]
    if len(values) > 1:
        raise Refused(400, f"the request has the header {name.decode()} twice")
    return values[0].decode("latin-1") if values else ""


async def _refuse(send: Send, error: Refused) -> None:
    body = compact({"error": error.reason})
    headers = [
        (b"content-type", JSON.encode()),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),  # the rest of the body may still arrive
        *((name.encode(), value.encode()) for name, value in error.headers),
    ]
    start: Message = {"type": "http.response.start", "status": error.status, "headers": headers}
    await send(start)
    await send({"type": "http.response.body", "body": body})


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
