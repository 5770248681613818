"""Rates and budgets of API keys, in the state that all workers share.

A rate allows `rate` inputs per second on average, and bursts of `burst_of(rate)` inputs. A budget is a number of inputs
in total.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from holdfast.guard.states.spending import Allowance, Charge, Grant, SharedState
from holdfast.server.http_refusals import Refused, wait_first
from holdfast.server.keys import burst_of


@dataclass(frozen=True)
class Spending:
    """A request for a number of inputs of a principal, with the limits of its key."""

    principal: str
    rows: int
    rate: float | None
    budget: int | None


@dataclass(frozen=True)
class Quotas:
    """Rates and budgets in a shared state."""

    state: SharedState
    clock: Callable[[], float] = time.time

    def take(self, spendings: Sequence[Spending]) -> list[Refused | None]:
        """Count the inputs of requests in one transaction, and return a refusal for each that exceeds a limit.

        Refused requests are not counted. If the state cannot be reached, all are refused with status 503.
        """
        limited = [each for each in spendings if each.rate is not None or each.budget is not None]
        if not limited:
            return [None] * len(spendings)
        grants = iter(self.state.spend([_charge(each) for each in limited], self.clock()))
        return [
            None if each.rate is None and each.budget is None else _refusal(each, next(grants))
            for each in spendings
        ]


def _charge(each: Spending) -> Charge:
    burst = 1 if each.rate is None else burst_of(each.rate)
    return Charge(each.principal, each.rows, Allowance(each.rate, burst, each.budget, math.inf))


def _refusal(spending: Spending, grant: Grant) -> Refused | None:
    if grant.granted:
        return None
    if grant.lost:
        return wait_first("the limits of the key cannot be checked", 1.0, cause="quota")
    if grant.reason == "size":
        return _too_many(spending)
    if grant.reason == "rate":
        return wait_first("the rate of the key is exceeded", grant.retry_after_s, status=429, cause="rate")
    return Refused(429, "the budget of the key is used up", (), "budget")


def _too_many(spending: Spending) -> Refused:
    """The refusal of a request that no waiting makes acceptable, with the number of rows that is."""
    limits = {"rate": None if spending.rate is None else burst_of(spending.rate), "budget": spending.budget}
    most, name = min((most, name) for name, most in limits.items() if most is not None)
    return Refused(
        413,
        f"the request has {spending.rows} rows, and the {name} of the key allows at most {most} at once; send fewer "
        "rows in each request",
        cause=name,
    )
