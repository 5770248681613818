"""Loss and return of a shared state: what is reported, and when the next attempt is made."""

import logging
import time
from collections.abc import Callable
from dataclasses import replace

from holdfast.guard.detectors.query_clusters import Fail, Health

_log = logging.getLogger("holdfast.server")


class Reachability:
    """Record of whether a shared state can be reached. A loss and a return are reported once each, as log records.

    After a loss, an attempt is made at most once in each `retry_s` seconds, so that requests do not wait for a server
    that is away.
    """

    def __init__(
        self, name: str, fail: Fail, retry_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.health = Health()
        self._name, self._fail, self._retry_s, self._clock = name, fail, retry_s, clock
        self._again, self._lost_s = -float("inf"), 0.0

    @property
    def waiting(self) -> bool:
        """Whether the state is lost and the time of the next attempt has not come."""
        return not self.health.reachable and self._clock() < self._again

    def lost(self, error: Exception) -> None:
        """Record that the state could not be reached."""
        now = self._clock()
        self._again = now + self._retry_s
        if self.health.reachable:
            self._lost_s = now
            what = (
                "requests are answered without it"
                if self._fail == "open"
                else "requests that need it are refused"
            )
            _log.error("The %s is lost; %s until it returns: %s", self._name, what, error)
            self.health = replace(self.health, reachable=False, losses=self.health.losses + 1)
        self.health = replace(self.health, error=f"{type(error).__name__}: {error}")

    def reached(self) -> None:
        """Record that the state was reached."""
        if not self.health.reachable:
            _log.info("The %s has returned after %.1f s", self._name, self._clock() - self._lost_s)
            self.health = replace(self.health, reachable=True)

    def emptied(self) -> None:
        """Record that the content of the state was removed or replaced, so that earlier queries are forgotten."""
        _log.error(
            "The %s was emptied or replaced; earlier queries and used budgets are forgotten", self._name
        )
        self.health = replace(self.health, emptied=self.health.emptied + 1)
