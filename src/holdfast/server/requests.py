"""Requests of a server: host names, headers, refusals and logged errors, and batches of the requests that wait."""

import asyncio
import ipaddress
import json
import logging
import re
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Generic, Literal, TypeVar

LOGGER = "holdfast.serve"
REQUESTS = "holdfast.requests"
"""logger of the requests, each of which has one record"""
REQUEST_FIELDS = "request_fields"
"""attribute of a record with the fields of a request"""
LogFormat = Literal["text", "json"]
_AGAIN_S = 60.0
"""seconds after which a further record of a kind is written"""
_KINDS = 64
"""largest number of kinds; the further ones are one kind"""
_LENGTH = 300
_FRAMES = 12
_ARRAY = re.compile(r"\b(tensor|array)\((?:[^()]|\([^()]*\))*\)?")
_SECRET = re.compile(r"hf_[\w-]+|(?i:bearer)\s+\S+|[-+]?\d*\.\d+(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+")
_LIST = re.compile(r"\[[^\[\]]*(?:\[[^\[\]]*\][^\[\]]*)*\]")
_SHAPE_LENGTH = 8
"""largest number of entries of a list of integers that is shown, as it may be a shape"""
_INTEGERS = re.compile(rf"\d+(?:[\s,;()\[\]]+\d+){{{_SHAPE_LENGTH},}}")
"""more integers in succession, in whatever brackets, also if the message was cut before the last one"""


class ErrorLog:
    """Function that logs errors. The first error of each kind is logged at once, and then at most one in a minute, with
    the number of those that were not logged. It may be called by any thread.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._log = clock, logging.getLogger(LOGGER)
        self._kinds: dict[tuple[str, ...], tuple[float, int]] = {}
        self._lock = threading.Lock()

    def __call__(self, what: str, error: BaseException | None = None, *, advice: str = "") -> None:
        """Log an event such as `the model failed`, with the exception that caused it and with advice."""
        frames = [] if error is None else traceback.extract_tb(_origin(error).__traceback__)
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno} in {frames[-1].name}" if frames else ""
        due = self._due((what, "" if error is None else type(error).__name__, place))
        if due is None:
            return
        first, suppressed = due
        text = what if error is None else f"{what}: {type(error).__name__}: {shown(str(error))}"
        text += f" ({place})" if place else ""
        text += f"; {advice}" if advice else ""
        text += f"; {suppressed} more since the last record" if suppressed else ""
        lines = traceback.format_list(frames[-_FRAMES:]) if first else []
        self._log.error("%s", "\n".join((text, *(line.rstrip("\n") for line in lines))))

    def _due(self, kind: tuple[str, ...]) -> tuple[bool, int] | None:
        """Return whether an error is the first of its kind, and how many were not logged since the last record; None
        if it is not logged.
        """
        now = self._clock()
        with self._lock:
            if kind not in self._kinds and len(self._kinds) >= _KINDS:
                kind = ()
            first, (last_s, suppressed) = kind not in self._kinds, self._kinds.get(kind, (-_AGAIN_S, 0))
            if not first and now - last_s < _AGAIN_S:
                self._kinds[kind] = (last_s, suppressed + 1)
                return None
            self._kinds[kind] = (now, 0)
            return first, suppressed


def _origin(error: BaseException) -> BaseException:
    """Return the error from which an error was raised; that of a model is converted by `Classifier`."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def shown(message: str) -> str:
    """Return the message of an exception in one line, without what may be inputs, scores or keys."""
    text = _SECRET.sub("…", _LIST.sub(_shape, _ARRAY.sub(r"\1(…)", message[: 10 * _LENGTH])))
    text = _INTEGERS.sub("…", text)
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return text if len(text) <= _LENGTH else f"{text[:_LENGTH]}…"


def _shape(found: re.Match[str]) -> str:
    entries = found[0].strip("[]").split(",")
    short = len(entries) <= _SHAPE_LENGTH and all(entry.strip().isdigit() for entry in entries)
    return found[0] if short else "[…]"


class JSONFormatter(logging.Formatter):
    """Formatter that writes a record as one JSON object in one line, with the fields of the log of requests."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a record."""
        fields: Mapping[str, object] = getattr(record, REQUEST_FIELDS, {})
        return json_line(record.levelname.lower(), super().format(record), process=record.process, **fields)


def json_line(level: str, message: str, **fields: object) -> str:
    """Return an object of the log as one line, with the time in UTC."""
    time = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return json.dumps({"time": time, "level": level, "message": message, **fields})


