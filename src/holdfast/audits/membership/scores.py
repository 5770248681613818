"""Scores of membership from the signals of networks, and their true-positive rates at a low false-positive rate."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from holdfast.core.errors import UsageError
from holdfast.core.estimate import Estimate
from holdfast.core.remedies import Remedy
from holdfast.core.types import Labels, Mask, PerExample
from holdfast.statistics.intervals import CONFIDENCE, bonferroni, clopper_pearson, upper_tail

LARGEST = 60.0
"""Largest absolute signal. Probabilities that are stored as floats may be exactly 0 or 1, whose logits are infinite."""


def scaled_logit(logits: Tensor, y: Labels) -> Tensor:
    """Return the logit of the probability of the label, `z_y - logsumexp(z_other)`, in float64.

    The logits have the shape (…, n, classes).
    """
    z = logits.double()
    labels = y.expand(z.shape[:-1])[..., None]
    own = z.gather(-1, labels)[..., 0]
    rest = z.scatter(-1, labels, -torch.inf).logsumexp(-1)
    return torch.nan_to_num(own - rest, nan=0.0, posinf=LARGEST, neginf=-LARGEST).clamp(-LARGEST, LARGEST)


PER_RECORD = 62
"""Number of reference networks from which LiRA estimates a variance for each example: those of 64 networks in
complementary pairs. With fewer networks, one variance of all examples is less noisy (the rule of LeakPro)."""
_LEAST_SD = 1e-6


def loss(target: PerExample) -> PerExample:
    """Return the log probability of the label, the attack of Yeom et al., "Privacy Risk in Machine Learning", CSF 2018,
    arXiv:1709.01604. Its order is that of the signal itself.
    """
    return logsigmoid(target)


def labels_only(right: PerExample, references: Tensor | None, inside: Tensor | None) -> PerExample:
    """Return whether the label is predicted (n), minus the share of the reference networks that predict it without
    having been trained on the example, if there are any.
    """
    if references is None or inside is None:
        return right.double()
    return right.double() - _mean(references.double(), ~inside)


def lira_online(target: PerExample, references: Tensor, inside: Tensor) -> PerExample:
    """Return the log ratio of the densities of two normal distributions, fitted to the networks that were trained on
    the example and to those that were not.

    Carlini et al., "Membership Inference Attacks From First Principles", S&P 2022, arXiv:2112.03570.
    """
    per_record = len(references) >= PER_RECORD
    densities = []
    for mask in (inside, ~inside):
        mean = _mean(references, mask)
        sd = _deviation(references, mask, mean, per_record=per_record)
        densities.append(-0.5 * ((target - mean) / sd) ** 2 - sd.log())
    return densities[0] - densities[1]


def lira_offline(target: PerExample, references: Tensor, inside: Tensor) -> PerExample:
    """Return how far the signal exceeds that of networks that were not trained on the example, in their standard
    deviations. The order is that of the probability in the paper of LiRA.
    """
    mean = _mean(references, ~inside)
    sd = _deviation(references, ~inside, mean, per_record=len(references) >= PER_RECORD)
    return (target - mean) / sd


def rmia(
    target: PerExample, references: Tensor, inside: Tensor, *, a: float = 0.3, converted: bool = True
) -> PerExample:
    """Return the log ratio of the probability of the label to its mean over networks with and without the example,
    which is estimated from networks without it: `((1 + a) mean_out + 1 - a) / 2`.

    Zarifzadeh et al., "Low-Cost High-Power Membership Inference Attacks", ICML 2024, arXiv:2312.03262. Its score, the
    share of a population with a smaller ratio (gamma = 1), increases with this ratio, because all examples are compared
    with the same population, so that this is its order without ties. If `converted`, networks that were trained on an
    example are used as well, by `out = (in + a - 1) / a`, as in the authors' code.
    """
    p = references.sigmoid()
    estimates = torch.where(inside, ((p + a - 1) / a).clamp(0, 1), p)
    out = estimates.mean(0) if converted else _mean(p, ~inside)
    return logsigmoid(target) - (((1 + a) * out + 1 - a) / 2).log()


@dataclass(frozen=True)
class Prior:
    """Normal-inverse-gamma prior of the mean and the variance of the signals of an example.

    The defaults were chosen among kappa 1, 2, 4 and alpha 2, 4, 8 on other networks than those of the benchmarks:
    networks of Location-30 with another seed, and networks of Fashion-MNIST. Kappa 2 was better on the first from four
    references on, and worse on the second with two.
    """

    kappa: float = 1.0
    """number of networks that the prior mean counts for"""
    alpha: float = 4.0
    """shape of the inverse-gamma prior of the variance"""


def bavaria(target: PerExample, references: Tensor, inside: Tensor, prior: Prior = Prior()) -> PerExample:
    """Return the log ratio of two Student-t densities: the predictive distributions of the signal of a network that was
    trained on the example, and of one that was not, after the signals of the reference networks.

    Brännvall, "Exponential-Family Membership Inference: From LiRA and RMIA to BaVarIA", 2026, arXiv:2603.11799.
    Differs from the paper: the prior of the signals with an example is centred on their mean over examples that have
    similar signals without it, and the reverse. Its variance is the mean square of the deviations from this centre
    over examples with similar centres.
    """
    densities = []
    for mask in (inside, ~inside):
        n = mask.sum(0).double()
        mean = _mean(references, mask)
        centre = _among_similar(_mean(references, ~mask), mean)
        spread = torch.where(mask, (references - centre) ** 2, 0.0).sum(0) / n.clamp_min(1)
        variance = _among_similar(centre, spread) * prior.kappa / (1 + prior.kappa)
        kappa, alpha = prior.kappa + n, prior.alpha + n / 2
        squares = torch.where(mask, (references - mean) ** 2, 0.0).sum(0)
        beta = (prior.alpha - 1) * variance + squares / 2
        beta = beta + prior.kappa * n * torch.where(n > 0, mean - centre, 0.0) ** 2 / (2 * kappa)
        scale = (beta * (kappa + 1) / (alpha * kappa)).sqrt().clamp_min(_LEAST_SD)
        location = torch.where(n > 0, (prior.kappa * centre + n * mean) / kappa, centre)
        densities.append(_student(target, 2 * alpha, location, scale))
    return densities[0] - densities[1]


def tail_estimate(members: PerExample, non_members: PerExample, fpr: float) -> float:
    """Return an estimate of the true-positive rate of attacks with reference networks at a false-positive rate, from
    the signals of one network: the share of non-members whose signal is lower than that of all members but `fpr`.

    "The Tail Tells All", 2025, arXiv:2510.19773.
    """
    return float((non_members < members.quantile(fpr)).double().mean())


_SIMILAR = 16
"""An example is similar to the 1/16 of all examples around it in an order, and at least to 50."""


def _among_similar(order: PerExample, values: PerExample) -> PerExample:
    """Running mean of values over the examples that are next to each other in the order of other values."""
    n = len(values)
    half = max(n // _SIMILAR, 50) // 2
    places = order.argsort(stable=True)
    sums = torch.cat((values.new_zeros(1), values[places].cumsum(0)))
    at = torch.arange(n)
    low, high = (at - half).clamp_min(0), (at + half + 1).clamp_max(n)
    result = torch.empty_like(values)
    result[places] = (sums[high] - sums[low]) / (high - low)
    return result


def _student(x: Tensor, freedom: Tensor, location: Tensor, scale: Tensor) -> Tensor:
    """Log density of a Student-t distribution."""
    z = (x - location) / scale
    normaliser = torch.lgamma((freedom + 1) / 2) - torch.lgamma(freedom / 2) - 0.5 * (freedom * math.pi).log()
    return normaliser - scale.log() - (freedom + 1) / 2 * torch.log1p(z * z / freedom)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the networks in a mask for each example; the mean of all values in the mask where there is none."""
    counts = mask.sum(0)
    overall = values[mask].mean() if mask.any() else values.mean()
    return torch.where(counts > 0, torch.where(mask, values, 0.0).sum(0) / counts.clamp_min(1), overall)


def _deviation(values: Tensor, mask: Tensor, mean: Tensor, *, per_record: bool) -> Tensor:
    if not per_record:
        return values[mask].std(correction=0).clamp_min(_LEAST_SD)
    squares = torch.where(mask, (values - mean) ** 2, 0.0).sum(0)
    return (squares / mask.sum(0).clamp_min(1)).sqrt().clamp_min(_LEAST_SD)


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
