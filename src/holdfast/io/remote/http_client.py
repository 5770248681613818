"""HTTP client that sends requests to a served model and repeats failed ones, and the count of the rows
that are sent.
"""

import json
import os
import re
import ssl
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from hashlib import blake2b
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from io import BufferedReader
from socket import SHUT_RDWR, gaierror, socket
from threading import Event, Lock, RLock
from typing import Any
from urllib.parse import SplitResult

from torch import Tensor

from holdfast.core.errors import InputRefused, QueriesSpent, Remedy, TargetLost, UsageError, model_argument
from holdfast.core.meter import Purpose
from holdfast.io.remote.limited_answers import LimitedReader
from holdfast.io.remote.remote import KEY, SCHEMES, Remote, header_variable

KEY_BYTES = 16
"""Number of bytes of the digest that identifies an input."""


@dataclass
class Totals:
    """Numbers of rows and requests that all attempts of a run sent to a model server."""

    sent: int = 0
    """number of rows of all requests, including repeated ones"""
    rows: Counter[str] = field(default_factory=Counter)
    """number of rows that the server processed or rejected, by purpose"""
    requests: int = 0
    refused: int = 0
    """number of these rows in requests that the server rejected"""
    rejected: Counter[str] = field(default_factory=Counter)
    """number of attacked inputs that the server rejected individually, by status code"""
    failed: Counter[str] = field(default_factory=Counter)
    """number of requests that failed temporarily and were repeated, by failure"""
    failed_rows: int = 0
    most: int | None = None
    """largest number of rows that a request may have, as determined from rejected requests"""
    too_many: int = 0
    """number of rows of the smallest rejected request, from which `most` was determined"""

    @property
    def unanswered(self) -> int:
        """Number of rows whose requests had no response from the server when the run was stopped."""
        return self.sent - self.rows.total() - self.failed_rows


class Sent:
    """Counter of the rows that are sent to a model server. It enforces a limit on their number.

    All methods may be called by several threads at the same time.
    """

    keeps = False
    """whether responses are stored, which requires digests of their inputs"""

    earlier = 0
    """number of rows that earlier attempts of the run sent"""

    def __init__(self, limit: int | None = None) -> None:
        self.totals = Totals()
        self.limit = limit
        self._lock = RLock()

    def left(self) -> int | None:
        """Return how many rows may still be sent to the server, or None if there is no limit."""
        return None if self.limit is None else max(0, self.limit - self.totals.sent)

    def spent(self, rows: int) -> QueriesSpent:
        """Return the error that `rows` further rows would exceed the limit on the rows that are sent to the server."""
        return QueriesSpent(
            f"max_queries is {self.limit:,}; rows that were sent to the server: {self.totals.sent:,}, rows of the "
            f"next request: {rows:,}",
            limit=self.limit or 0,
        )

    def sending(self, rows: int) -> None:
        """Count rows before they are sent to the server. Raises `QueriesSpent` if they exceed the limit."""
        with self._lock:
            remaining = self.left()
            if remaining is not None and rows > remaining:
                raise self.spent(rows)
            self._note({"t": "sent", "n": rows})

    def failed(self, what: str, rows: int) -> None:
        """Count a request to the server that failed temporarily and is repeated. `what` is the kind of the failure."""
        self._note({"t": "failed", "what": what, "n": rows})

    def answered(self, purpose: Purpose, values: Tensor, keys: Sequence[bytes]) -> None:
        """Count a response of the server with scores or one-hot labels (n, classes). `keys` are the digests of the
        inputs.
        """
        self._note({"t": "answer", **purpose_record(purpose), "n": len(values)})

    def refused(self, purpose: Purpose, rows: int) -> None:
        """Count a request with `rows` rows that the server rejected."""
        self._note({"t": "refused", "kind": purpose.kind, "n": rows})

    def rejected(self, purpose: Purpose, status: str, key: bytes) -> None:
        """Record that the server rejected an attacked input with a status code. `refused` has already counted its
        request.
        """
        self._note({"t": "rejected", **purpose_record(purpose), "status": status}, key)

    def found_limit(self, most: int, refused: int) -> None:
        """Record the largest number of rows that the server accepts in one request, and the number of rows of the
        smallest request that it rejected.
        """
        self._note({"t": "limit", "most": most, "refused": refused})

    def recalled(self, purpose: Purpose, keys: Sequence[bytes]) -> list[Tensor | None]:
        """Return for each input the stored response of the server, or None if the input must be sent."""
        return [None] * len(keys)

    def done(self, stage: str, shard: int | None = None) -> None:
        """Discard the stored responses of the server for a finished shard, or for a whole stage if `shard` is None."""

    def _note(self, content: Mapping[str, Any], *parts: bytes) -> None:
        with self._lock:
            add_record(self.totals, content)