def log_to_stderr(form: LogFormat) -> None:
    """Write the log records of the package in this process to stderr, with time and process. Requests are logged only
    as JSON, and as JSON, records of other libraries and Python's warnings are objects, too.
    """
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s worker %(process)d %(levelname)s: %(message)s")
    handler.setFormatter(JSONFormatter() if form == "json" else text)
    package = logging.getLogger("holdfast")
    package.handlers = [handler]
    package.setLevel(logging.INFO)
    package.propagate = False  # a model may configure logging of its own, and records would be written twice
    logging.getLogger(REQUESTS).setLevel(logging.INFO if form == "json" else logging.WARNING)
    if form == "json":
        if logging.lastResort is not None:  # for loggers without a handler
            logging.lastResort.setFormatter(handler.formatter)
        logging.getLogger("py.warnings").addHandler(handler)
        logging.captureWarnings(True)


@dataclass(eq=False)
class Refused(Exception):
    """A request that is not answered: status code, one reason, and further headers of the response."""

    status: int
    reason: str
    headers: tuple[tuple[str, str], ...] = ()
    cause: str = "request"
    """cause for the metrics: `request`, `key`, `rate`, `state`, `guard`, `overload`, `audit`, `model`, `upstream`;
    `state` if the state of the query detector could not be reached"""

    def __str__(self) -> str:
        return self.reason


def wait_first(reason: str, wait_s: float, *, status: int = 503, cause: str = "overload") -> Refused:
    """Return the refusal of a request that may be sent again after `wait_s` seconds."""
    return Refused(status, reason, (("retry-after", str(max(1, round(wait_s + 0.5)))),), cause)


_HOST = re.compile(rb"(\[[0-9a-f:.]+\]|[a-z0-9_.-]*)(:[0-9]*)?")
_LOCAL = ".localhost"


