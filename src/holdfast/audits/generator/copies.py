"""Finds generated samples that are copies of training examples.

A sample counts as a copy if its distance to the nearest training example is smaller than that of 99 % of held-out
examples, as in the tests of memorisation of van den Burg and Williams, "On memorization in probabilistic deep
generative models", NeurIPS 2021, arXiv:2106.03216. Differs from the paper: the threshold is set on one half of the
held-out examples, and its rate is checked on the other half.
"""

from dataclasses import dataclass

from torch import Tensor

from holdfast.core.estimate import Estimate
from holdfast.core.types import PerExample
from holdfast.statistics.intervals import proportion
from holdfast.statistics.nearest import copy_threshold, nearest_example


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
    return copies_of(*nearest_example(samples, training), nearest_example(held_out, training)[0])


def copies_of(distance: PerExample, nearest: Tensor, unseen: PerExample) -> Copies:
    """Return the copies by the distances of samples and of held-out examples to their nearest training examples."""
    threshold = copy_threshold(unseen)
    return Copies(
        proportion(distance < threshold), proportion(unseen[1::2] < threshold), threshold, distance, nearest
    )
