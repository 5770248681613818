"""Measures of how well generated samples match a data set, computed from features of a network that was trained on data
of the same kind.

Fréchet distance: Heusel et al., "GANs trained by a two time-scale update rule converge to a local Nash equilibrium",
NeurIPS 2017, arXiv:1706.08500. KID: Binkowski et al., "Demystifying MMD GANs", ICLR 2018, arXiv:1801.01401. Precision
and recall: Kynkäänniemi et al., "Improved precision and recall metric for assessing generative models", NeurIPS 2019,
arXiv:1904.06991. Density and coverage: Naeem et al., "Reliable fidelity and diversity metrics for generative models",
ICML 2020, arXiv:2002.09797.

Differs from the papers: the features are those of any network, and not of Inception; KID uses all samples at once
instead of subsets.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.core.estimate import Estimate

NEIGHBOURS = 5
"""number of neighbours of precision, recall, density and coverage, as in Naeem et al."""
_GROUPS = (
    10  # of the jackknife; ten are enough for an interval, and each costs one computation of the measure
)
_ROWS = 1000  # rows of a matrix of distances that are in memory at once
_Z = 1.959964  # quantile of the normal distribution for an interval of 95 %


@dataclass(frozen=True)
class Quality:
    """Measures of one set of samples against a reference set, each with an interval of 95 %."""

    frechet: Estimate
    """Fréchet distance of two normal distributions with the means and covariances of the features; 0 is best"""
    kid: Estimate
    """squared maximum mean discrepancy with a cubic kernel, without bias, so that it may be negative; 0 is best"""
    precision: Estimate
    """share of the samples that are near a reference example"""
    recall: Estimate
    """share of the reference examples that are near a sample"""
    density: Estimate
    """mean number of neighbourhoods of reference examples in which a sample is, divided by the number of neighbours"""
    coverage: Estimate
    """share of the reference examples in whose neighbourhood a sample is"""


VALUES = 1 + _GROUPS
"""number of values of a measure: that of all samples, and those without each of ten groups of them"""
MEASURES = 6
"""number of fields of `Quality`"""


def quality(samples: Tensor, reference: Tensor) -> Quality:
    """Return all measures of the features of samples (n, d) against those of reference examples (m, d).

    The intervals are from a jackknife over ten groups of the samples; the reference is fixed.
    """
    return quality_of(measured_values(samples, reference), len(samples))


def measured_values(samples: Tensor, reference: Tensor) -> Tensor:
    """Return the values of all measures (`MEASURES`, `VALUES`), from which their intervals are computed."""
    measures: list[Callable[[Tensor], float]] = [
        _Frechet(samples, reference),
        _Kernel(samples, reference),
        *_Neighbours(samples, reference).measures().values(),
    ]
    return torch.tensor([_values(measure, len(samples)) for measure in measures], dtype=torch.float64)


def quality_of(values: Tensor, n: int) -> Quality:
    """Return all measures of `n` samples from their values."""
    frechet, kid, precision, recall, density, coverage = values.tolist()
    shares = (_jackknifed(each, n, 0.0, 1.0) for each in (precision, recall, coverage))
    return Quality(
        _jackknifed(frechet, n),
        _jackknifed(kid, n),
        next(shares),
        next(shares),
        _jackknifed(density, n, 0.0),
        next(shares),
    )


def frechet_distance(samples: Tensor, reference: Tensor) -> float:
    """Return the Fréchet distance between the normal distributions with the means and covariances of two sets of
    features (n, d) and (m, d).
    """
    return _Frechet(samples, reference)(torch.arange(len(samples)))


def kernel_distance(samples: Tensor, reference: Tensor) -> float:
    """Return the unbiased estimate of the squared maximum mean discrepancy between two sets of features (n, d) and
    (m, d), with the kernel (u · v / d + 1)³.
    """
    return _Kernel(samples, reference)(torch.arange(len(samples)))


class _Frechet:
    """The Fréchet distance of some rows of the samples to the reference."""

    def __init__(self, samples: Tensor, reference: Tensor) -> None:
        self.samples, fixed = samples.double(), reference.double()
        self.mean, covariance = fixed.mean(0), _covariance(fixed)
        self.trace = covariance.trace()
        values, vectors = torch.linalg.eigh(covariance)
        self.root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T

    def __call__(self, rows: Tensor) -> float:
        chosen = self.samples[rows]
        covariance = _covariance(chosen)
        # the trace of (A B)^(1/2) equals that of (B^(1/2) A B^(1/2))^(1/2), which is symmetric
        both = torch.linalg.eigvalsh(self.root @ covariance @ self.root).clamp_min(0).sqrt().sum()
        means = (chosen.mean(0) - self.mean).square().sum()
        return float(means + covariance.trace() + self.trace - 2 * both)


def _covariance(features: Tensor) -> Tensor:
    centred = features - features.mean(0)
    return centred.T @ centred / (len(features) - 1)


class _Kernel:
    """The kernel distance of some rows of the samples to the reference, from sums of the kernel that are computed
    once.
    """

    def __init__(self, samples: Tensor, reference: Tensor) -> None:
        a, b = samples.double(), reference.double()
        m = len(b)
        self.within = torch.cat([_kernel(rows, a) for rows in torch.split(a, _ROWS)])
        self.across = torch.cat([_kernel(rows, b).mean(1) for rows in torch.split(a, _ROWS)])
        diagonal = float(((b * b).sum(1) / b.shape[1] + 1).pow(3).sum())
        total = float(sum(_kernel(rows, b).sum() for rows in torch.split(b, _ROWS)))
        self.reference = (total - diagonal) / (m * (m - 1))

    def __call__(self, rows: Tensor) -> float:
        n, block = len(rows), self.within[rows][:, rows]
        within = (block.sum() - block.diagonal().sum()) / (n * (n - 1))
        return float(within + self.reference - 2 * self.across[rows].mean())


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    values: Tensor = (a @ b.T / a.shape[1] + 1) ** 3
    return values


class _Neighbours:
    """Which samples are in the neighbourhood of which reference examples, and the reverse. The neighbourhood of a point
    reaches to its fifth nearest neighbour of the same set.
    """

    def __init__(self, samples: Tensor, reference: Tensor) -> None:
        self.n = len(samples)
        radius, sample_radius = _radius(reference), _radius(samples)
        inside, near_sample = [], []
        for rows in torch.split(torch.arange(len(samples)), _ROWS):
            distance = torch.cdist(samples[rows], reference)
            inside.append(distance <= radius)
            near_sample.append(distance <= sample_radius[rows, None])
        self.inside, self.near_sample = torch.cat(inside), torch.cat(near_sample)

    def measures(self) -> dict[str, Callable[[Tensor], float]]:
        """Functions of the rows of samples by the name of the measure, in the order of `Quality`."""
        return {
            "precision": lambda rows: _share(self.inside[rows].any(1)),
            "recall": lambda rows: _share(self.near_sample[rows].any(0)),
            "density": lambda rows: float(self.inside[rows].sum(1).double().mean() / NEIGHBOURS),
            "coverage": lambda rows: _share(self.inside[rows].any(0)),
        }


def _share(mask: Tensor) -> float:
    return float(mask.double().mean())


def _radius(points: Tensor) -> Tensor:
    """The distance of each point to its fifth nearest neighbour; the nearest is the point itself."""
    k = min(NEIGHBOURS + 1, len(points))
    parts = [torch.cdist(rows, points).kthvalue(k, dim=1).values for rows in torch.split(points, _ROWS)]
    return torch.cat(parts)


def jackknife(
    measure: Callable[[Tensor], float], n: int, least: float = -math.inf, most: float = math.inf
) -> Estimate:
    """Return the measure, a function of rows, on all `n` rows, with an interval of 95 % inside [least, most] from its
    values without each of ten groups of rows.
    """
    return _jackknifed(_values(measure, n), n, least, most)


def _values(measure: Callable[[Tensor], float], n: int) -> list[float]:
    everything = torch.arange(n)
    without = [measure(everything[everything % _GROUPS != group]) for group in range(_GROUPS)]
    return [measure(everything), *without]


def _jackknifed(
    values: Sequence[float], n: int, least: float = -math.inf, most: float = math.inf
) -> Estimate:
    value, *without = values
    mean = sum(without) / _GROUPS
    variance = (_GROUPS - 1) / _GROUPS * sum((each - mean) ** 2 for each in without)
    half = _Z * math.sqrt(variance)
    return Estimate(value, max(value - half, least), min(value + half, most), n)


def label_entropy(counts: Tensor) -> float:
    """Return the entropy of predicted classes, from the number of examples of each, divided by the logarithm of the
    number of classes: 1 if all are equally frequent, and 0 if there is only one.
    """
    shares, classes = counts.double() / int(counts.sum()), len(counts)
    return abs(float(torch.xlogy(shares, shares).sum())) / math.log(classes) if classes > 1 else 0.0
