"""The client of the operator's port of a server, and the proofs by which client and server know each other's key."""

import hashlib
import hmac
import json
import os
import re
import secrets
import shlex
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from hmac import compare_digest
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

from holdfast.core.errors import TargetError, UsageError
from holdfast.core.names import line
from holdfast.io.files import text_of_file
from holdfast.io.remote.limited_answers import whole_answer
from holdfast.io.remote.remote import SCHEMES

SCHEME = "Holdfast"
"""scheme of the header Authorization of a request with a proof"""
ANSWER_HEADER = "holdfast-proof"
"""header of an answer with its proof"""
NO_SESSION = 412
"""status of an authenticated answer to a request of a session that the server does not have, as after a restart"""
NONCE_BYTES = 16
_ID_DIGITS = 16


def hash_of(key: bytes) -> bytes:
    """Return the hash of an API key, which the file of a server contains."""
    return hashlib.sha256(key).digest()


def key_id(stored: bytes) -> str:
    """Return the name of a key in messages, from which neither the key nor its hash can be computed."""
    return hashlib.sha256(b"holdfast key id" + stored).hexdigest()[:_ID_DIGITS]


def new_nonce() -> str:
    """Return a random number that is used once."""
    return secrets.token_hex(NONCE_BYTES)


@dataclass(frozen=True)
class OperatorSession:
    """A session: what was agreed on before the first request."""

    key: str
    """name of the key, see `key_id`"""
    client: str
    """nonce of the client"""
    server: str
    """nonce of the server, by which it finds the session"""
    authority: str
    """header `Host` of the client"""

    def server_proof(self, stored: bytes) -> str:
        """Return the proof of the server that it has the hash of the key."""
        return _mac(stored, "server", *vars(self).values()).hex()

    def request(self, number: int, method: str, path: str, body: bytes, content_type: str) -> "ProvenRequest":
        """Return a request of the session whose proof authenticates all arguments and the session. Nothing is sent.

        `number` is 1 for the first request of the session and increases by 1; the server accepts only a larger one than
        before, so that a recorded request cannot be sent again. `path` includes the query. `content_type` is the header
        of the same name, empty without a body.
        """
        digest = hashlib.sha256(body).hexdigest()
        return ProvenRequest((*vars(self).values(), number, method, path, digest, content_type))


@dataclass(frozen=True)
class ProvenRequest:
    """A request with the values that its proofs authenticate; each proof is valid for exactly these values."""

    parts: tuple[str | int, ...]
    """the fields of the session, the number of the request, its method, its path, the SHA-256 of its body in
    hexadecimal, and its content type"""

    def veiled(self, key: bytes, stored: bytes) -> bytes:
        """Return the exclusive or of a key with the pad of the request, or the key again if it was veiled."""
        pad = hashlib.shake_256(_mac(stored, "request", *self.parts)).digest(len(key))
        return bytes(a ^ b for a, b in zip(key, pad, strict=True))

    def answer_proof(self, stored: bytes, status: int, content: bytes) -> str:
        """Return the proof of the server that an answer is that to this request."""
        return _mac(stored, "answer", *self.parts, status, hashlib.sha256(content).hexdigest()).hex()


def _mac(stored: bytes, *parts: str | int) -> bytes:
    return hmac.digest(stored, json.dumps(parts).encode(), "sha512")


Json = dict[str, Any]

ANSWER_S = 30.0
"""seconds in which a whole answer must arrive"""
_RETRY_S = 0.5
"""seconds between two attempts to connect to a server that is restarted"""
_MOST_JSON, _MOST_BYTES = 1 << 24, 1 << 28
"""largest number of bytes of an answer in JSON, and of another one"""
_NO_KEY = frozenset({401, 403})
_SHOWN = 300
"""largest number of characters of a reason that is shown"""
_NONCE = re.compile(r"[0-9a-f]{32}")
_JSON = "application/json"


class Refusal(TargetError):
    """A request that the operator's port refuses, with the status code and the reason of the server."""

    def __init__(self, message: str, status: int, reason: str) -> None:
        super().__init__(message)
        self.status, self.reason = status, reason


class Unanswered(TargetError):
    """A request without an answer that can be used: there is none in time, it is not valid, or it has no proof."""


