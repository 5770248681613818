"""HTTP client that sends requests to a model server, repeats them after temporary failures, and limits their rate."""

import json
import os
import re
import ssl
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from io import BufferedReader, RawIOBase
from socket import SHUT_RDWR, SocketIO, gaierror, socket
from threading import Event, Lock
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult

from holdfast.core.errors import InputRefused, TargetLost, UsageError
from holdfast.sources.remote import SCHEMES, Remote, header_variable
from holdfast.sources.sent import Sent


class RequestPace:
    """Rate limiter that the HTTP requests of all threads share: at most `rate` requests start per second, and none
    during a pause.
    """

    def __init__(
        self, rate: float | None, now: Callable[[], float], sleep: Callable[[float], object]
    ) -> None:
        self._rate, self._now, self._sleep = rate, now, sleep
        self._lock = Lock()
        self._next = self._paused = 0.0
        """earliest start of the next request, and end of the pause"""

    def wait(self, waited: float = 0.0) -> None:
        """Block until the rate limit permits the next HTTP request. `waited` is the time until which the caller has
        already waited.
        """
        while True:
            with self._lock:
                begin = max(waited, self._paused)
                if self._rate is not None:
                    begin = max(begin, self._now(), self._next)
                    self._next = begin + 1 / self._rate
            left = begin - self._now()
            if begin > waited and left > 0:
                self._sleep(left)
            if (
                self._paused <= begin
            ):  # otherwise a pause began meanwhile, and the requests after it are spread again
                return
            waited = begin

    def pause(self, seconds: float) -> float:
        """Start no HTTP requests for a number of seconds. Return the time at which the pause ends."""
        with self._lock:
            until = self._now() + seconds
            self._paused = max(self._paused, until)
        return until


if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

LONGEST_WAIT_S = 60.0
"""Longest pause in seconds that a server may request. A longer one ends the run, which can be resumed later."""
_FIRST_WAIT_S, _LAST_WAIT_S = 0.5, 30.0
_MOST_BYTES = 1 << 26
"""Largest number of bytes of a response.

It is enough for the scores of some hundred rows with ten thousand classes as decimal numbers; a request has 64 rows by
default.
"""
_CHUNK = 1 << 16
_LETTERS = 4  # shorter strings are not secret, and occur in many words
_LETTERS_OF_NAME = (
    8  # for names: a tensor may be called `input`, and a header's value may begin with these letters
)
_NOBODY = (ConnectionRefusedError, gaierror, ssl.SSLError)
"""Errors of the first request that mean that the server does not exist."""
_PASSING = frozenset({408, 425, 429})
_OF_THE_INPUT = frozenset({400, 413, 415, 422})


@dataclass(eq=False)
class _InPassing(Exception):
    """Error for a failed request that may succeed in another attempt."""

    what: str
    """kind of the failure, by which failures are counted"""
    detail: str = ""
    """beginning of the response, for the message after the last attempt"""
    wait_s: float | None = None
    """pause in seconds that the server requests"""
    at_once: bool = False
    """whether the server closed an idle connection, which is normal"""
    of_the_request: bool = False
    """whether the failure may be due to a request that the server does not understand"""


