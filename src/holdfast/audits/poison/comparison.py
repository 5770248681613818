"""The comparison of a set of examples with trusted ones, by which a set is flagged.

The networks are trained on both together, so that the scores do not depend on which examples are trusted. If the set
is clean and the trusted examples are a random part of the same population, the trusted ones are a random subset. The
test of a class and a score is then exact: among the examples with the largest scores, the number of trusted ones
follows the hypergeometric distribution. It is too small if the set contains a cluster of manipulated examples.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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

    @property
    def flagged(self) -> bool:
        """Whether the set is flagged by this class and score."""
        return self.p <= LEVEL


@dataclass(frozen=True)
class Comparison:
    """The results of all tests."""

    tests: Sequence[Tested]
    detectable: Mapping[int, float]
    """for each class the smallest share of manipulated examples that is flagged if they have the largest scores; 1 if
    there are too few trusted examples"""
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
    tests, detectable = [], dict.fromkeys(labels, 0.0)
    for name, values in scores.items():
        ordered = []
        for label in labels:
            rows = shuffled[((y == label) & compares[name])[shuffled]]
            ordered.append(trusted[rows[values[rows].argsort(descending=True, stable=True)]])
            detectable[label] = max(detectable[label], _detectable(ordered[-1], factor))
        tests += [_tested(name, label, [own], factor) for label, own in zip(labels, ordered, strict=True)]
        tests.append(_tested(name, None, ordered, factor))
    needed = math.ceil(math.log(LEVEL / factor) / math.log(1 - DETECTABLE))
    return Comparison(tests, detectable, needed)


def _tested(score: str, label: int | None, ordered: Sequence[Mask], factor: int) -> Tested:
    """The test of some classes, from which examples of each are trusted in the order of their scores."""
    classes = [trusted for trusted in ordered if 0 < int(trusted.sum()) < len(trusted)]
    results = [_counted(score, label, classes, share, factor) for share in SHARES]
    return min(results, key=lambda test: test.p)


def _counted(score: str, label: int | None, classes: Sequence[Mask], share: float, factor: int) -> Tested:
    """The test of the examples with the largest scores, a share of each class. The trusted ones of all classes are
    counted together, and their number is a sum of independent hypergeometric variables.
    """
    examined = counted = 0
    expected = excess = 0.0
    chances = np.ones(1)
    for trusted in classes:
        n, n_trusted = len(trusted), int(trusted.sum())
        size = _size(share, n)
        k = int(trusted[:size].sum())
        chances = np.convolve(chances, _hypergeometric(n, n_trusted, size))
        examined, counted, expected = examined + size, counted + k, expected + size * n_trusted / n
        excess += size - k - k * (n - n_trusted) / n_trusted
    few = counted <= FEW * expected
    p = min(1.0, factor * float(chances[: counted + 1].sum())) if few else 1.0
    return Tested(score, label, examined, counted, expected, p, max(0, round(excess)))


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


def _detectable(trusted: Mask, factor: int) -> float:
    """The smallest share of a class that would be flagged if none of its examples is trusted."""
    n, n_trusted = len(trusted), int(trusted.sum())
    for share in SHARES if n_trusted else ():
        if factor * _hypergeometric(n, n_trusted, _size(share, n))[0] <= LEVEL:
            return share
    return 1.0