def read_key(path: str | Path) -> str:
    """Return the API key in a file, which contains nothing else. Raises `UsageError` for another content, and
    `TargetError` if it cannot be read, or if other users than its owner and its group have access to it.
    """
    key = text_of_file(Path(path), "key file").strip()
    mode = stat.S_IMODE(Path(path).stat().st_mode)
    if os.name != "nt" and mode & stat.S_IRWXO:
        raise TargetError(
            f"the key file {str(path)!r} has the mode {mode:04o}, so that other users can read or replace the key; "
            f"expected 0600: chmod 600 {shlex.quote(str(path))}. If another user may have read it, replace the key "
            "(holdfast keys revoke NAME)"
        )
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise UsageError(
            f"the key file {str(path)!r} does not contain one API key; write into it what holdfast keys add prints"
        )
    return key


@dataclass(eq=False)
class OperatorPort:
    """Client of the operator's port at a URL without a path, such as `http://127.0.0.1:8081`. Redirects are not
    followed, and proxies are not used.

    Its methods may be called by several threads. They raise `Unanswered` if the server cannot be reached, does not
    answer as an operator's port does or, with a key, does not prove that it has its hash, `UsageError` if it does not
    accept the key, and `Refusal` for other refused requests. A server that answered before, and is restarted, is waited
    for within the time of one answer.
    """

    url: str
    key: str | None = field(default=None, repr=False)
    answer_s: float = ANSWER_S
    """seconds in which a whole answer must arrive"""
    _lock: Lock = field(default_factory=Lock, init=False, repr=False)
    _session: OperatorSession | None = field(default=None, init=False, repr=False)
    _sent: int = field(default=0, init=False, repr=False)
    """number of requests of the session"""
    _answered: bool = field(default=False, init=False, repr=False)
    _end_s: float = field(default=0.0, init=False, repr=False)
    """time at which the answer to the present request must have arrived, also if a session is begun before"""

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            usable = parts.scheme in SCHEMES and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if not usable or parts.path.strip("/") or parts.query or parts.fragment or "@" in parts.netloc:
            raise UsageError(
                f"{self.url!r} is not the address of an operator's port; expected one as in http://127.0.0.1:8081"
            )

    def get(self, path: str) -> Json:
        """Return the answer to a GET request."""
        return self._parsed(self._answer("GET", path, None))

    def post(self, path: str, body: Mapping[str, Any], *, answer_s: float | None = None) -> Json:
        """Send a body, and return the answer, which must arrive within `answer_s` seconds if they are given."""
        return self._parsed(self._answer("POST", path, json.dumps(body).encode(), answer_s=answer_s))

    def delete(self, path: str) -> Json:
        """Return the answer to a DELETE request."""
        return self._parsed(self._answer("DELETE", path, None))

    def read(self, path: str) -> bytes:
        """Return the content at a path that is not JSON."""
        return self._answer("GET", path, None, _MOST_BYTES)

    def _answer(
        self,
        method: str,
        path: str,
        body: bytes | None,
        most: int = _MOST_JSON,
        *,
        answer_s: float | None = None,
    ) -> bytes:
        limit_s = answer_s or self.answer_s
        end_s = time.monotonic() + limit_s
        # the numbers of the requests of a session increase in the order of their arrival
        if not self._lock.acquire(timeout=limit_s):
            raise self._late()
        try:
            self._end_s = end_s
            if self.key is None:
                status, _, content = self._exchanged(method, path, body, {}, most)
            else:
                status, content = self._proven(self.key.encode(), method, path, body, most)
            self._answered = True
        finally:
            self._lock.release()
        if not 200 <= status < 300:
            raise self._refusal(method, path, status, content)
        return content

    def _exchanged(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str], most: int
    ) -> tuple[int, str, bytes]:
        """Send a request, and return the status, the proof (empty without one) and the content of the answer."""
        parts = urlsplit(self.url)
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        sent = {**headers, "Host": self._authority, **({} if body is None else {"Content-Type": _JSON})}
        while True:
            connection = kind(parts.hostname or "", parts.port or SCHEMES[parts.scheme])
            remaining_s = self._end_s - time.monotonic()
            if remaining_s <= 0:
                raise self._late()
            try:
                response, content = whole_answer(
                    connection, method, path, body, sent, timeout_s=remaining_s, most=most
                )
                return response.status, response.headers.get(ANSWER_HEADER, ""), content
            except ConnectionRefusedError as error:
                if not self._answered or remaining_s <= _RETRY_S:
                    raise self._unreachable(str(error)) from error
                time.sleep(_RETRY_S)
            except TimeoutError as error:
                raise self._unreachable("there was no whole answer in time") from error
            except HTTPException as error:
                raise self._unreachable(str(error) or type(error).__name__, "has no valid answer") from error
            except (OSError, UnicodeError) as error:
                raise self._unreachable(str(error) or type(error).__name__) from error

    def _late(self) -> Unanswered:
        return self._unreachable(f"none arrived as a whole within {self.answer_s:g} s", "has no valid answer")

    @property
    def _authority(self) -> str:
        return urlsplit(self.url).netloc

    def _unreachable(self, reason: str, fault: str = "cannot be reached") -> Unanswered:
        return Unanswered(
            f"the operator's port {self.url} {fault} ({line(reason)[:_SHOWN]}); check the address, and "
            "whether the server runs"
        )

    # --- proofs

    def _proven(self, key: bytes, method: str, path: str, body: bytes | None, most: int) -> tuple[int, bytes]:
        """Send a request with a proof, and return the status and the content of the answer, whose proof is right."""
        stored = hash_of(key)
        for _ in range(2):
            session = self._session or self._begun(stored)
            self._session, self._sent = session, self._sent + 1
            given = body or b""
            request = session.request(self._sent, method, path, given, "" if body is None else _JSON)
            proof = request.veiled(key, stored).hex()
            header = f"{SCHEME} {session.key} {session.client} {session.server} {self._sent} {proof}"
            status, answer, content = self._exchanged(method, path, body, {"Authorization": header}, most)
            if not _equal(answer, request.answer_proof(stored, status, content)):
                raise self._unproven()
            if status != NO_SESSION:
                return status, content
            self._session = None
        raise self._unproven()

    def _begun(self, stored: bytes) -> OperatorSession:
        """Begin a session. Raises `Unanswered` if the server does not prove that it has the hash of the key."""
        name, nonce = key_id(stored), new_nonce()
        body = json.dumps({"key": name, "nonce": nonce}).encode()
        _, _, content = self._exchanged("POST", "/session", body, {}, _MOST_JSON)
        try:
            answer = self._parsed(content)
        except Unanswered:
            answer = {}
        server, proof = str(answer.get("nonce")), str(answer.get("proof"))
        session = OperatorSession(name, nonce, server, self._authority)
        if not _NONCE.fullmatch(server) or not _equal(proof, session.server_proof(stored)):
            raise self._unproven()
        self._sent = 0
        return session

    def _unproven(self) -> Unanswered:
        return Unanswered(
            f"{self.url} did not prove that it is the server of this key: it is another server, it runs without "
            "--keys, or its file of keys does not contain the key. The key was not sent; check the address and what "
            "listens there, compare the file of keys (holdfast keys list), and leave the key file out for a server "
            "without keys"
        )

    # --- contents

    def _refusal(self, method: str, path: str, status: int, content: bytes) -> TargetError | UsageError:
        try:
            reason = line(str(json.loads(content)["error"]))[:_SHOWN]
        except (ValueError, LookupError, TypeError, RecursionError):
            reason = ""
        if status in _NO_KEY and self.key is None:
            return UsageError(
                f"the operator's port {self.url} needs a key: {reason or status}; give a file that contains one as the "
                "key file (holdfast keys add creates it)"
            )
        if status in _NO_KEY:
            return UsageError(
                f"the operator's port {self.url} does not accept the key: {reason or status}; create one with holdfast "
                "keys add NAME --scope SCOPE, and give the file that contains it as the key file"
            )
        return Refusal(f"{self.url} refuses {method} {path}: {reason or status}", status, reason)

    def _parsed(self, content: bytes) -> Json:
        try:
            answer = json.loads(content.decode(), parse_constant=_refuse_constant)
            json.dumps(answer, ensure_ascii=False).encode()  # half of a surrogate pair cannot be shown
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise Unanswered(
                f"{self.url} did not answer with a JSON object; give the address of an operator's port"
            )
        return answer


def _equal(proof: str, expected: str) -> bool:
    return compare_digest(proof.encode("utf-8", "replace"), expected.encode())


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no number in JSON")