class _Within(RawIOBase):
    """Reader of a socket that raises `TimeoutError` when `late` returns True, even if data still arrive in small
    pieces.
    """

    def __init__(self, raw: SocketIO, late: Callable[[], bool]) -> None:
        self._raw, self._late = raw, late

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int | None:
        if self._late():
            raise TimeoutError
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class Client:
    """HTTP client of one model server. A request that fails temporarily is repeated after increasing pauses.

    Raises `TargetLost` if the last repetition fails, and `InputRefused` if the server rejects the content of a request.
    Redirects are not followed and proxies are not used. Several threads may send requests at the same time, each over
    its own connection. They share the limit of the request rate and the pauses that the server requests.
    """

    def __init__(self, parts: SplitResult, remote: Remote) -> None:
        self._idle: list[HTTPConnection] = []
        self._busy: set[HTTPConnection] = set()
        self._lock = Lock()
        self._stopped = Event()
        self._sleep = remote.sleep or self._stopped.wait
        self._parts, self._remote = parts, remote
        self._pace = RequestPace(remote.rate, remote.now, self._sleep)
        self._headers = {
            name: _value(name, variable) for name, variable in map(header_variable, remote.headers)
        }
        self._met = self._answered = False
        """whether the server was reached, and whether it responded to a request with rows"""

    def __del__(self) -> None:
        for connection in self._idle:
            connection.close()

    def ask(self, path: str, body: bytes | None = None, *, sent: Sent | None = None, rows: int = 0) -> Any:
        """Send an HTTP request to the server and return its response, parsed as JSON.

        If `body` is given, it is sent by POST; otherwise the request is a GET. `rows` is the number of rows in `body`.
        Every attempt is counted in `sent`.
        """
        sent, waited = sent or Sent(), 0.0
        for attempt in range(self._remote.retries + 1):
            self._pace.wait(waited)
            sent.sending(rows)
            try:
                found = self._once(path, body)
            except _InPassing as failure:
                waited = max(waited, self._wait(failure, attempt, sent, rows))
            else:
                return found
        raise AssertionError("the last attempt returns or raises")

    def stop(self) -> None:
        """Abort the current HTTP requests of all threads without waiting for the responses."""
        with self._lock:
            self._stopped.set()
            for connection in self._busy:
                if connection.sock is not None:
                    with suppress(OSError):
                        connection.sock.shutdown(SHUT_RDWR)

    def go_on(self) -> None:
        """Permit HTTP requests again after a call of `stop`."""
        self._stopped.clear()

    def _wait(self, failure: _InPassing, attempt: int, sent: Sent, rows: int) -> float:
        """Wait before the next attempt. Return the time until which the server requests a pause, or 0.

        Raises `TargetLost` after the last attempt.
        """
        wait = max(failure.wait_s or 0.0, min(_LAST_WAIT_S, _FIRST_WAIT_S * 2**attempt))
        if attempt == (min(1, self._remote.retries) if failure.of_the_request else self._remote.retries):
            times = {0: "once", 1: "twice"}.get(attempt, f"{attempt + 1} times")
            way_out = "--http-timeout and --http-retries wait longer, --http-max-rows asks less at once"
            if failure.of_the_request:
                way_out = (
                    "no request was answered before, so compare --http-request and the shape of the data with what the "
                    "model takes"
                )
            raise TargetLost(
                f"{self._where}: {failure.what}{failure.detail} (asked {times}); check the server; {way_out}"
            )
        if wait > LONGEST_WAIT_S:
            raise TargetLost(f"{self._where}: {failure.what}, and it asks to be left alone for {wait:,.0f} s")
        if self._stopped.is_set():
            raise TargetLost(f"{self._where}: the run was stopped")
        sent.failed(failure.what, rows)
        until = 0.0 if failure.wait_s is None else self._pace.pause(wait)
        self._sleep(0.0 if failure.at_once and attempt == 0 else wait)
        return until

    @property
    def _where(self) -> str:
        return f"{self._parts.scheme}://{self._parts.netloc}"

    def _once(self, path: str, body: bytes | None) -> Any:
        kept, connection = self._taken()
        began = whole = False
        try:
            headers = {"Accept": "application/json", "Accept-Encoding": "identity", **self._headers}
            if body is not None:
                headers["Content-Type"] = "application/json"
            with suppress(
                BrokenPipeError
            ):  # a server that refuses a large body may answer and close the connection before the body is complete
                connection.request("GET" if body is None else "POST", path, body, headers)
            with closing(connection.getresponse()) as answer:
                self._met = began = True
                content = self._content(answer)
            whole = not answer.will_close
        except ssl.SSLCertVerificationError as error:
            way_out = "SSL_CERT_FILE may name the authority that signed it"
            raise TargetLost(
                f"{self._where} has no certificate that holds: {error.verify_message}; {way_out}"
            ) from error
        except TimeoutError as error:
            raise _InPassing(f"no answer within {self._remote.timeout_s:g} s") from error
        except (HTTPException, OSError) as error:
            if not self._met and isinstance(error, _NOBODY):
                way_out = "check the address, and that the server runs"
                raise TargetLost(f"{self._where} cannot be reached ({_said(error)}); {way_out}") from error
            idle = kept is not None and not began
            raise _InPassing(
                "the connection failed", f" ({self._clean(_said(error))})", at_once=idle
            ) from error
        finally:
            with self._lock:
                self._busy.discard(connection)
                if whole:
                    self._idle.append(connection)
            if not whole:
                connection.close()
        return self._read(answer, content, sent_rows=body is not None)

    def _taken(self) -> tuple[HTTPConnection | None, HTTPConnection]:
        """Return an idle open connection or None, and the connection to use: that one or a new one."""
        with self._lock:
            kept = self._idle.pop() if self._idle else None
            connection = kept or self._connected()
            self._busy.add(connection)
            return kept, connection

    def _connected(self) -> HTTPConnection:
        kind = HTTPSConnection if self._parts.scheme == "https" else HTTPConnection
        assert self._parts.hostname is not None
        # without a port, `kind` would take the text after the last colon of an IPv6 address as the port
        port = self._parts.port or SCHEMES[self._parts.scheme]
        connection = kind(self._parts.hostname, port, timeout=self._remote.timeout_s)
        connection.response_class = self._answer  # type: ignore[assignment]
        return connection

    def _answer(self, sock: socket, method: str | None) -> HTTPResponse:
        """Return a response object whose header and body must together arrive within the timeout."""
        answer, deadline = HTTPResponse(sock, method=method), self._remote.now() + self._remote.timeout_s
        answer.fp.close()
        raw = _Within(sock.makefile("rb", buffering=0), lambda: self._remote.now() > deadline)
        answer.fp = BufferedReader(raw)
        return answer

    def _content(self, answer: HTTPResponse) -> bytes:
        """Return the whole body of a response. Raises `TargetLost` if it is too large."""
        pieces, size = [], 0
        while piece := answer.read1(_CHUNK):
            pieces.append(piece)
            size += len(piece)
            if size > _MOST_BYTES:
                raise TargetLost(
                    f"{self._where} answers with more than {_MOST_BYTES >> 20} MiB; scores were expected"
                )
        if answer.length:
            raise ConnectionError(f"cut off {answer.length} bytes before its end")
        return b"".join(pieces)

    def _read(self, answer: HTTPResponse, content: bytes, *, sent_rows: bool) -> Any:
        status = answer.status
        said = status_line(status)
        packed = answer.getheader("Content-Encoding", "identity").lower()
        if packed not in ("identity", ""):
            raise TargetLost(
                f"{self._where} answers with content that is compressed ({self._clean(packed)!r}), which was not asked "
                "for; switch compression off for this client"
            )
        if 200 <= status < 300:
            try:
                found = json.loads(content)
                self._answered = self._answered or sent_rows
                return found
            except (ValueError, RecursionError) as error:
                raise _InPassing("the answer is no JSON", self._excerpt(content)) from error
        if status in _PASSING or status >= 500:
            pause = _retry_after(answer.getheader("Retry-After"))
            unknown = status == HTTPStatus.INTERNAL_SERVER_ERROR and not self._answered
            raise _InPassing(said, self._excerpt(content), pause, of_the_request=unknown)
        if 300 <= status < 400:
            there = f" to {self._clean(answer.getheader('Location', ''))!r}"
            raise TargetLost(
                f"{self._where} answers {said}{there}; redirects are not followed: give that address itself, and "
                "--allow-host for its host"
            )
        words = f"{self._where} answers {said}{self._excerpt(content)}"
        if status in _OF_THE_INPUT:
            raise InputRefused(
                f"{words}; check that the data have the shape, type and values that the model takes", status
            )
        key = _KEY if not self._answered else _KEY_LATER
        keys = {401: key, 403: key, 404: "check the model's name and version in the address"}
        raise TargetLost(f"{words}; {keys.get(status, 'check the address')}")

    def _excerpt(self, content: bytes) -> str:
        """Return the beginning of a response for an error message."""
        text = self._clean(content[:2000].decode("utf-8", "replace"))
        return f": {text!r}" if text else ""

    def _clean(self, text: str) -> str:
        """Return the text on one line, shortened, with secrets removed."""
        return " ".join(self.masked(text).split())[:200]

    def masked_name(self, text: str) -> str:
        """Return a name, such as a class name, with the secret values of the request headers removed. Matches of fewer
        than eight characters are not removed.
        """
        return self.masked(text, least=_LETTERS_OF_NAME)

    def masked(self, text: str, *, least: int = _LETTERS) -> str:
        """Return a text in which the secret values of the HTTP request headers are replaced by "…".

        A value is also replaced if it is escaped as in JSON, or if only its first `least` or more characters occur.
        """
        written = [form for value in self._headers.values() for form in _forms(value)]
        begins = re.compile("|".join(re.escape(form[:least]) for form in written))
        pieces, start = [], 0
        while written and (found := begins.search(text, start)):
            at = found.start()
            pieces += [text[start:at], "…"]
            start = at + max(_shared(text[at:], form) for form in written)
        return "".join((*pieces, text[start:]))


