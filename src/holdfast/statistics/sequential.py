"""Exact test of a probability from as few draws as needed, and the confidence limit that belongs to it.

The test claims that the probability of a miss is below a limit. At each of some looks, numbers of draws that are fixed
before, it ends with the claim if there are few misses, and without it if there are many. Both boundaries and the
probability of a wrong claim are computed from the exact distribution of the number of misses, which is followed from
look to look. Jennison & Turnbull, "Confidence intervals for a binomial parameter following a multistage test",
Technometrics 25, 1983, for the exact computation and the limit, which orders the outcomes by the look at which they
end. Lan & DeMets, "Discrete sequential boundaries for clinical trials", Biometrika 70, 1983, for spending the failure
probability over the looks. Lan, Simon & Halperin, "Stochastically curtailed tests in long-term clinical trials",
Sequential Analysis 1, 1982, for ending a test without a prospect.

`docs/concepts/smoothing.md` compares the test with a confidence sequence and with equal shares for all looks.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from holdfast.core.errors import UsageError

_GROWTH = 1.25  # of the number of draws from look to look; 1.1 saves 5 % of the draws and has twice the looks
_EARLY = 0.1  # share of the failure probability that the first look may spend; the rest grows as a cube
_LOST = 1e-3  # largest probability, for any true one, that a look ends a test that the last look would have proved
_FEWEST = 25  # draws before which no test gives up
_GRID = 40  # probabilities at which `_LOST` is checked
_ROUNDED = 1 - 1e-6  # share of the failure probability that is used; the rest exceeds all errors of rounding
_TOLERANCE = 1e-12  # absolute error of a limit, which is then added to it

Masses = NDArray[np.float64]


@dataclass(frozen=True)
class SequentialTest:
    """Plan of a test whose claim is that the probability of a miss is below `limit`. The claim is wrong with a
    probability of at most `failure_probability`.
    """

    limit: float
    failure_probability: float
    looks: tuple[int, ...]
    """numbers of draws at which the test may end, in ascending order; it ends at the last one"""
    proves: tuple[int, ...]
    """largest number of misses with which the test ends with the claim, at each look; -1 if no number does"""
    gives_up: tuple[int, ...]
    """smallest number of misses with which the test ends without the claim, at each look"""

    def ends(self, misses: float) -> "Ends":
        """Return the probabilities of the ends of the test if a miss has the probability `misses`."""
        n_looks = len(self.looks)
        proved, given_up, draws = np.zeros(n_looks), np.zeros(n_looks), 0.0
        for look, (begin, masses) in enumerate(self._open(misses, n_looks)):
            n_before = self.looks[look - 1] if look else 0
            draws += masses.sum() * (self.looks[look] - n_before)
            proved[look] = masses[: max(self.proves[look] + 1 - begin, 0)].sum()
            given_up[look] = masses[max(self.gives_up[look] - begin, 0) :].sum()
        return Ends(proved, given_up, float(draws))

    def upper_limit(self, look: int, misses: int) -> float:
        """Return the upper confidence limit of the probability of a miss, for a test that ended at the look of this
        index with this number of misses.

        The limit is below the true probability with a probability of at most `failure_probability`. It is at most
        `limit` if and only if the test ended with the claim.
        """
        return _upper_limit(self, look, misses)

    def _open(self, misses: float, n_looks: int) -> "list[tuple[int, Masses]]":
        """For each of the first looks that is reached, the smallest number of misses and the probabilities of this
        number and the following ones, of tests that did not end before.
        """
        begin, masses, n_before, reached = 0, np.ones(1), 0, []
        for look in range(n_looks):
            masses = np.convolve(masses, _binomial(self.looks[look] - n_before, misses))
            reached.append((begin, masses))
            low, high = self.proves[look] + 1, self.gives_up[look]
            masses = masses[max(low - begin, 0) : max(high - begin, 0)]
            begin, n_before = max(begin, low), self.looks[look]
            if not len(masses):
                break
        return reached

    def _as_extreme(self, look: int, n_misses: int, misses: float) -> float:
        """Probability of an outcome that speaks as strongly for the claim as this one, or more strongly.

        Tests that end with the claim are ordered by their look, the earliest first, then those that reach the last
        look, by their misses, then those that give up, the latest first. More draws without a miss never move an
        outcome down in this order, so that the probability decreases with that of a miss.
        """
        reached = self._open(misses, look + 1)
        last = look == len(self.looks) - 1
        if last or n_misses <= self.proves[look]:
            earlier = sum(
                masses[: max(self.proves[at] + 1 - begin, 0)].sum()
                for at, (begin, masses) in enumerate(reached[:look])
            )
            if len(reached) <= look:
                return float(earlier)
            begin, masses = reached[look]
            return float(earlier + masses[: max(n_misses + 1 - begin, 0)].sum())
        less = sum(
            masses[max(self.gives_up[at] - begin, 0) :].sum()
            for at, (begin, masses) in enumerate(reached[:look])
        )
        if len(reached) > look:
            begin, masses = reached[look]
            less += masses[max(n_misses + 1 - begin, 0) :].sum()
        return float(1 - less)


@dataclass(frozen=True)
class Ends:
    """Probabilities with which a test ends at each of its looks."""

    proved: Masses
    """probability of ending with the claim, at each look"""
    given_up: Masses
    """probability of ending without the claim, at each look"""
    draws: float
    """mean number of draws"""


@lru_cache(maxsize=4096)
def _upper_limit(test: SequentialTest, look: int, n_misses: int) -> float:
    from scipy.optimize import brentq
    from scipy.special import betaincinv

    n, alpha = test.looks[look], _ROUNDED * test.failure_probability
    if n_misses == n:
        return 1.0
    last = len(test.looks) == 1
    if look == 0 and (last or n_misses <= test.proves[0]):  # the limit of Clopper and Pearson
        value = float(betaincinv(n_misses + 1, n - n_misses, 1 - alpha))
    else:
        value = float(
            brentq(lambda q: test._as_extreme(look, n_misses, q) - alpha, 0.0, 1.0, xtol=_TOLERANCE)
        )
    value = min(value + 2 * _TOLERANCE, 1.0)
    return min(value, test.limit) if n_misses <= test.proves[look] else max(value, test.limit)


def fewest_draws(limit: float, failure_probability: float) -> int:
    """Return the smallest number of draws with which a test may prove that the probability of a miss is below `limit`,
    which it does if no draw is a miss.
    """
    exponent = math.log(_ROUNDED * failure_probability) / math.log1p(-limit)
    return max(1, math.ceil(exponent))


def fixed_test(draws: int, failure_probability: float) -> SequentialTest:
    """Return the test with a single look and without a claim, whose confidence limit is that of Clopper and Pearson."""
    return SequentialTest(0.0, failure_probability, (draws,), (-1,), (0,))


@lru_cache(maxsize=256)
def sequential_test(limit: float, draws: int, failure_probability: float) -> SequentialTest:
    """Return a test that the probability of a miss is below `limit`, with at most `draws` draws.

    Up to the share t of the draws, a wrong claim has a probability of at most `failure_probability` times
    0.1 + 0.9 t³. A look ends a test without the claim only where, for any probability of a miss, the joint
    probability of such an end and of few enough misses at the last look is at most 0.001. Raises `UsageError` if even
    draws without a miss prove nothing.
    """
    fewest = fewest_draws(limit, failure_probability)
    if draws < fewest:
        raise UsageError(
            f"draws is {draws:,}; at least {fewest:,} are needed to show that a probability is below {limit:.6g} "
            f"with the failure probability {failure_probability:g}"
        )
    looks = _looks(limit, draws, failure_probability)
    nowhere = tuple(n + 1 for n in looks)
    last = _proves(limit, failure_probability, looks, nowhere)[-1]
    gives_up = (*(_gives_up(n, draws, last) for n in looks[:-1]), draws + 1)
    proves = _proves(limit, failure_probability, looks, gives_up)
    n_looks = len(proves)
    ends = (*gives_up[: n_looks - 1], proves[-1] + 1)
    return SequentialTest(limit, failure_probability, looks[:n_looks], proves, ends)


def _spent(share: float, failure_probability: float) -> float:
    """Probability of a wrong claim that is allowed up to this share of the draws."""
    return _ROUNDED * failure_probability * (_EARLY + (1 - _EARLY) * share**3)


def _looks(limit: float, draws: int, failure_probability: float) -> tuple[int, ...]:
    """The first number of draws at which no miss is a proof, larger ones that grow geometrically, and smaller ones, at
    which the test may only give up.
    """
    low, high = 1, draws  # at `draws` no miss is a proof
    while low < high:
        middle = (low + high) // 2
        if middle * math.log1p(-limit) <= math.log(_spent(middle / draws, failure_probability)):
            high = middle
        else:
            low = middle + 1
    looks = [low]
    while looks[0] // 2 >= _FEWEST:
        looks.insert(0, looks[0] // 2)
    while looks[-1] < draws:
        looks.append(min(draws, max(looks[-1] + 1, math.ceil(_GROWTH * looks[-1]))))
    return tuple(looks)


def _proves(
    limit: float, failure_probability: float, looks: tuple[int, ...], gives_up: tuple[int, ...]
) -> tuple[int, ...]:
    """The largest numbers of misses with which wrong claims stay within what may be spent up to each look that is
    reached.
    """
    begin, masses, n_before, wrong, proves = 0, np.ones(1), 0, 0.0, []
    for n, many in zip(looks, gives_up, strict=True):
        masses = np.convolve(masses, _binomial(n - n_before, limit))
        cumulative = masses.cumsum()
        allowed = _spent(n / looks[-1], failure_probability) - wrong
        count = int(np.searchsorted(cumulative, allowed, side="right"))
        count = min(count, max(many - begin, 0))
        wrong += float(cumulative[count - 1]) if count else 0.0
        proves.append(begin + count - 1)
        masses = masses[count : max(many - begin, 0)]
        begin, n_before = begin + count, n
        if not len(masses):  # every test has ended, so that no later look is reached
            break
    return tuple(proves)


def _gives_up(n: int, draws: int, last: int) -> int:
    """The smallest number of misses in `n` draws after which at most `last` misses in all draws are too improbable."""
    from scipy.special import bdtr, bdtrc

    low, high = 0, min(last, n) + 1
    while low < high:
        middle = (low + high) // 2
        rates = np.linspace(last / draws, max(middle / n, last / draws), _GRID).clip(1e-12, 1 - 1e-12)
        reached = bdtrc(middle - 1, n, rates) if middle else np.ones_like(rates)
        if float((reached * bdtr(last - middle, draws - n, rates)).max()) <= _LOST:
            high = middle
        else:
            low = middle + 1
    return low


def _binomial(n: int, p: float) -> Masses:
    """Probabilities of 0 to `n` misses in `n` draws."""
    from scipy.special import gammaln, xlog1py, xlogy

    k = np.arange(n + 1)
    logarithm = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1) + xlogy(k, p) + xlog1py(n - k, -p)
    masses: Masses = np.exp(logarithm)
    return masses
