"""Lower bounds of epsilon from guesses about the training data of a differentially private algorithm.

Steinke, Nasr & Jagielski, "Privacy Auditing with One (1) Training Run", NeurIPS 2023, arXiv:2305.08846, theorem 5.2:
the number of right guesses of one training, in which each canary is included independently with probability 1/2, is at
most that of randomised response, up to a term for delta. Jagielski, Ullman & Oprea, "Auditing Differentially Private
Machine Learning: How Private is Private SGD?", NeurIPS 2020, arXiv:2006.07709: from independent trainings with and
without an example, and Clopper-Pearson intervals of both rates.
"""

import math

import numpy as np

from holdfast.core.errors import UsageError
from holdfast.statistics.intervals import CONFIDENCE, clopper_pearson

_LARGEST = 60.0
"""an epsilon that no number of guesses can show; at it, a guess of randomised response is right in float64"""
_HALVINGS = 60
"""bisection steps, after which the interval is smaller than the precision of float64"""


def p_value(right: int, guesses: int, epsilon: float, delta: float = 0.0, canaries: int = 0) -> float:
    """Return the largest probability of at least `right` of `guesses` right guesses under (epsilon, delta)-differential
    privacy.

    `canaries` is the number of canaries about which a guess could be made; 0 for as many as guesses. It matters only
    if delta is not 0.
    """
    from scipy.stats import binom

    chance = 1 / (1 + math.exp(-epsilon))
    tail = float(binom.sf(right - 1, guesses, chance))
    if not delta or not right:
        return min(tail, 1.0)
    below = np.cumsum(binom.pmf(np.arange(right - 1, -1, -1), guesses, chance))
    steepest = float((below / np.arange(1, right + 1)).max())
    return min(tail + 2 * (canaries or guesses) * delta * steepest, 1.0)


def epsilon_from_guesses(
    right: int, guesses: int, *, delta: float = 0.0, canaries: int = 0, confidence: float = CONFIDENCE
) -> float:
    """Return the lower bound of epsilon from `right` of `guesses` right guesses in one training; 0 if none is shown.

    `canaries` is as in `p_value`. With probability `confidence` the bound does not exceed the true epsilon.

    >>> round(epsilon_from_guesses(100, 100), 2), round(epsilon_from_guesses(600, 1000), 3)
    (3.49, 0.297)
    """
    if not 0 <= right <= guesses:
        raise UsageError(f"right is {right}; expected a number from 0 to guesses={guesses}")
    low, high = 0.0, _LARGEST
    if p_value(right, guesses, low, delta, canaries) > 1 - confidence:
        return 0.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if p_value(right, guesses, middle, delta, canaries) > 1 - confidence:
            high = middle
        else:
            low = middle
    return low


def epsilon_from_rates(
    hits: int, members: int, alarms: int, others: int, *, delta: float = 0.0, confidence: float = CONFIDENCE
) -> float:
    """Return the lower bound of epsilon from independent trainings; 0 if none is shown.

    An attack says "member" in `hits` of `members` trainings with the example, and in `alarms` of `others` trainings
    without it. Its threshold must have been fixed on other trainings. Both rates have Clopper-Pearson bounds, which
    together hold with probability `confidence`. The complement of the attack is used if its bound is larger.
    """
    hit_rate = clopper_pearson(hits, members, confidence)
    alarm_rate = clopper_pearson(alarms, others, confidence)
    ratios = (
        (hit_rate[0] - delta, alarm_rate[1]),
        (1 - alarm_rate[1] - delta, 1 - hit_rate[0]),
    )
    return max(0.0, *(math.log(top / bottom) if top > 0 else 0.0 for top, bottom in ratios))
