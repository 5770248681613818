"""Confidence intervals, statistical tests, and thresholds. They are exact if there is a closed form. Tests and
intervals of a proportion that stay valid when draws are taken one after another are among them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.estimate import Estimate
from holdfast.core.types import Labels, Mask, PerExample

CONFIDENCE = 0.95
"""confidence level of the intervals of all metrics"""

RESAMPLES = 2000
"""number of bootstrap resamples; Efron & Tibshirani, "An introduction to the bootstrap", 1993, recommend over 1,000"""

FEW = 6
"""number of examples below which a median has no bound at 95 %, and resamples have too few different values"""

_CHUNK = 1 << 22  # indices in memory at once: 32 MB of int64
_BOOTSTRAP = Draws(0).at("bootstrap")  # fixed random numbers: the interval is a function of the data alone

Statistic = Callable[[Tensor], PerExample]
"""function `statistic(rows)` that returns its value for each row of `rows` (resamples, n), which are indices of
examples"""


def normal_quantile(p: float) -> float:
    """Return the quantile of the standard normal distribution at `p`."""
    from scipy.special import ndtri

    return float(ndtri(p))


def bonferroni(confidence: float, claims: int) -> float:
    """Return the confidence that each of `claims` intervals needs so that all of them together contain the true values
    with the probability `confidence` (Bonferroni correction).
    """
    return 1 - (1 - confidence) / max(claims, 1)


@dataclass(frozen=True)
class AgainstMajority:
    """Comparison of the accuracy of a model with that of always predicting the most frequent label."""

    low: float
    """lower end of the accuracy's confidence interval"""
    high: float
    """upper end of the accuracy's confidence interval"""
    majority: float
    """fraction of examples with the most frequent label"""
    at_chance: bool
    """whether the accuracy does not exceed that of the majority class, or cannot be distinguished from guessing"""


NEAR_CHANCE = 1.5
"""multiple of the accuracy of guessing among the labels that occur, up to which a model may count as at chance"""
FEWEST = 20
"""number of examples below which a model is at chance only if its interval does not exceed the share of the majority
class"""


def against_majority(
    correct: Mask, y: Labels, classes: int | None = None, confidence: float = CONFIDENCE
) -> AgainstMajority:
    """Compare the accuracy of a model with that of always predicting the most frequent label.

    `correct` and `y` have one entry for each example (n), and `classes` is the number of classes of the model. If some
    of them have no examples, the share of the majority class is that among all classes, if each had as many examples
    as those that occur have on average. The model is at chance if the upper end of its interval does
    not exceed the share of the majority class. With at least 20 examples it is also at chance if the lower end does not
    exceed that share and the accuracy is at most 1.5 times that of guessing. With a single label it is never at chance.
    """
    n, counts = len(y), torch.unique(y, return_counts=True)[1]
    n_correct = int(correct.sum())
    low, high = clopper_pearson(n_correct, n, confidence)
    n_classes = max(classes or 0, len(counts))
    majority = int(counts.max()) / n * len(counts) / n_classes
    near_chance = n >= FEWEST and n_correct / n <= NEAR_CHANCE / n_classes
    at_chance = len(counts) > 1 and (high <= majority or (near_chance and low <= majority))
    return AgainstMajority(low, high, majority, at_chance)