_KEY_LATER = "the key may have expired, or its quota may be used up: renew it, and resume with --resume"
_KEY = "it may want a key: --header 'Authorization: env:VARIABLE'"


def _value(name: str, variable: str) -> str:
    value = os.environ.get(variable)
    if not value:
        raise UsageError(
            f"header {name} comes from {variable}, which is not set; export {variable} before the command"
        )
    if not value.isprintable() or not value.isascii():
        raise UsageError(
            f"{variable} holds characters that no header may; header {name} takes plain ASCII on one line"
        )
    return value


def _forms(value: str) -> list[str]:
    """Return the strings that would reveal a header's value or a word of it: unchanged, and escaped as in JSON."""
    secrets = [secret for secret in (value, *value.split()) if len(secret) >= _LETTERS]
    quoted = [json.dumps(secret)[1:-1] for secret in secrets]
    return [*secrets, *quoted, *(each.replace("/", r"\/") for each in quoted)]


def _shared(text: str, other: str) -> int:
    """Return the length of the longest common prefix of two strings."""
    differ = (k for k, (one, two) in enumerate(zip(text, other, strict=False)) if one != two)
    return next(differ, min(len(text), len(other)))


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def status_line(status: int) -> str:
    """Return an HTTP status code with its name, such as `400 Bad Request`."""
    return f"{status} {_phrase(status)}"


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "(a status of its own)"


def _retry_after(text: str | None) -> float | None:
    """Return the number of seconds that a Retry-After header requests as a number or a date, or None if it
    has neither.
    """
    if text is None:
        return None
    if re.fullmatch(r"\s*\d{1,9}\s*", text):
        return float(text)
    try:
        at = parsedate_to_datetime(text)
    except ValueError:
        return None
    return max(0.0, (at.replace(tzinfo=at.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
