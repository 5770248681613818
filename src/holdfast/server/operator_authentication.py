"""Authenticates requests to the operator's port whose client proves that it has a key, and the answers to them.

See `holdfast.io.remote.operator_port` for the proofs. The sessions are in memory, so that a client begins a new one
after a restart.
"""

import asyncio
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hmac import compare_digest

from holdfast.io.remote.operator_port import (
    ANSWER_HEADER,
    NO_SESSION,
    SCHEME,
    OperatorSession,
    ProvenRequest,
    hash_of,
    new_nonce,
)
from holdfast.server.asgi import ASGIApplication, Message, Receive, Send, WholeResponse, replayed, whole_body
from holdfast.server.guarded_routes import Scope
from holdfast.server.keys import ApiKey, KeyFile
from holdfast.server.protocol_v2 import JSON, compact
from holdfast.server.requests import Refused

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