def clopper_pearson(k: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the exact (Clopper-Pearson) confidence interval of a proportion for which `k` of `n` were observed. Its
    coverage is at least `confidence`.

    >>> [round(end, 4) for end in clopper_pearson(0, 10)]
    [0.0, 0.3085]
    """
    from scipy.special import betaincinv

    if n == 0:
        return 0.0, 1.0
    tail = (1 - confidence) / 2
    low = 0.0 if k == 0 else float(betaincinv(k, n - k + 1, tail))
    high = 1.0 if k == n else float(betaincinv(k + 1, n - k, 1 - tail))
    return low, high


def proportion(mask: Mask, confidence: float = CONFIDENCE) -> Estimate:
    """Return the share of true entries of a mask with its exact (Clopper-Pearson) confidence interval. At least one
    entry is needed.
    """
    k, n = int(mask.sum()), len(mask)
    return Estimate(k / n, *clopper_pearson(k, n, confidence), n)


def largest(estimates: Sequence[Estimate]) -> Estimate:
    """Return the largest of several quantities. Its interval has the confidence with which all of their intervals hold
    together. At least one is needed.
    """
    return Estimate(
        max(each.value for each in estimates),
        max(each.low for each in estimates),
        max(each.high for each in estimates),
        min(each.n for each in estimates),
    )


def complement(estimate: Estimate) -> Estimate:
    """Return one minus a proportion, with the corresponding confidence interval."""
    return Estimate(1 - estimate.value, 1 - estimate.high, 1 - estimate.low, estimate.n)


def median(values: PerExample, confidence: float = CONFIDENCE, *, least: float = 0.0) -> Estimate:
    """Return the median of values, which may be infinite, with its exact confidence interval between two order
    statistics.

    For an even number of values it is the lower middle one, so that finite and infinite values are not averaged. With
    too few examples (fewer than six at 95 %) an order statistic is missing, and the interval ends at `least` or
    infinity.
    """
    from scipy.special import bdtr

    n, ordered = len(values), values.double().sort().values
    # number of order statistics that may be cut off at each end
    below = int((bdtr(range(n), n, 0.5) <= (1 - confidence) / 2).sum())
    low = float(ordered[below - 1]) if below else least
    high = float(ordered[n - below]) if below else math.inf
    return Estimate(float(ordered[(n - 1) // 2]), low, high, n)


def resampled(statistic: Statistic, n: int, resamples: int = RESAMPLES) -> PerExample:
    """Return the values of a statistic on bootstrap samples, `resamples` samples of `n` examples with replacement, as
    float64. The samples are always the same.
    """
    return torch.cat([statistic(rows).double() for rows in _rows(n, resamples)])


def _rows(n: int, resamples: int) -> Iterator[Tensor]:
    size = max(1, _CHUNK // n)
    for start in range(0, resamples, size):
        yield _chunk(n, start, min(start + size, resamples))


# A report computes tens of intervals from as many examples each, and drawing their samples took most of the time.
@lru_cache(maxsize=4)
def _chunk(n: int, start: int, stop: int) -> Tensor:
    return _BOOTSTRAP.integers(torch.arange(start, stop), n, n)


@dataclass(frozen=True)
class Support:
    """Range of possible values of a statistic, to which its confidence interval is clipped."""

    low: float = -math.inf
    high: float = math.inf


UNIT = Support(0.0, 1.0)
"""support of shares and of their averages"""


def bootstrap(
    statistic: Statistic,
    n: int,
    confidence: float = CONFIDENCE,
    *,
    support: Support = UNIT,
    influence: PerExample | None = None,
) -> Estimate:
    """Return a statistic with its bias-corrected bootstrap confidence interval. The interval is also accelerated (BCa)
    if `influence` is given.

    `influence` is the contribution of each example to the statistic, up to a constant. If all resamples agree, or there
    are fewer than six examples, resampling cannot show the uncertainty. The interval is then widened by the share of
    the population that may be unobserved at this confidence, as if its values were at the ends of the support.
    """
    value = float(statistic(torch.arange(n)[None])[0])
    return _corrected(value, resampled(statistic, n), n, confidence, support, influence)


def _corrected(
    value: float,
    resampled_values: PerExample,
    n: int,
    confidence: float,
    support: Support,
    influence: PerExample | None = None,
) -> Estimate:
    """The value with the interval of `bootstrap`, from the values of the bootstrap samples."""
    from scipy.special import ndtr

    if n < FEW or bool((resampled_values == resampled_values[0]).all()):
        unseen = 1 - ((1 - confidence) / 2) ** (1 / n)
        return Estimate(value, _towards(value, support.low, unseen), _towards(value, support.high, unseen), n)
    resamples = len(resampled_values)
    # ties count half; the share is kept away from 0 and 1, where the correction would be infinite
    share = float(((resampled_values < value).double() + 0.5 * (resampled_values == value).double()).mean())
    bias = normal_quantile(min(max(share, 1 / (resamples + 1)), resamples / (resamples + 1)))
    acceleration = 0.0 if influence is None else _acceleration(influence)
    ends = []
    for tail in ((1 - confidence) / 2, (1 + confidence) / 2):
        z = bias + normal_quantile(tail)
        # the correction has a pole where the divisor is zero
        shift = bias + z / max(1 - acceleration * z, 1e-6)
        ends.append(_quantile(resampled_values, float(ndtr(shift))))
    low, high = min(ends[0], value), max(ends[1], value)
    return Estimate(value, max(low, support.low), min(high, support.high), n)


def _towards(value: float, end: float, share: float) -> float:
    return value + share * (end - value) if math.isfinite(end) else end


def _acceleration(influence: PerExample) -> float:
    centred = influence.double() - influence.double().mean()
    spread = float((centred**2).sum())
    return 0.0 if spread == 0 else float((centred**3).sum()) / (6 * spread**1.5)


def _quantile(values: PerExample, p: float) -> float:
    """The smallest value that is not exceeded by at least a share `p` of the values; infinite values are kept."""
    ordered = values.sort().values
    return float(ordered[min(max(math.ceil(p * len(ordered)) - 1, 0), len(ordered) - 1)])


def mean(values: PerExample, confidence: float = CONFIDENCE, *, support: Support = UNIT) -> Estimate:
    """Return the mean of values with its BCa bootstrap confidence interval."""
    precise = values.double()
    return bootstrap(
        lambda rows: precise[rows].mean(1), len(precise), confidence, support=support, influence=precise
    )


def occurrences(rows: Tensor) -> Tensor:
    """Return how often each example occurs in each bootstrap sample (resamples, n), float64, from the indices of the
    examples of the samples, `rows` (resamples, n).
    """
    return _counts(rows, rows.shape[1])


def mean_ratio(
    numerators: Tensor, denominators: Tensor, confidence: float = CONFIDENCE, *, support: Support = UNIT
) -> Estimate:
    """Return the mean over columns of the ratio of two sums over examples, both (n, columns), with its bootstrap
    confidence interval: for one column a ratio of sums, for the intersections and unions of classes the mean IoU.

    Columns whose denominators sum to 0, as those of a class that does not occur in a resample, do not count; without
    any other column the mean is 0.
    """
    above, below = numerators.double(), denominators.double()

    def statistic(rows: Tensor) -> PerExample:
        weights = occurrences(rows)
        sums, totals = weights @ above, weights @ below
        ratios = torch.where(totals > 0, sums / totals.where(totals > 0, 1.0), 0.0)
        return ratios.sum(1) / (totals > 0).sum(1).clamp_min(1)

    return bootstrap(statistic, len(above), confidence, support=support)


def ratios(numerators: Tensor, denominators: Tensor, confidence: float = CONFIDENCE) -> list[Estimate]:
    """Return for each column the ratio of two sums over examples, both (n, columns), with the interval of `mean_ratio`
    for this column alone. All columns have the same bootstrap samples, which takes the time of one of them.
    """
    above, below = numerators.double(), denominators.double()

    def statistic(rows: Tensor) -> Tensor:
        weights = occurrences(rows)
        totals = weights @ below
        return torch.where(totals > 0, (weights @ above) / totals.where(totals > 0, 1.0), 0.0)

    n = len(above)
    values = statistic(torch.arange(n)[None])[0].tolist()
    columns = torch.cat([statistic(rows) for rows in _rows(n, RESAMPLES)]).T
    return [
        _corrected(value, column, n, confidence, UNIT) for value, column in zip(values, columns, strict=True)
    ]


@dataclass(frozen=True)
class McNemar:
    """Result of a McNemar test, which tests whether two paired series of true or false outcomes differ."""

    only_first: int
    """number of examples that are true in the first judgement only"""
    only_second: int
    """number of examples that are true in the second judgement only"""
    p: float
    """exact two-sided p-value of this imbalance under the hypothesis that both judgements are equally good"""


def mcnemar(first: Mask, second: Mask) -> McNemar:
    """Perform the exact McNemar test of two paired series of true or false outcomes, which is a sign test on the
    examples where they differ.
    """
    ahead, behind = int((first & ~second).sum()), int((second & ~first).sum())
    differ = ahead + behind
    return McNemar(ahead, behind, min(1.0, 2 * upper_tail(max(ahead, behind), differ)))


def upper_tail(k: int, n: int, p: float = 0.5) -> float:
    """Return the probability of at least `k` successes in `n` independent trials, each of which succeeds with the
    probability `p`.
    """
    from scipy.special import betainc

    return 1.0 if k <= 0 else float(betainc(k, n - k + 1, p))


def paired_difference(first: Mask, second: Mask, confidence: float = CONFIDENCE) -> Estimate:
    """Return the share of true entries of `first` minus that of `second`, measured on the same examples, with the
    confidence interval of Bonett and Price.
    """
    test = mcnemar(first, second)
    return difference_of_counts(test.only_first, test.only_second, len(first), confidence)


def difference_of_counts(
    only_first: int, only_second: int, n: int, confidence: float = CONFIDENCE
) -> Estimate:
    """Return `paired_difference` from the numbers of examples, of `n`, that are true in one of both series only."""
    ahead, behind = (only_first + 1) / (n + 2), (only_second + 1) / (n + 2)
    centre = ahead - behind
    reach = normal_quantile((1 + confidence) / 2) * math.sqrt((ahead + behind - centre**2) / (n + 2))
    value = (only_first - only_second) / n
    return Estimate(value, max(-1.0, min(centre - reach, value)), min(1.0, max(centre + reach, value)), n)


def independent_difference(
    k: int, n: int, other_k: int, other_n: int, confidence: float = CONFIDENCE
) -> Estimate:
    """Return the difference of two proportions that were measured on different examples, k / n minus other_k / other_n,
    with its hybrid score interval.

    Newcombe, "Interval estimation for the difference between independent proportions", Statistics in Medicine 17, 1998
    (method 10). The number of examples of the estimate is the smaller one.
    """
    first, second = wilson(k, n, confidence), wilson(other_k, other_n, confidence)
    value = k / n - other_k / other_n
    down = math.hypot(k / n - first[0], second[1] - other_k / other_n)
    up = math.hypot(first[1] - k / n, other_k / other_n - second[0])
    return Estimate(value, max(-1.0, value - down), min(1.0, value + up), min(n, other_n))


def wilson(k: int, n: int, confidence: float) -> tuple[float, float]:
    """Return the score interval of the proportion k / n (Wilson, JASA 22, 1927)."""
    z, share = normal_quantile((1 + confidence) / 2), k / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - reach), min(1.0, centre + reach)


def threshold(clean: PerExample, false_positives: float) -> float:
    """Return the threshold of a detector: the lowest score of a clean input that at most the fraction `false_positives`
    of the clean scores exceed. At least one score is needed.
    """
    return float(clean.sort().values[len(clean) - 1 - math.floor(false_positives * len(clean))])


def auroc(clean: PerExample, attacked: PerExample, confidence: float = 0.95) -> Estimate:
    """Return the area under the ROC curve of a detector with its confidence interval: the probability that an attacked
    input has a higher score than a clean one, where ties count half.

    The bootstrap interval resamples examples, so that the clean and the attacked input of an example stay together.
    """
    n = len(clean)
    scores, codes = torch.unique(torch.cat((clean, attacked)), return_inverse=True)

    def statistic(rows: torch.Tensor) -> PerExample:
        below, equal = (_counts(codes[half][rows], len(scores)) for half in (slice(n), slice(n, None)))
        return (equal * (below.cumsum(1) - below / 2)).sum(1) / n**2

    return bootstrap(statistic, n, confidence)


def _counts(codes: torch.Tensor, of: int) -> torch.Tensor:
    """Counts of the codes 0 to `of` - 1 in each row, float64."""
    counts = torch.zeros(len(codes), of, dtype=torch.float64)
    return counts.scatter_add_(1, codes, torch.ones_like(codes, dtype=torch.float64))


def median_width(margins: PerExample) -> float:
    """Return the median of the absolute margins of a classifier, which is used as the scale of its logits; 0 if it is
    not finite.
    """
    width = float(margins.double().abs().median())
    return width if math.isfinite(width) else 0.0


def balance(scores: PerExample, width: float) -> float:
    """Return the factor by which the scores of a detector are multiplied so that their interquartile range is `width`;
    1 if one of the two is zero or infinite.
    """
    ordered = scores.double().sort().values
    spread = float(ordered[3 * len(ordered) // 4] - ordered[len(ordered) // 4])
    return width / spread if width > 0 and 0 < spread < math.inf else 1.0


_ROUNDED = 1e-9  # so that 0.001 * 1000 counts as 1


def fewest_examples(false_positives: float, scores: int = 1) -> int:
    """Return the number of calibration inputs with which `scores` scores can always be combined: scores / alpha - 1.

    >>> fewest_examples(0.001), fewest_examples(0.001, 2)
    (999, 1999)
    """
    return math.ceil(scores / false_positives - _ROUNDED) - 1


def combined_thresholds(
    scores: Sequence[PerExample], false_positives: float, already: Mask | None = None
) -> tuple[float, ...] | None:
    """Return a threshold for each score, such that a new input exceeds one of them with a probability of at most
    `false_positives`; None if there are too few inputs.

    Each of `scores` has the values of one score for all calibration inputs (n,). `already` is the mask of the inputs on
    which a rule with a given threshold fires, which counts as well; without scores it is decided whether these rules
    alone keep to the share. The k-th largest value of each score is its threshold, with the same k for all.
    """
    masks = [*scores, *([] if already is None else [already])]
    n = len(masks[0])
    allowed = math.floor(false_positives * (n + 1) + _ROUNDED)
    if already is not None and not scores:
        return () if int(already.sum()) + 1 <= allowed else None
    ranks = torch.stack([_ranks(values) for values in scores])
    fixed = torch.zeros(n, dtype=torch.bool) if already is None else already
    for k in range(min(allowed, n), 0, -1):
        inside = ranks <= k
        n_exceeding = int((inside.any(0) | fixed).sum())
        # A new input that exceeds the threshold of a score has a larger value than the k-th largest, whose own rank
        # becomes k + 1; it leaves unless another rule includes it.
        pushed = [
            int((inside[j] & (ranks[j] == k) & ~fixed & ~_others(inside, j)).sum())
            for j in range(len(scores))
        ]
        n_with_new = n_exceeding + 1 - (min(pushed) if already is None else 0)
        if n_with_new <= allowed:
            return tuple(float(values.sort(descending=True).values[k - 1]) for values in scores)
    return None


def _ranks(values: PerExample) -> torch.Tensor:
    """Number of values that are at least as large, for each value."""
    ordered = values.sort().values
    return len(values) - torch.searchsorted(ordered, values.contiguous())


def _others(inside: torch.Tensor, j: int) -> Mask:
    """Mask of the inputs that are inside for another score than the j-th."""
    return inside.sum(0) > inside[j].int()


_STEPS = 100  # bisections; more than the 53 bits of a float


def confidence_sequence(
    k: float, n: int, confidence: float = 0.95, *, expected: float = 0.5
) -> tuple[float, float]:
    """Return an interval that contains the proportion at all times together with the given probability, after `k` of
    `n` observations were true.

    The interval is narrowest if the proportion is near `expected`, and valid for any. It is (0, 1) before the first
    observation. It is also valid for the mean of observations from 0 to 1 whose sum is `k`, because the likelihood
    ratio of an observation is convex in it. Observations that are drawn from a finite set without replacement only
    make it wider than necessary (Hoeffding, "Probability Inequalities for Sums of Bounded Random Variables", Journal
    of the American Statistical Association 58, 1963, theorem 4).

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


_GROWTH = 1.25  # of the number of draws from look to look; 1.1 saves 5 % of the draws and has twice the looks
_EARLY = 0.1  # share of the failure probability that the first look may spend; the rest grows as a cube
_LOST = 1e-3  # largest probability, for any true one, that a look ends a test that the last look would have proved
_FEWEST = 25  # draws before which no test gives up
_GRID = 40  # probabilities at which `_LOST` is checked
_ROUNDED_SUM = (
    1 - 1e-6
)  # share of the failure probability that is used; the rest exceeds all errors of rounding
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

    n, alpha = test.looks[look], _ROUNDED_SUM * test.failure_probability
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
    exponent = math.log(_ROUNDED_SUM * failure_probability) / math.log1p(-limit)
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
    return _ROUNDED_SUM * failure_probability * (_EARLY + (1 - _EARLY) * share**3)


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
