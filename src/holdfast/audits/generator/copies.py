"""Finds generated samples that are copies of training examples.

A sample counts as a copy if its distance to the nearest training example is smaller than that of 99 % of held-out
examples, as in the tests of memorisation of van den Burg and Williams, "On memorization in probabilistic deep
generative models", NeurIPS 2021, arXiv:2106.03216. Differs from the paper: the threshold is set on one half of the
held-out examples, and its rate is checked on the other half.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.core.estimate import Estimate
from holdfast.core.types import PerExample
from holdfast.statistics.intervals import proportion

PERCENTILE = 0.01
"""share of the held-out examples that are nearer to a training example than the threshold"""
_ROWS = 500  # samples whose distances to all training examples are in memory at once


@dataclass(frozen=True)
class Copies:
    """How many samples are copies of training examples."""

    rate: Estimate
    """share of the samples that are copies"""
    held_out: Estimate
    """share of the other half of the held-out examples that would count as copies, which should be 1 %"""
    threshold: float
    """distance below which a sample is a copy"""
    distance: PerExample
    """distance of each sample to its nearest training example (n)"""
    nearest: Tensor
    """row of the nearest training example of each sample (n)"""


def copies(samples: Tensor, training: Tensor, held_out: Tensor) -> Copies:
    """Compare samples (n, *features) with training examples (m, *features), by Euclidean distance. The threshold is set
    on every second held-out example, and checked on the others.
    """
    distance, nearest = nearest_example(samples, training)
    unseen, _ = nearest_example(held_out, training)
    threshold = float(torch.quantile(unseen[::2].double(), PERCENTILE))
    return Copies(
        _share(distance < threshold), _share(unseen[1::2] < threshold), threshold, distance, nearest
    )


def _share(mask: Tensor) -> Estimate:
    return proportion(mask)


def nearest_example(points: Tensor, training: Tensor) -> tuple[PerExample, Tensor]:
    """Return the Euclidean distance of each point to its nearest training example, and the row of that example."""
    flat, found = training.flatten(1), []
    for rows in torch.split(points.flatten(1), _ROWS):
        index = torch.cdist(rows, flat).argmin(1)
        # computed again, because the errors of matrix products are as large as the distance of a copy
        found.append((torch.linalg.vector_norm(rows - flat[index], dim=1), index))
    return torch.cat([d for d, _ in found]), torch.cat([i for _, i in found])
