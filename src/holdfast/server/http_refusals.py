"""The error that ends a request with a 4xx or 5xx response. Its message is the only content of the response."""

from dataclasses import dataclass


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
