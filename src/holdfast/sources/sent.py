"""Counts the rows that were sent to a server, by purpose."""

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
from holdfast.core.purpose import Purpose

KEY_BYTES = 16
"""Number of bytes of the digest that identifies an input."""


@dataclass
class Totals:
    """Numbers of rows and requests over all attempts of a run."""

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
        """Number of rows of requests that had no response when the run was stopped."""
        return self.sent - self.rows.total() - self.failed_rows


class Sent:
    """Counter of the rows that are sent to a server, which enforces a limit.

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
        """Return how many rows may still be sent, or None if there is no limit."""
        return None if self.limit is None else max(0, self.limit - self.totals.sent)

    def spent(self, rows: int) -> str:
        """Return the message why `rows` further rows are not sent."""
        return (
            f"--max-queries is {self.limit:,}; rows that were sent to the server: {self.totals.sent:,}, rows of the "
            f"next request: {rows:,}"
        )

    def sending(self, rows: int) -> None:
        """Count rows before they are sent. Raises `QueriesSpent` if they exceed the limit."""
        with self._lock:
            left = self.left()
            if left is not None and rows > left:
                raise QueriesSpent(self.spent(rows), self.limit or 0)
            self._note({"t": "sent", "n": rows})

    def failed(self, what: str, rows: int) -> None:
        """Count a request that failed temporarily and is repeated. `what` is the kind of the failure."""
        self._note({"t": "failed", "what": what, "n": rows})

    def answered(self, purpose: Purpose, values: Tensor, keys: Sequence[bytes]) -> None:
        """Count a response: scores or one-hot labels (n, classes) of inputs with the digests `keys`."""
        self._note({"t": "answer", **purpose_record(purpose), "n": len(values)})

    def refused(self, purpose: Purpose, rows: int) -> None:
        """Count a request with `rows` rows that the server rejected."""
        self._note({"t": "refused", "kind": purpose.kind, "n": rows})

    def rejected(self, purpose: Purpose, status: str, key: bytes) -> None:
        """Record that an attacked input was rejected with a status code. Its request was already counted by
        `refused`.
        """
        self._note({"t": "rejected", **purpose_record(purpose), "status": status}, key)

    def found_limit(self, most: int, refused: int) -> None:
        """Record two numbers of rows: the largest that the server accepts, and that of the smallest request that it
        rejected.
        """
        self._note({"t": "limit", "most": most, "refused": refused})

    def recalled(self, purpose: Purpose, keys: Sequence[bytes]) -> list[Tensor | None]:
        """Return the stored response for each input, or None for an input that must be sent."""
        return [None] * len(keys)

    def done(self, stage: str, shard: int | None = None) -> None:
        """Discard the stored responses of a finished shard, or of a whole stage if `shard` is None."""

    def _note(self, content: Mapping[str, Any], *parts: bytes) -> None:
        with self._lock:
            add_record(self.totals, content)


_NEW: ContextVar[Callable[[int | None], Sent]] = ContextVar("sent", default=Sent)


def new_sent(limit: int | None) -> Sent:
    """Return a new counter for a served model that is being opened."""
    return _NEW.get()(limit)


@contextmanager
def counting_by(make: Callable[[int | None], Sent]) -> Iterator[None]:
    """Context manager in which the rows of newly opened served models are counted by the counter `make(limit)`."""
    token = _NEW.set(make)
    try:
        yield
    finally:
        _NEW.reset(token)


def key_of(row: Tensor) -> bytes:
    """Return the digest of an input (*features) on the CPU."""
    return blake2b(row.contiguous().numpy().tobytes(), digest_size=KEY_BYTES).digest()


def purpose_record(purpose: Purpose) -> dict[str, Any]:
    """Return the fields of a record that describe a purpose."""
    return {"stage": purpose.stage, "shard": purpose.shard, "kind": purpose.kind}


def add_record(totals: Totals, content: Mapping[str, Any]) -> None:
    """Add the numbers of a record to the totals."""
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
