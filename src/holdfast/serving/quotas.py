"""Rates and budgets of API keys, in the state that all workers share.

A rate allows `rate` inputs per second on average, and bursts of ten seconds. A budget is a number of inputs in total.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from holdfast.serving.refusals import Refused, wait_first
from holdfast.serving.states.spending import Allowance, Charge, Grant, SharedState

_BURST_S = 10.0
"""number of seconds of the rate that may be used at once"""


@dataclass(frozen=True)
class Spending:
    """A request for a number of inputs of a principal, with the limits of its key."""

    principal: str
    rows: int
    rate: float | None
    budget: int | None


@dataclass(frozen=True)
class Quotas:
    """Rates and budgets in a shared state. A request has at most `max_rows` inputs, which any rate allows at once."""

    state: SharedState
    max_rows: int = 64
    clock: Callable[[], float] = time.time

    def take(self, spendings: Sequence[Spending]) -> list[Refused | None]:
        """Count the inputs of requests in one transaction, and return a refusal for each that exceeds a limit.

        Refused requests are not counted. If the state cannot be reached, all are refused with status 503.
        """
        limited = [
            place for place, each in enumerate(spendings) if not (each.rate is None and each.budget is None)
        ]
        refusals: list[Refused | None] = [None] * len(spendings)
        if limited:
            charges = [self._charge(spendings[place]) for place in limited]
            for place, grant in zip(limited, self.state.spend(charges, self.clock()), strict=True):
                refusals[place] = _refusal(grant)
        return refusals

    def _charge(self, each: Spending) -> Charge:
        burst = max((each.rate or 0.0) * _BURST_S, float(self.max_rows))
        return Charge(each.principal, each.rows, Allowance(each.rate, burst, each.budget, math.inf))


def _refusal(grant: Grant) -> Refused | None:
    if grant.granted:
        return None
    if grant.lost:
        return wait_first("the limits of the key cannot be checked", 1.0, cause="quota")
    if grant.reason == "rate":
        return wait_first("the rate of the key is exceeded", grant.retry_after_s, status=429, cause="rate")
    return Refused(429, "the budget of the key is used up", (), "budget")