_NEW: ContextVar[Callable[[int | None], Sent]] = ContextVar("sent", default=Sent)


def new_sent(limit: int | None) -> Sent:
    """Return a new counter of the rows that are sent to a model server, with an optional limit on their number."""
    return _NEW.get()(limit)


@contextmanager
def counting_by(make: Callable[[int | None], Sent]) -> Iterator[None]:
    """Context manager in which each newly opened served model gets its row counter from the function `make`."""
    token = _NEW.set(make)
    try:
        yield
    finally:
        _NEW.reset(token)


def key_of(row: Tensor) -> bytes:
    """Return the digest of an input (*features) on the CPU. It identifies the stored response of a server to this
    input.
    """
    return blake2b(row.contiguous().numpy().tobytes(), digest_size=KEY_BYTES).digest()


def purpose_record(purpose: Purpose) -> dict[str, Any]:
    """Return the purpose of a request, such as an attack on one shard, as fields of a journal record."""
    return {"stage": purpose.stage, "shard": purpose.shard, "kind": purpose.kind}


def add_record(totals: Totals, content: Mapping[str, Any]) -> None:
    """Add the numbers of rows and requests in a journal record to the totals."""
    match content:
        case {"t": "sent", "n": n}:
            totals.sent += n
        case {"t": "failed", "what": what, "n": n}:
            totals.failed[what] += 1
            totals.failed_rows += n
        case {"t": "answer", "n": n, "kind": kind}:
            totals.rows[kind] += n
            totals.requests += 1
        case {"t": "refused", "n": n, "kind": kind}:
            totals.rows[kind] += n
            totals.requests += 1
            totals.refused += n
        case {"t": "rejected", "status": status}:
            totals.rejected[status] += 1
        case {"t": "limit", "most": most, "refused": refused}:
            totals.most, totals.too_many = most, refused
        case {"t": "totals", **known}:
            for name in vars(totals).keys() & known.keys():
                setattr(totals, name, Counter(known[name]) if isinstance(known[name], dict) else known[name])


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
            remaining = begin - self._now()
            if begin > waited and remaining > 0:
                self._sleep(remaining)
            if (
                self._paused <= begin
            ):  # otherwise a pause began meanwhile, and the requests after it are spread again
                return
            waited = begin

    def pause(self, seconds: float) -> float:
        """Start no HTTP requests for a number of seconds. Return the time at which the pause ends."""
        with self._lock:
            until = self._now() + seconds
            # A shorter pause that another thread receives must not end a longer one.
            self._paused = max(self._paused, until)
        return until


LONGEST_WAIT_S = 60.0
"""Longest pause in seconds that a server may request. A longer one ends the run, which can be resumed later."""
_FIRST_WAIT_S, _LAST_WAIT_S = 0.5, 30.0  # pause before a retry: doubled each time, up to the second number
_MOST_BYTES = 1 << 26
"""Largest number of bytes of a response.

It is enough for the scores of some hundred rows with ten thousand classes as decimal numbers; a request has 64 rows by
default.
"""
_CHUNK = 1 << 16  # bytes that are read at once, so that an oversized response is stopped early
_SECRET_CHARACTERS = 4  # shorter strings are not secret, and occur in many words
_SECRET_CHARACTERS_IN_NAME = (
    8  # for names: a tensor may be called `input`, and a header's value may begin with these letters
)
_NO_SERVER = (ConnectionRefusedError, gaierror, ssl.SSLError)
"""Errors of the first request that mean that the server does not exist."""
_TEMPORARY = frozenset({408, 425, 429})  # request timeout, too early, too many requests
_INPUT_REJECTED = frozenset({400, 413, 415, 422})  # bad request, too large, media type, unprocessable


