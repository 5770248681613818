"""Log of the errors of a model and of a guard for the operator of a server, at a rate that clients cannot raise.

Records have the type, the message and the place of an exception, and the first of a kind its traceback. They contain
no inputs, scores or keys: tracebacks have no values of variables, and numbers with a fraction, the contents of tensors,
and keys are removed from messages.
"""

import json
import logging
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

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
