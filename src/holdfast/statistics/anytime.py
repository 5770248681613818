"""Confidence intervals of a proportion that are valid at all times, although they are computed after each observation.

The beta-binomial mixture of Robbins, "Statistical methods related to the law of the iterated logarithm", Annals of
Mathematical Statistics 41, 1970, as in Howard, Ramdas, McAuliffe & Sekhon, "Time-uniform, nonparametric, nonasymptotic
confidence sequences", Annals of Statistics 49, 2021, arXiv:1810.08240.
"""

import math
from collections.abc import Callable

_STEPS = 100  # bisections; more than the 53 bits of a float


def confidence_sequence(
    k: int, n: int, confidence: float = 0.95, *, expected: float = 0.5
) -> tuple[float, float]:
    """Return an interval that contains the proportion at all times together with the given probability, after `k` of
    `n` observations were true.

    The interval is narrowest if the proportion is near `expected`, and valid for any. It is (0, 1) before the first
    observation.

    >>> [round(end, 4) for end in confidence_sequence(5, 5000, expected=0.001)]
    [0.0002, 0.0028]
    """
    if n == 0:
        return 0.0, 1.0
    a, b = 1.0, (1 - expected) / expected  # the mixture has the mean `expected`
    mixture = _log_beta(a + k, b + n - k) - _log_beta(a, b)
    limit = mixture + math.log(1 - confidence)

    def outside(p: float) -> bool:
        likelihood = (k * math.log(p) if k else 0.0) + ((n - k) * math.log1p(-p) if k < n else 0.0)
        return likelihood < limit

    share = k / n
    low = 0.0 if k == 0 else _root(lambda p: not outside(p), 0.0, share)
    high = 1.0 if k == n else _root(outside, share, 1.0)
    return low, high


def _root(beyond: Callable[[float], bool], low: float, high: float) -> float:
    """The place between `low` and `high` from which on `beyond` is true."""
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if beyond(middle):
            high = middle
        else:
            low = middle
    return (low + high) / 2


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