@dataclass(eq=False)
class _TemporaryFailure(Exception):
    """Error for a failed request that may succeed in another attempt."""

    what: str
    """kind of the failure, by which failures are counted"""
    detail: str = ""
    """beginning of the response, for the message after the last attempt"""
    wait_s: float | None = None
    """pause in seconds that the server requests"""
    immediate: bool = False
    """whether the server closed an idle connection, which is normal"""
    maybe_request: bool = False
    """whether the failure may be due to a request that the server does not understand"""


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
        self._reached = self._answered = False
        """whether the server was reached, and whether it responded to a request with rows"""

    def __del__(self) -> None:
        for connection in self._idle:
            connection.close()

    def request(
        self, path: str, body: bytes | None = None, *, sent: Sent | None = None, rows: int = 0
    ) -> Any:
        """Send an HTTP request to the server and return its response, parsed as JSON.

        If `body` is given, it is sent by POST; otherwise the request is a GET. `rows` is the number of rows in `body`.
        Every attempt is counted in `sent`.
        """
        sent, waited = sent or Sent(), 0.0
        for attempt in range(self._remote.retries + 1):
            self._pace.wait(waited)
            sent.sending(rows)
            try:
                answer = self._attempt(path, body)
            except _TemporaryFailure as failure:
                waited = max(waited, self._wait(failure, attempt, sent, rows))
            else:
                return answer
        raise AssertionError("the last attempt returns or raises")

    def stop(self) -> None:
        """Abort the current HTTP requests of all threads without waiting for the responses."""
        with self._lock:
            self._stopped.set()
            for connection in self._busy:
                if connection.sock is not None:
                    # The request may have ended in the meantime, and its socket is closed then.
                    with suppress(OSError):
                        connection.sock.shutdown(SHUT_RDWR)

    def resume(self) -> None:
        """Permit HTTP requests again after a call of `stop`."""
        self._stopped.clear()

    def _wait(self, failure: _TemporaryFailure, attempt: int, sent: Sent, rows: int) -> float:
        """Wait before the next attempt. Return the time until which the server requests a pause, or 0.

        Raises `TargetLost` after the last attempt.
        """
        wait = max(failure.wait_s or 0.0, min(_LAST_WAIT_S, _FIRST_WAIT_S * 2**attempt))
        if attempt == (min(1, self._remote.retries) if failure.maybe_request else self._remote.retries):
            times = {0: "once", 1: "twice"}.get(attempt, f"{attempt + 1} times")
            start = f"{self._where}: {failure.what}{failure.detail} (sent {times}); check the server"
            if failure.maybe_request:
                raise TargetLost(
                    f"{start}; no request was answered before, so compare the format of the requests and the shape of "
                    "the data with what the model accepts"
                )
            raise TargetLost(start, *self._slower())
        if wait > LONGEST_WAIT_S:
            raise TargetLost(
                f"{self._where}: {failure.what}, and it requests a pause of {wait:,.0f} s; at most {LONGEST_WAIT_S:g} "
                "s are waited: resume later"
            )
        if self._stopped.is_set():
            raise TargetLost(f"{self._where}: the run was stopped")
        sent.failed(failure.what, rows)
        until = 0.0 if failure.wait_s is None else self._pace.pause(wait)
        self._sleep(0.0 if failure.immediate and attempt == 0 else wait)
        return until

    @property
    def _where(self) -> str:
        return f"{self._parts.scheme}://{self._parts.netloc}"

    def _attempt(self, path: str, body: bytes | None) -> Any:
        idle_connection, connection = self._acquired()
        began = complete = False
        try:
            headers = {"Accept": "application/json", "Accept-Encoding": "identity", **self._headers}
            if body is not None:
                headers["Content-Type"] = "application/json"
            with suppress(
                BrokenPipeError
            ):  # a server that refuses a large body may answer and close the connection before the body is complete
                connection.request("GET" if body is None else "POST", path, body, headers)
            with closing(connection.getresponse()) as answer:
                self._reached = began = True
                content = self._content(answer)
            complete = not answer.will_close
        except ssl.SSLCertVerificationError as error:
            way_out = "set SSL_CERT_FILE to the file of the authority that signed it"
            raise TargetLost(
                f"{self._where} has no valid certificate: {error.verify_message}; {way_out}"
            ) from error
        except TimeoutError as error:
            raise _TemporaryFailure(f"no answer within {self._remote.timeout_s:g} s") from error
        except (HTTPException, OSError) as error:
            if not self._reached and isinstance(error, _NO_SERVER):
                way_out = "check the address, and whether the server is running"
                raise TargetLost(
                    f"{self._where} cannot be reached ({_error_text(error)}); {way_out}"
                ) from error
            was_idle = idle_connection is not None and not began
            raise _TemporaryFailure(
                "the connection failed", f" ({self._clean(_error_text(error))})", immediate=was_idle
            ) from error
        finally:
            with self._lock:
                self._busy.discard(connection)
                if complete:
                    self._idle.append(connection)
            if not complete:
                connection.close()
        return self._read(answer, content, sent_rows=body is not None)

    def _acquired(self) -> tuple[HTTPConnection | None, HTTPConnection]:
        """Return an idle open connection or None, and the connection to use: that one or a new one."""
        with self._lock:
            idle = self._idle.pop() if self._idle else None
            if idle is not None and idle.sock is not None:
                idle.sock.settimeout(self._remote.timeout_s)  # less remained for the last answer
            connection = idle or self._connected()
            self._busy.add(connection)
            return idle, connection

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
        # The file object that HTTPResponse opened has no deadline, so it is replaced before anything is read from it.
        answer.fp.close()
        raw = sock.makefile("rb", buffering=0)
        answer.fp = BufferedReader(LimitedReader(sock, raw, lambda: deadline - self._remote.now()))
        return answer

    def _content(self, answer: HTTPResponse) -> bytes:
        """Return the whole body of a response. Raises `TargetLost` if it is too large."""
        pieces, size = [], 0
        while piece := answer.read1(_CHUNK):
            pieces.append(piece)
            size += len(piece)
            if size > _MOST_BYTES:
                raise TargetLost(
                    f"the response of {self._where} has more than {_MOST_BYTES >> 20} MiB; scores were expected: check "
                    "the server",
                    *self._fewer_rows(),
                )
        # read1 returns no error if the server closes the connection early.
        if answer.length:
            raise ConnectionError(f"cut off {answer.length} bytes before its end")
        return b"".join(pieces)

    def _read(self, answer: HTTPResponse, content: bytes, *, sent_rows: bool) -> Any:
        status = answer.status
        status_text = status_line(status)
        encoding = answer.getheader("Content-Encoding", "identity").lower()
        if encoding not in ("identity", ""):
            raise TargetLost(
                f"the response of {self._where} is compressed ({self._clean(encoding)!r}), which was not requested; "
                "switch off compression in the server"
            )
        if 200 <= status < 300:
            try:
                answer_content = json.loads(content)
                self._answered = self._answered or sent_rows
                return answer_content
            except (ValueError, RecursionError) as error:
                raise _TemporaryFailure("the response is not JSON", self._excerpt(content)) from error
        if status in _TEMPORARY or status >= 500:
            pause = _retry_after(answer.getheader("Retry-After"))
            unknown = status == HTTPStatus.INTERNAL_SERVER_ERROR and not self._answered
            raise _TemporaryFailure(status_text, self._excerpt(content), pause, maybe_request=unknown)
        if 300 <= status < 400:
            location = f" to {self._clean(answer.getheader('Location', ''))!r}"
            raise TargetLost(
                f"{self._where} responds {status_text}{location}; redirects are not followed: give that address "
                "itself, and allow its host"
            )
        message = f"{self._where} responds {status_text}{self._excerpt(content)}"
        if status in _INPUT_REJECTED:
            raise InputRefused(
                f"{message}; check that the data have the shape, type and values that the model accepts",
                status=status,
            )
        if status in (401, 403):
            if self._answered:
                raise TargetLost(f"{message}; {_KEY_LATER}")
            raise TargetLost(message, replace(KEY, reason="if the server requires a key"))
        wrong = "the model's name and version in the address" if status == 404 else "the address"
        raise TargetLost(f"{message}; check {wrong}")

    def _slower(self) -> tuple[Remedy, ...]:
        """Return the arguments with which a slow server is waited for longer, or is sent less at once."""
        timeout = model_argument("http_timeout", f"{4 * self._remote.timeout_s:g}s")
        retries = model_argument("http_retries", 2 * self._remote.retries + 1)
        return (timeout, retries, *self._fewer_rows())

    def _fewer_rows(self) -> tuple[Remedy, ...]:
        rows = self._remote.max_rows // 4
        return (model_argument("http_max_rows", rows),) if rows else ()

    def _excerpt(self, content: bytes) -> str:
        """Return the beginning of a response for an error message."""
        # More than the 200 characters that are shown, so that a secret at the end of these is recognised as a whole.
        text = self._clean(content[:2000].decode("utf-8", "replace"))
        return f": {text!r}" if text else ""

    def _clean(self, text: str) -> str:
        """Return the text on one line, shortened, with secrets removed."""
        return " ".join(self.masked(text).split())[:200]

    def masked_name(self, text: str) -> str:
        """Return a name, such as a class name, with the secret values of the request headers removed. Matches of fewer
        than eight characters are not removed.
        """
        return self.masked(text, fewest=_SECRET_CHARACTERS_IN_NAME)

    def masked(self, text: str, *, fewest: int = _SECRET_CHARACTERS) -> str:
        """Return a text in which the secret values of the HTTP request headers are replaced by "…".

        A value is also replaced if it is escaped as in JSON, or if only its first `fewest` or more characters occur.
        """
        secrets = [form for value in self._headers.values() for form in _forms(value)]
        beginning = re.compile("|".join(re.escape(form[:fewest]) for form in secrets))
        pieces, start = [], 0
        while secrets and (match := beginning.search(text, start)):
            place = match.start()
            pieces += [text[start:place], "…"]
            start = place + max(_shared(text[place:], form) for form in secrets)
        return "".join((*pieces, text[start:]))


