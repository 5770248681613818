"""Options for a model behind HTTP, answers of servers with limits of size and time, and the client of the operator's
port.
"""

import hashlib
import hmac
import json
import os
import re
import secrets
import shlex
import stat
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from hmac import compare_digest
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from io import BufferedReader, RawIOBase
from pathlib import Path
from socket import SocketIO, socket
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import SplitResult, urlsplit

from holdfast.core.errors import TargetError, UsageError, model_argument
from holdfast.core.names import line
from holdfast.io.files import text_of_file

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


_CONNECT_S = 10.0
"""seconds in which a connection to one address of a host must be accepted"""
_HEAD_BYTES = 96 * 1024
"""largest number of bytes before the content of an answer, with informational responses"""
_FRAMED = 2
"""largest number of received bytes for each byte of a content, which may be sent in chunks"""
_CHUNK = 1 << 16


class LimitedReader(RawIOBase):
    """Reader of a socket that raises `TimeoutError` when no seconds remain, even if data still arrive in small pieces,
    and `HTTPException` after `most` bytes.
    """

    def __init__(
        self, sock: socket, raw: SocketIO, remaining_s: Callable[[], float], most: float = float("inf")
    ) -> None:
        self._sock, self._raw, self._remaining_s, self.left = sock, raw, remaining_s, most

    def readable(self) -> bool:
        """Return that bytes can be read."""
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int | None:
        """Read bytes into a buffer, and return their number."""
        remaining_s = self._remaining_s()
        if remaining_s <= 0:
            raise TimeoutError
        self._sock.settimeout(remaining_s)
        n = self._raw.readinto(buffer)
        self.left -= n or 0
        if self.left < 0:
            raise HTTPException("the answer is too large")
        return n

    def close(self) -> None:
        """Close the reader of the socket."""
        self._raw.close()
        super().close()


def whole_answer(
    connection: HTTPConnection,
    method: str,
    path: str,
    body: bytes | None,
    headers: dict[str, str],
    *,
    timeout_s: float,
    most: int,
) -> tuple[HTTPResponse, bytes]:
    """Send a request over a new connection, which is closed then, and return the response with its whole content.

    Both together, with the connection, take at most `timeout_s` seconds, and the content has at most `most` bytes.
    Raises `HTTPException` and `OSError`, of which `TimeoutError` is one.
    """
    end, readers = time.monotonic() + timeout_s, list[LimitedReader]()

    def remaining_s() -> float:
        return end - time.monotonic()

    def response_of(sock: socket, method: str | None) -> HTTPResponse:
        response = HTTPResponse(sock, method=method)
        # The file object that HTTPResponse opened has no limits, so it is replaced before anything is read from it.
        response.fp.close()
        readers.append(LimitedReader(sock, sock.makefile("rb", buffering=0), remaining_s, _HEAD_BYTES))
        response.fp = BufferedReader(readers[0])
        return response

    connection.response_class = response_of  # type: ignore[assignment]
    connection.timeout = min(_CONNECT_S, timeout_s)
    try:
        connection.connect()
        connection.sock.settimeout(max(remaining_s(), 1e-3))
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        readers[0].left += _FRAMED * most
        pieces, size = [], 0
        while piece := response.read1(_CHUNK):
            pieces.append(piece)
            size += len(piece)
            if size > most:
                raise HTTPException(f"the answer has more than {most:,} bytes")
        if response.length:  # read1 returns no error if the server closes the connection early
            raise ConnectionError(f"the answer was cut off {response.length:,} bytes before its end")
        return response, b"".join(pieces)
    finally:
        connection.close()
        for reader in readers:  # a response without a length is not closed with its connection
            reader.close()


SCHEMES = {"http": 80, "https": 443}
"""Supported schemes, with the default port of each."""
_EXAMPLE = "http://localhost:8000/v2/models/NAME"
_FRAMING = frozenset({"host", "connection", "content-length", "transfer-encoding"})
_HEADER = re.compile(r"\s*([!#$%&'*+.^_`|~0-9A-Za-z-]+)\s*:\s*(.*?)\s*")
_VARIABLE = re.compile(r"env:([A-Za-z_][A-Za-z0-9_]*)")


