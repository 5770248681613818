"""Rates and budgets of API keys, shared by all workers in one SQLite database.

A rate is a token bucket: it allows `rate` inputs per second on average, and bursts of ten seconds. A budget is a number
of inputs in total.
"""

import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from holdfast.core.errors import TargetError
from holdfast.serving.refusals import Refused, wait_first
from holdfast.store.files import PRIVATE

BURST_S = 10.0
"""number of seconds of the rate that may be used at once"""
_WAIT_S = 5.0


@dataclass(frozen=True)
class Spending:
    """A request for a number of inputs of a principal, with the limits of its key."""

    principal: str
    rows: int
    rate: float | None
    budget: int | None


class Quotas:
    """Rates and budgets in the database at a path, which several processes may use at the same time."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        try:
            # used by one thread at a time, which may be another one than this
            self._database = sqlite3.connect(
                path, timeout=_WAIT_S, isolation_level=None, check_same_thread=False
            )
            path.chmod(PRIVATE)
            self._database.execute("PRAGMA journal_mode=WAL")
            # A power failure may lose the last moments of counting; a kill loses nothing.
            self._database.execute("PRAGMA synchronous=NORMAL")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS quota (principal TEXT PRIMARY KEY, used INTEGER, tokens REAL, at REAL)"
            )
        except (sqlite3.Error, OSError) as error:
            raise TargetError(
                f"{str(path)!r} cannot be used for the limits of keys: {error}; check the path and the disk"
            ) from error

    def take(self, spendings: Sequence[Spending]) -> list[Refused | None]:
        """Count the inputs of requests in one transaction, and return a refusal for each that exceeds a limit.

        Refused requests are not counted. If the database cannot be used, all are refused with status 503.
        """
        if all(each.rate is None and each.budget is None for each in spendings):
            return [None] * len(spendings)
        try:
            with closing(self._database.cursor()) as cursor:
                cursor.execute("BEGIN IMMEDIATE")
                try:
                    refusals = [self._take(cursor, each) for each in spendings]
                finally:
                    cursor.execute("COMMIT")
        except sqlite3.Error:
            failure = wait_first("the limits of the key cannot be checked", 1.0, cause="quota")
            return [failure] * len(spendings)
        return refusals

    def _take(self, cursor: sqlite3.Cursor, each: Spending) -> Refused | None:
        if each.rate is None and each.budget is None:
            return None
        now = self._clock()
        row = cursor.execute(
            "SELECT used, tokens, at FROM quota WHERE principal = ?", (each.principal,)
        ).fetchone()
        full = max((each.rate or 0.0) * BURST_S, 1.0)
        used, tokens, at = row or (0, full, now)
        if each.budget is not None and used + each.rows > each.budget:
            return Refused(429, "the budget of the key is used up", (), "budget")
        if each.rate is not None:
            # at least 0, because the clock may have been set back
            tokens = min(full, tokens + max(now - at, 0.0) * each.rate)
            # a request that is larger than the bucket needs a full one, and leaves a debt
            needed = min(float(each.rows), full)
            if tokens < needed:
                wait_s = (needed - tokens) / each.rate
                return wait_first("the rate of the key is exceeded", wait_s, status=429, cause="rate")
            tokens -= each.rows
        cursor.execute(
            "INSERT OR REPLACE INTO quota VALUES (?, ?, ?, ?)",
            (each.principal, used + each.rows, tokens, now),
        )
        return None

    def close(self) -> None:
        """Close the database."""
        self._database.close()