@dataclass(frozen=True)
class HostNames:
    """Host names that are accepted.

    IP addresses, `localhost` and names without a dot are always accepted, because they cannot be names of a public
    site. So is a request without the header, which no browser sends.
    """

    names: frozenset[str] = frozenset()
    """further names, in lower case"""
    everything: bool = False
    """whether all names are accepted"""

    def refuse_other(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Raise `Refused` with the status 421 for a request with these headers that names another host."""
        hosts = [value for name, value in headers if name == b"host"]
        if not self.everything and not (len(hosts) < 2 and all(map(self._accepts, hosts))):
            raise Refused(
                421,
                "the name in the header Host is not accepted; the operator can allow it with --accept-host",
            )

    def _accepts(self, host: bytes) -> bool:
        name = _name(host)
        if name is None:
            return False
        return "." not in name.strip("[]") or name in self.names or name.endswith(_LOCAL) or _is_address(name)


@lru_cache(maxsize=64)
def _name(host: bytes) -> str | None:
    """Return the name in a header Host in lower case and without the port; None if it is not valid."""
    matched = _HOST.fullmatch(host.strip().lower())
    return None if matched is None else matched[1].decode().removesuffix(".")


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text.strip("[]"))
    except ValueError:
        return False
    return True


Headers = tuple[tuple[str, str], ...]
FORWARDED: ContextVar[Headers] = ContextVar("forwarded_headers", default=())
"""headers of clients that a proxied model sends with the requests of this context"""
_VALUE = re.compile(r"([!-~]([\t -~]*[!-~])?)?")


def is_sendable(value: str) -> bool:
    """Return whether a text can be the value of a header that is sent: printable ASCII characters."""
    return _VALUE.fullmatch(value) is not None


@contextmanager
def forwarding(headers: Headers) -> Iterator[None]:
    """Context manager in which a proxied model sends these headers with each request."""
    token = FORWARDED.set(headers)
    try:
        yield
    finally:
        FORWARDED.reset(token)


Request = TypeVar("Request")
Response = TypeVar("Response")
_WEIGHT = 0.2
"""weight of the last batch in the moving average of the time per input"""
_QUEUED = 64
"""largest number of waiting inputs, in multiples of the largest batch; it bounds the memory of the queue"""


@dataclass(eq=False)
class _Waiting(Generic[Request, Response]):
    request: Request
    rows: int
    future: "asyncio.Future[Response]"


class Batcher(Generic[Request, Response]):
    """Queue of requests with a thread that answers them in batches.

    `answer` receives the requests of a batch and returns their responses in the same order, or an exception in the
    place of a response; an exception that it raises is that of all of its requests. A batch has at most `max_rows`
    inputs, and fewer if it would take longer than half of `max_latency_s`. A request that would wait for longer than
    `max_latency_s` is refused with status 503.

    With `gather_s`, a batch waits up to so many seconds, and at most half of `max_latency_s`, until it has as many
    inputs as were unanswered when the last batch ended: concurrent clients that send the next request after a response
    then share a batch. A request waits for no other one if it was alone before.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Request]], Sequence[Response | Exception]],
        *,
        max_rows: int,
        max_latency_s: float,
        gather_s: float = 0.0,
        seen: Callable[[int, float], object] = lambda rows, seconds: None,
    ) -> None:
        self._answer, self._seen = answer, seen
        self._max_rows, self._max_latency_s = max_rows, max_latency_s
        self._gather_s = min(gather_s, max_latency_s / 2)  # the other half is for the batch itself
        self._queue: deque[_Waiting[Request, Response]] = deque()
        self._arrived = threading.Condition()
        self._rows = self._running = 0
        self._wanted = 1  # number of waiting inputs from which the thread is woken
        self._open = 0  # number of inputs that waited or ran when the last batch ended
        self._row_s = 0.0
        self._progress_s: float | None = None
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waking: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Number of inputs that wait for a batch."""
        return self._rows

    async def submit(self, request: Request, rows: int) -> Response:
        """Return the response to a request with a number of inputs. Raises `Refused` if it would wait too long."""
        loop = self._loop = asyncio.get_running_loop()
        entry: _Waiting[Request, Response] = _Waiting(request, rows, loop.create_future())
        with self._arrived:
            wait_s = (self._rows + self._running) * self._row_s
            if self._closed or wait_s > self._max_latency_s or self._rows >= _QUEUED * self._max_rows:
                raise wait_first("the server is overloaded; send the request again later", wait_s)
            self._queue.append(entry)
            self._rows += rows
        if self._waking is not loop:  # once for all requests that the loop receives at a time
            self._waking = loop
            loop.call_soon(self._wake)
        try:
            return await entry.future
        finally:  # an error refers to this frame: with `entry`, its inputs would wait for the garbage collector
            del entry

    def _wake(self) -> None:
        """Wake the thread. Called by the event loop."""
        self._waking = None
        with self._arrived:
            if self._rows >= self._wanted:
                self._arrived.notify()

    @property
    def busy_s(self) -> float:
        """Seconds since the thread last made progress within a batch; 0 while it waits for requests."""
        progress_s = self._progress_s
        return 0.0 if progress_s is None else time.monotonic() - progress_s

    @property
    def row_s(self) -> float:
        """Moving average of the seconds per input; 0 before the first batch."""
        return self._row_s

    def progress(self) -> None:
        """Note that the function of the batches has made progress."""
        self._progress_s = time.monotonic()

    @property
    def largest(self) -> int:
        """Largest number of inputs of the next batch, from the measured time per input."""
        if not self._row_s:
            return self._max_rows
        return max(1, min(self._max_rows, int(self._max_latency_s / 2 / self._row_s)))

    def close(self) -> None:
        """Answer the requests that wait, and end the thread. Later requests are refused."""
        with self._arrived:
            self._closed = True
            self._arrived.notify()
        self._thread.join()

    def _run(self) -> None:
        while batch := self._next():
            begin = time.perf_counter()
            rows = sum(entry.rows for entry in batch)
            responses: Sequence[Response | Exception]
            try:
                responses = self._answer([entry.request for entry in batch])
            except Exception as error:  # noqa: BLE001 - raised by the callers, which wait for it
                responses = [error] * len(batch)
            taken_s = time.perf_counter() - begin
            self._row_s += (taken_s / rows - self._row_s) * (_WEIGHT if self._row_s else 1.0)
            self._seen(rows, taken_s)
            self._open = self._rows + rows  # before the responses, after which the same clients send again
            # one call for all requests, because waking the loop is expensive
            if self._loop is not None and not self._loop.is_closed():
                pairs = [(entry.future, response) for entry, response in zip(batch, responses, strict=True)]
                self._loop.call_soon_threadsafe(_settle, pairs)

    def _next(self) -> list[_Waiting[Request, Response]]:
        """Return the requests of the next batch; none after the queue is closed and empty."""
        with self._arrived:
            limit = self.largest
            expected = min(self._open, limit)
            self._running, self._progress_s, self._wanted = 0, None, 1
            self._arrived.wait_for(lambda: self._queue or self._closed)
            if self._gather_s:
                self._wanted = expected
                self._arrived.wait_for(lambda: self._rows >= expected or self._closed, self._gather_s)
            batch: list[_Waiting[Request, Response]] = []
            rows = 0
            while self._queue and (not batch or rows + self._queue[0].rows <= limit):
                batch.append(self._queue.popleft())
                rows += batch[-1].rows
            self._rows -= rows
            self._running = rows
            self.progress()
            return batch


def _settle(pairs: Sequence[tuple["asyncio.Future[Response]", Response | Exception]]) -> None:
    for future, response in pairs:
        if future.done():  # cancelled, because the client closed the connection
            continue
        if isinstance(response, Exception):
            future.set_exception(response)
        else:
            future.set_result(response)
