"""Limits the rate of requests to a server, and observes the pauses that it requests."""

from collections.abc import Callable
from threading import Lock


class RequestPace:
    """Limits the start of requests to `rate` a second and to times outside of pauses, for all threads together."""

    def __init__(
        self, rate: float | None, now: Callable[[], float], sleep: Callable[[float], object]
    ) -> None:
        self._rate, self._now, self._sleep = rate, now, sleep
        self._lock = Lock()
        self._next = self._paused = 0.0
        """earliest start of the next request, and end of the pause"""

    def wait(self, waited: float = 0.0) -> None:
        """Wait until a request may begin. The caller has already waited until the time `waited`."""
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
        """Prevent new requests for so many seconds. Returns the time at which the pause ends."""
        with self._lock:
            until = self._now() + seconds
            self._paused = max(self._paused, until)
        return until
