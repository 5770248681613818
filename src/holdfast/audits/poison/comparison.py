"""The comparison of a set of examples with trusted ones, by which a set is flagged.

The networks are trained on both together, so that the scores do not depend on which examples are trusted. If the set
is clean and the trusted examples are a random part of the same population, the trusted ones are a random subset. The
test of a class and a score is then exact: among the examples with the largest scores, the number of trusted ones
follows the hypergeometric distribution. It is too small if the set contains a cluster of manipulated examples.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import gammaln

from holdfast.core.draws import Draws
from holdfast.core.types import Ids, Labels, Mask, PerExample

LEVEL = 0.01
"""Largest probability that a clean set is flagged, over all classes and scores together."""
FEW = 0.25
"""Largest number of trusted examples, relative to the expected one, that flags a set. A cluster of manipulated examples
has almost no trusted ones, while small differences between sources leave more: the losses of the two splits of
`mnist-mini` had ratios from 0.45."""
DETECTABLE = 0.2
"""Share of manipulated examples of a class that must be detectable for the result `not flagged`."""
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5)
"""Shares of a class, those with the largest scores, in which trusted examples are counted."""
_HALVINGS, _ROUNDING = 40, 1e-6
"""Bisection steps, and the error of the number of examples after them, which has no part in the number."""


@dataclass(frozen=True)
class Tested:
    """The result of the test of one score, in one class or in all."""

    score: str
    label: int | None
    """None for the test of all classes together"""
    examined: int
    """number of examples with the largest scores, for the share with the smallest p-value"""
    trusted: int
    """number of trusted examples among them"""
    expected: float
    """expected number of trusted examples among them in a clean set"""
    p: float
    """p-value after the Bonferroni correction for all shares, classes and scores"""
    excess: int
    """estimated number of examples of the set that a clean set would not have among them"""
    detectable: int | None
    """smallest number of manipulated examples with the largest scores by which the set is expected to be flagged; None
    if there are too few trusted examples"""

    @property
    def flagged(self) -> bool:
        """Whether the set is flagged by this class and score."""
        return self.p <= LEVEL


@dataclass(frozen=True)
class Comparison:
    """The results of all tests."""

    tests: Sequence[Tested]
    detectable: Mapping[int | None, float]
    """the smallest share of the audited examples of each class, and for None of all classes, that is expected to be
    flagged by each score if these examples have the largest ones; 1 if there are too few trusted examples"""
    enough: bool
    """whether the share `DETECTABLE` of each class, its trusted examples included, is flagged by each score"""
    needed: int
    """number of trusted examples of each class with which the share `DETECTABLE` of it is flagged"""

    @property
    def flagged(self) -> list[Tested]:
        """The tests by which the set is flagged, the smallest p-value first."""
        return sorted((test for test in self.tests if test.flagged), key=lambda test: test.p)


def compared(
    scores: Mapping[str, PerExample],
    compares: Mapping[str, Mask],
    y: Labels,
    trusted: Mask,
    *,
    ids: Ids,
    rng: Draws,
) -> Comparison:
    """Compare the scores of the examples that are `trusted` with those of the others, in each class.

    `compares` states for each score which examples are compared. It must not depend on `trusted`, like the scores.
    Examples with equal scores are in random order.
    """
    labels = torch.bincount(y).nonzero()[:, 0].tolist()
    shuffled = rng.at("ties").bits(ids).argsort()
    factor = len(SHARES) * (len(labels) + 1) * len(scores)
    tests, enough = [], True
    for name, values in scores.items():
        ordered = []
        for label in labels:
            rows = shuffled[((y == label) & compares[name])[shuffled]]
            ordered.append(trusted[rows[values[rows].argsort(descending=True, stable=True)]])
            tests.append(_tested(name, label, ordered[-1:], factor))
            smallest = tests[-1].detectable
            enough &= smallest is not None and smallest <= _size(DETECTABLE, len(rows))
        tests.append(_tested(name, None, ordered, factor))
    detectable = {
        label: max(_share(test, y[~trusted]) for test in tests if test.label == label)
        for label in (*labels, None)
    }
    needed = math.ceil(math.log(LEVEL / factor) / math.log(1 - DETECTABLE))
    return Comparison(tests, detectable, enough, needed)


def _share(test: Tested, y: Labels) -> float:
    """The detectable examples of a test as a share of the audited ones, whose labels are `y`."""
    n = len(y) if test.label is None else int((y == test.label).sum())
    return 1.0 if test.detectable is None else min(test.detectable / max(n, 1), 1.0)


def _tested(score: str, label: int | None, ordered: Sequence[Mask], factor: int) -> Tested:
    """The test of some classes, from which examples of each are trusted in the order of their scores."""
    classes = [trusted for trusted in ordered if 0 < int(trusted.sum()) < len(trusted)]
    results = [_counted(score, label, classes, share, factor) for share in SHARES]
    detectable = min((test.detectable for test in results if test.detectable is not None), default=None)
    return replace(min(results, key=lambda test: test.p), detectable=detectable)


def _counted(score: str, label: int | None, classes: Sequence[Mask], share: float, factor: int) -> Tested:
    """The test of the examples with the largest scores, a share of each class. The trusted ones of all classes are
    counted together, and their number is a sum of independent hypergeometric variables.
    """
    examined = counted = 0
    expected = excess = 0.0
    chances, sizes = np.ones(1), []
    for trusted in classes:
        n, n_trusted = len(trusted), int(trusted.sum())
        size = _size(share, n)
        sizes.append((n, n_trusted, size))
        k = int(trusted[:size].sum())
        chances = np.convolve(chances, _hypergeometric(n, n_trusted, size))
        examined, counted, expected = examined + size, counted + k, expected + size * n_trusted / n
        excess += size - k - k * (n - n_trusted) / n_trusted
    tails = np.minimum(1.0, factor * chances.cumsum())
    few = int(FEW * expected)  # largest number of trusted examples that flags a set
    p = float(tails[counted]) if counted <= few else 1.0
    flagging = int((tails[: few + 1] <= LEVEL).sum()) - 1
    detectable = None if flagging < 0 else _detectable(sizes, flagging)
    return Tested(score, label, examined, counted, expected, p, max(0, round(excess)), detectable)


def _detectable(sizes: Sequence[tuple[int, int, int]], flagging: int) -> int:
    """The smallest number of manipulated examples with the largest scores beside which at most `flagging` trusted ones
    are expected among the examined examples. `sizes` are the examples, trusted ones and examined ones of each class,
    and the manipulated examples are the same share of the examined ones of each class.
    """

    def trusted(share: float) -> float:
        """Expected number of trusted examples if a share of the examined examples is manipulated."""
        return sum((1 - share) * size * k / (n - share * size) for n, k, size in sizes)

    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if trusted(middle) <= flagging else (middle, high)
    return math.ceil(high * sum(size for *_, size in sizes) - _ROUNDING)


def _hypergeometric(n: int, n_trusted: int, size: int) -> NDArray[np.float64]:
    """The probability of each number of trusted examples, from 0, among `size` of `n` examples."""
    k = np.arange(min(size, n_trusted) + 1)
    logs = _log_binomial(n_trusted, k) + _log_binomial(n - n_trusted, size - k) - _log_binomial(n, size)
    return np.exp(logs)  # gammaln is infinite where there are fewer untrusted examples than needed


def _log_binomial(n: int, k: NDArray[np.int64] | int) -> NDArray[np.float64]:
    logs: NDArray[np.float64] = gammaln(n + 1) - gammaln(np.add(k, 1)) - gammaln(np.subtract(n + 1, k))
    return logs


def _size(share: float, n: int) -> int:
    return max(1, round(share * n))
