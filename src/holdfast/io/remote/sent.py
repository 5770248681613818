"""Counts the rows that are sent to a model server, separately for each purpose, such as an attack."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from hashlib import blake2b
from threading import RLock
from typing import Any

from torch import Tensor

from holdfast.core.errors import QueriesSpent
from holdfast.core.meter import Purpose

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
