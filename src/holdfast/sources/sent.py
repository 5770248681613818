"""How many rows a server was sent, by what they were for."""

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
"""of the digest that an input is known by"""


@dataclass
class Totals:
    """Rows and requests over all attempts at a run."""

    sent: int = 0
    """rows of all requests, those that were sent again included"""
    rows: Counter[str] = field(default_factory=Counter)
    """rows that the server answered or refused, by what they were for"""
    requests: int = 0
    refused: int = 0
    """of these rows, those of requests that the server refused"""
    rejected: Counter[str] = field(default_factory=Counter)
    """attacked inputs that the server refused by themselves, by its status"""
    failed: Counter[str] = field(default_factory=Counter)
    """requests that failed temporarily and were sent again, by what failed"""
    failed_rows: int = 0
    most: int | None = None
    """rows that a request may have, as the server showed by refusing more"""
    too_many: int = 0
    """the number of rows that it refused when that was found"""

    @property
    def unanswered(self) -> int:
        """Rows of requests that a stop left without an answer."""
        return self.sent - self.rows.total() - self.failed_rows


class Sent:
    """Counts what a server is sent, and refuses to exceed a limit of rows.

    All methods may be called by several threads.
    """

    keeps = False
    """whether answers are kept, for which their inputs must be digested"""

    earlier = 0
    """rows that earlier attempts at the run sent"""

    def __init__(self, limit: int | None = None) -> None:
        self.totals = Totals()
        self.limit = limit
        self._lock = RLock()

    def left(self) -> int | None:
        """How many rows may still be sent; None without a limit."""
        return None if self.limit is None else max(0, self.limit - self.totals.sent)

    def spent(self, rows: int) -> str:
        """Why so many rows are not sent."""
        return (
            f"--max-queries is {self.limit:,}; rows that were sent to the server: {self.totals.sent:,}, rows of the "
            f"next request: {rows:,}"
        )

    def sending(self, rows: int) -> None:
        """Count rows that are about to be sent; `QueriesSpent` where they exceed the limit."""
        with self._lock:
            left = self.left()
            if left is not None and rows > left:
                raise QueriesSpent(self.spent(rows), self.limit or 0)
            self._note({"t": "sent", "n": rows})

    def failed(self, what: str, rows: int) -> None:
        """Count a request that failed temporarily and is sent again."""
        self._note({"t": "failed", "what": what, "n": rows})

    def answered(self, purpose: Purpose, values: Tensor, keys: Sequence[bytes]) -> None:
        """Count the answer to some inputs, known by their `keys`: scores, or one-hot labels, (n, classes)."""
        self._note({"t": "answer", **described(purpose), "n": len(values)})

    def refused(self, purpose: Purpose, rows: int) -> None:
        """Count a request that was refused."""
        self._note({"t": "refused", "kind": purpose.kind, "n": rows})

    def rejected(self, purpose: Purpose, status: str, key: bytes) -> None:
        """Keep that an input, of which a request was counted as refused, counts as rejected."""
        self._note({"t": "rejected", **described(purpose), "status": status}, key)

    def found_limit(self, most: int, refused: int) -> None:
        """Keep the number of rows that the server takes."""
        self._note({"t": "limit", "most": most, "refused": refused})

    def recalled(self, purpose: Purpose, keys: Sequence[bytes]) -> list[Tensor | None]:
        """For each input, an answer that is known already; None where it must be sent."""
        return [None] * len(keys)

    def done(self, stage: str, shard: int | None = None) -> None:
        """Forget what was kept for a shard that is finished, or for a whole stage."""

    def _note(self, content: Mapping[str, Any], *parts: bytes) -> None:
        with self._lock:
            count(self.totals, content)


_NEW: ContextVar[Callable[[int | None], Sent]] = ContextVar("sent", default=Sent)


def new_sent(limit: int | None) -> Sent:
    """What counts the rows of a served model that is opened now."""
    return _NEW.get()(limit)


@contextmanager
def counting_by(make: Callable[[int | None], Sent]) -> Iterator[None]:
    """Within it, the rows of served models that are opened are counted by what `make` returns for a limit."""
    token = _NEW.set(make)
    try:
        yield
    finally:
        _NEW.reset(token)


def key_of(row: Tensor) -> bytes:
    """The digest of an input (*features) on the CPU."""
    return blake2b(row.contiguous().numpy().tobytes(), digest_size=KEY_BYTES).digest()


def described(purpose: Purpose) -> dict[str, Any]:
    """A purpose as a record has it."""
    return {"stage": purpose.stage, "shard": purpose.shard, "kind": purpose.kind}


def count(totals: Totals, content: Mapping[str, Any]) -> None:
    """Add a record to the totals."""
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
