"""How often a server may be asked: a rate of requests, and the pauses that it asks for."""

from collections.abc import Callable
from threading import Lock


class Pace:
    """Lets requests begin at most `rate` times a second, and none during a pause; for all threads together."""

    def __init__(
        self, rate: float | None, now: Callable[[], float], sleep: Callable[[float], object]
    ) -> None:
        self._rate, self._now, self._sleep = rate, now, sleep
        self._lock = Lock()
        self._next = self._paused = 0.0
        """when the next request may begin, and when the pause is over"""

    def wait(self, waited: float = 0.0) -> None:
        """Return when a request may begin; the caller has `waited` until then already."""
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
            ):  # else a pause came meanwhile, and the requests after it are spread again
                return
            waited = begin

    def pause(self, seconds: float) -> float:
        """Let no request begin for so long; returns when that is over."""
        with self._lock:
            until = self._now() + seconds
            self._paused = max(self._paused, until)
        return until
