"""Rates and query budgets of principals: token buckets, and the protocol of a state that stores them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from holdfast.core.errors import UsageError
from holdfast.guard.detectors.query_clusters import QueryState


@dataclass(frozen=True)
class Allowance:
    """How many inputs a principal may send. Both limits apply."""

    rate_per_s: float | None = None
    """inputs for each second on average; None for no limit"""
    burst: float = 1.0
    """largest number of inputs at once, after a pause; also the largest size of one request"""
    budget: int | None = None
    """inputs in each period; None for no limit"""
    period_s: float = 86_400.0
    """seconds after whose beginning with the first input the budget is full again"""

    def __post_init__(self) -> None:
        if self.rate_per_s is not None and not (self.rate_per_s > 0 and self.burst >= 1):
            raise UsageError(
                f"the rate is {self.rate_per_s} inputs a second with a burst of {self.burst}; expected a positive "
                "rate and a burst of at least 1"
            )
        if self.budget is not None and not (self.budget >= 0 and self.period_s > 0):
            raise UsageError(
                f"the budget is {self.budget} inputs in {self.period_s} s; expected 0 or more in a positive period"
            )


@dataclass(frozen=True)
class Charge:
    """A request of a principal for `n` inputs."""

    principal: str
    n: int
    allowance: Allowance


@dataclass(frozen=True)
class TokenBucket:
    """What is stored about the rate and the budget of a principal."""

    tokens: float
    """inputs that may be sent at once"""
    seen: float
    """time at which the tokens were counted, in seconds of the state's clock"""
    used: int
    """inputs sent in the present period"""
    began: float
    """time at which the period began"""


@dataclass(frozen=True)
class Grant:
    """Answer to a charge."""

    granted: bool
    reason: str = ""
    """`rate`, `budget`, `size` for more inputs than ever allowed at once, or `lost` if the state cannot be reached"""
    retry_after_s: float = 0.0
    """seconds after which the same request would be granted; 0 if it is granted, or never"""
    lost: bool = False
    """whether the state could not be reached, so that the answer follows from `fail` of the state alone"""


def spent(charge: Charge, balance: TokenBucket | None, now: float) -> tuple[Grant, TokenBucket]:
    """Return the answer to a charge and the new balance. A charge that is not granted costs nothing."""
    limits, n = charge.allowance, charge.n
    old = balance or TokenBucket(limits.burst, now, 0, now)
    tokens = min(limits.burst, old.tokens + max(0.0, now - old.seen) * (limits.rate_per_s or 0.0))
    fresh = now >= old.began + limits.period_s
    used, began = (0, now) if fresh else (old.used, old.began)
    kept = TokenBucket(tokens, now, used, began)
    if (limits.rate_per_s is not None and n > limits.burst) or (
        limits.budget is not None and n > limits.budget
    ):
        return Grant(granted=False, reason="size"), kept
    if limits.budget is not None and used + n > limits.budget:
        return Grant(granted=False, reason="budget", retry_after_s=began + limits.period_s - now), kept
    if limits.rate_per_s is None:
        return Grant(granted=True), TokenBucket(tokens, now, used + n, began)
    # a rounding error of the refill must not refuse a request that was sent after the stated wait
    if n > tokens + 1e-9:
        return Grant(granted=False, reason="rate", retry_after_s=(n - tokens) / limits.rate_per_s), kept
    return Grant(granted=True), TokenBucket(tokens - n, now, used + n, began)


class SharedState(QueryState, Protocol):
    """Protocol of a state with the clusters of the query detector and the balances of principals."""

    def spend(self, charges: Sequence[Charge], now: float) -> list[Grant]:
        """In one transaction, answer charges in their order and store the balances. `now` is the time of the caller's
        clock in seconds.

        While the state cannot be reached, all charges are granted or refused, as `fail` states.
        """
