"""True-positive rates at a low false-positive rate, with their intervals, and the area under the curve.

An example counts as found if its score is larger than the threshold, so that ties count against the attacker.
"""

import math
from collections.abc import Sequence

import torch

from holdfast.core.errors import UsageError
from holdfast.core.estimate import Estimate
from holdfast.core.remedies import Remedy
from holdfast.core.types import Mask, PerExample
from holdfast.statistics.intervals import CONFIDENCE, bonferroni, clopper_pearson, upper_tail

EXPECTED = 10
"""Number of false positives that a rate must expect. With fewer, the threshold depends on a few examples."""


def needed(fpr: float) -> int:
    """Return the number of non-members that a false-positive rate needs."""
    return math.ceil(EXPECTED / fpr - 1e-9)


def refuse_few(fpr: float, non_members: int) -> None:
    """Raise `UsageError` if a false-positive rate expects fewer than ten false positives among the non-members."""
    if non_members >= needed(fpr):
        return
    message = (
        f"fpr is {fpr:g}, which expects {fpr * non_members:.3g} false positives among {non_members:,} non-members; "
        f"at least {EXPECTED} are needed, so {needed(fpr):,} non-members"
    )
    possible = next(
        (rate for rate in (0.01, 0.02, 0.05, 0.1) if rate > fpr and needed(rate) <= non_members), None
    )
    if possible is None:
        raise UsageError(message)
    raise UsageError(message, Remedy("fpr", possible, reason="with these data"))


def threshold(score: PerExample, member: Mask, fpr: float) -> float:
    """Return the threshold that at most the share `fpr` of the non-members exceed."""
    return _ranked(score[~member], math.floor(fpr * int((~member).sum()) + 1e-9))


def found(score: PerExample, member: Mask, fpr: float) -> Mask:
    """Return which examples have a score above the threshold."""
    return score > threshold(score, member, fpr)


def tpr(score: PerExample, member: Mask, fpr: float) -> float:
    """Return the share of the members that are found."""
    return float(found(score, member, fpr)[member].double().mean())


def auc(score: PerExample, member: Mask) -> float:
    """Return the area under the curve: the probability that a member has a larger score than a non-member, where a tie
    counts half.
    """
    _, places, counts = torch.unique(score, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0).double() - (counts - 1) / 2)[places]
    m, n = int(member.sum()), int((~member).sum())
    return float(ranks[member].sum() - m * (m + 1) / 2) / (m * n)


def tpr_of_one(score: PerExample, member: Mask, fpr: float, confidence: float = CONFIDENCE) -> Estimate:
    """Return the true-positive rate of one network with an interval that covers the choice of the members and of the
    non-members.

    Its ends are one-sided Clopper-Pearson bounds at two thresholds, of which one has a false-positive rate of at most
    `fpr` with high confidence, the other one of at least `fpr`. Each of the four bounds has a quarter of the error.
    """
    tail = (1 - confidence) / 4
    non_members, members = score[~member], score[member]
    n, m = len(non_members), len(members)
    rank = math.floor(fpr * n)
    lower = next((k for k in range(rank, -1, -1) if 1 - upper_tail(k + 1, n, fpr) <= tail), None)
    upper = next((k for k in range(rank, n) if upper_tail(k + 1, n, fpr) <= tail), n)
    confidence = bonferroni(confidence, 2)
    low = 0.0
    if lower is not None:
        low = clopper_pearson(int((members > _ranked(non_members, lower)).sum()), m, confidence)[0]
    high = clopper_pearson(int((members > _ranked(non_members, upper)).sum()), m, confidence)[1]
    value = tpr(score, member, fpr)
    return Estimate(value, min(low, value), max(high, value), m)


def mean_of_networks(values: Sequence[float]) -> Estimate:
    """Return the mean of a rate over networks, with a Student-t interval, in which networks are the sample."""
    from scipy.special import stdtrit

    each = torch.tensor(values, dtype=torch.float64)
    n, mean = len(each), float(each.mean())
    if n == 1:
        return Estimate(mean, 0.0, 1.0, 1)
    half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * float(each.std()) / math.sqrt(n)
    return Estimate(mean, max(0.0, mean - half), min(1.0, mean + half), n)


def _ranked(values: PerExample, rank: int) -> float:
    """The value that `rank` others exceed or equal; -inf if there are not so many."""
    if rank >= len(values):
        return -math.inf
    return float(values.sort(descending=True).values[rank])
