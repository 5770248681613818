"""Numbers of answers of a worker, which the supervisor adds to the ledger of the pool."""

import threading
from dataclasses import dataclass, field

from holdfast.server.answering_requests import ServedSet


@dataclass(eq=False)
class AnswerCounts:
    """Numbers of answered inputs by epoch and principal since the last report."""

    arrived: threading.Event = field(default_factory=threading.Event)
    _counts: dict[tuple[str, int], dict[str, int]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, served: ServedSet, principal: str, rows: int) -> None:
        """Count the answers to one request. May be called by any thread."""
        with self._lock:
            counts = self._counts.setdefault((served.name, served.epoch), {})
            counts[principal] = counts.get(principal, 0) + rows
        self.arrived.set()

    def taken(self) -> list[tuple[str, int, dict[str, int]]]:
        """Return name of the set, epoch and numbers by principal since the last call, and begin at zero again."""
        with self._lock:
            counts, self._counts = self._counts, {}
        return [(name, epoch, principals) for (name, epoch), principals in counts.items()]