_KEY_LATER = "the key may have expired, or its quota may be used up: renew it, and resume the run"


def _value(name: str, variable: str) -> str:
    value = os.environ.get(variable)
    if not value:
        raise UsageError(
            f"the header {name} is read from {variable}, which is not set; export {variable} before the command"
        )
    if not value.isprintable() or not value.isascii():
        raise UsageError(
            f"{variable} contains characters that are not allowed in a header; for the header {name}, printable ASCII "
            "on one line was expected"
        )
    return value


def _forms(value: str) -> list[str]:
    """Return the strings that would reveal a header's value or a word of it: unchanged, and escaped as in JSON."""
    secrets = [secret for secret in (value, *value.split()) if len(secret) >= _SECRET_CHARACTERS]
    quoted = [json.dumps(secret)[1:-1] for secret in secrets]
    return [*secrets, *quoted, *(text.replace("/", r"\/") for text in quoted)]


def _shared(text: str, other: str) -> int:
    """Return the length of the longest common prefix of two strings."""
    differ = (
        k
        for k, (character, other_character) in enumerate(zip(text, other, strict=False))
        if character != other_character
    )
    return next(differ, min(len(text), len(other)))


def _error_text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def status_line(status: int) -> str:
    """Return an HTTP status code with its name, such as `400 Bad Request`."""
    return f"{status} {_phrase(status)}"


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:  # a server may use a number that the standard does not name
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
        time = parsedate_to_datetime(text)
    except ValueError:
        return None
    return max(0.0, (time.replace(tzinfo=time.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