@dataclass(frozen=True)
class Remote:
    """Options of the HTTP requests to a model behind a server, such as allowed hosts, headers and timeouts."""

    hosts: tuple[str, ...] = ()
    """hosts to which requests may be sent, each `HOST` or `HOST:PORT`"""
    headers: tuple[str, ...] = ()
    """headers of every request, each `NAME: env:VARIABLE`"""
    request: str | None = None
    """JSON of a request with `$x` in place of its rows, or `$x_one` in place of one example without a batch axis

    With `$x_one` each request has one example. None means the Open Inference Protocol.
    """
    response: str | None = None
    """location of the scores or labels in the response: a path such as `predictions`, or the name of an output"""
    labels: bool = False
    """whether the response contains one label for each row, by number or name, instead of scores"""
    max_rows: int = 64
    """largest number of rows of one request"""
    timeout_s: float = 30.0
    """largest duration in seconds of a pause within a response, and of a whole response"""
    retries: int = 5
    """how often a request that failed temporarily is repeated"""
    concurrency: int = 1
    """largest number of requests at the same time"""
    rate: float | None = None
    """largest number of requests per second; None means no limit"""
    max_queries: int | None = None
    """largest number of rows that a run may send, including earlier attempts; None means no limit"""
    on_refused: Literal["reject", "stop"] = "reject"
    """what happens with an attacked input that the server rejects: it is recorded as rejected, or the run stops"""
    sleep: Callable[[float], object] | None = None
    """function that waits for a number of seconds; None means to wait for that time or until the run is stopped"""
    now: Callable[[], float] = time.monotonic


KEY = model_argument("headers", ("Authorization: env:MODEL_TOKEN",), "--header", repeated=True)
"""header with a key of the server that is in an environment variable"""


def header_variable(text: str) -> tuple[str, str]:
    """Return the name of an HTTP header, and the name of the environment variable that contains its value.

    Raises `UsageError` for a literal value, because it would be stored in the evidence.
    """
    header = _HEADER.fullmatch(text)
    if header is None:
        raise UsageError("a header has no name; 'NAME: env:VARIABLE' was expected", KEY)
    variable = _VARIABLE.fullmatch(header[2])
    if variable is None:
        raise UsageError(
            f"the value of the header {header[1]} is given literally, so it would be stored in the evidence; set an "
            "environment variable to it, and give the name of the variable",
            model_argument("headers", (f"{header[1]}: env:MODEL_TOKEN",), "--header", repeated=True),
        )
    if header[1].lower() in _FRAMING:
        raise UsageError(f"the header {header[1]} is set automatically by the connection; omit it")
    return header[1], variable[1]


def allowed_address(address: str, hosts: Iterable[str]) -> SplitResult:
    """Return the parts of the URL of a model if its host is one of `hosts`. Raises `UsageError`, with advice, for other
    addresses.
    """
    try:
        parts = urlsplit(address)
        port = parts.port or SCHEMES.get(parts.scheme)
        (parts.hostname or "").encode("idna")  # the encoding that the connection uses
    except ValueError as error:
        raise UsageError(f"{address!r} is not a valid URL ({error}); give one such as {_EXAMPLE}") from error
    # The message does not contain the address, because that would show the password.
    if "@" in parts.netloc:
        raise UsageError(
            "the address contains a user name or a password, which would be stored in the evidence; leave them out of "
            "it",
            KEY,
        )
    # Spaces, control characters and characters outside ASCII are not allowed in a URL.
    if parts.scheme not in SCHEMES or not parts.hostname or re.search(r"[^\x21-\x7e]", address):
        raise UsageError(f"{address!r} is not the address of a server; give one such as {_EXAMPLE}")
    if not any(_same_host(host, parts.hostname, port) for host in hosts):
        allowed = ", ".join(hosts)
        other_hosts = f"; only {allowed} {'is' if ',' not in allowed else 'are'} allowed" if allowed else ""
        raise UsageError(
            f"{address!r} is a server, and requests are sent only to allowed hosts{other_hosts}",
            model_argument(
                "allow_hosts", (parts.netloc,), "--allow-host", repeated=True, reason="if you may attack it"
            ),
        )
    return parts


def _same_host(host: str, hostname: str, port: int | None) -> bool:
    try:
        allowed = urlsplit(f"//{host}")
        allowed_port = allowed.port
    except ValueError:
        allowed, allowed_port = None, None
    if allowed is None or not allowed.hostname or allowed.netloc != host:
        raise UsageError(f"an allowed host is {host}; HOST or HOST:PORT was expected, as in localhost:8000")
    return allowed.hostname == hostname.lower() and allowed_port in (None, port)


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
        """Return a request of the session. `path` includes the query."""
        digest = hashlib.sha256(body).hexdigest()
        return ProvenRequest((*vars(self).values(), number, method, path, digest, content_type))


@dataclass(frozen=True)
class ProvenRequest:
    """A request, of which each part is authenticated."""

    parts: tuple[str | int, ...]

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
