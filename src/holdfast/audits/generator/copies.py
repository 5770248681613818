"""Finds generated samples that are copies of training examples, and those that are nearly copies.

A copy equals a training example byte for byte. A near copy is no copy, and its distance to the nearest training example
is smaller than that of 99 % of held-out examples, as in the tests of memorisation of van den Burg and Williams, "On
memorization in probabilistic deep generative models", NeurIPS 2021, arXiv:2106.03216. Differs from the paper: the
threshold is set on one half of the held-out examples, and its rate is checked on the other half.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Columns
from holdfast.core.types import Mask, PerExample
from holdfast.runs.store.column_forms import Form, flag, whole
from holdfast.statistics.intervals import proportion
from holdfast.statistics.nearest import copy_threshold, nearest_example
from holdfast.statistics.repeats import LEVEL, equal_rows, excess, expected_repeats

FORMS = {
    "distance": Form(rows=(1, 2**40), low=0),
    "nearest": whole("n"),
    "copy": flag("n"),
    "unseen": Form(("held_out",), rows=(2, 2**24), low=0),
    "unseen.copy": flag("held_out"),
    "repeats": Form((1,), low=0),
}
"""Forms of the columns of `measured_copies`."""


@dataclass(frozen=True)
class Copies:
    """How many samples are copies of training examples, or nearly."""

    distance: PerExample
    """distance of each sample to its nearest training example (n)"""
    nearest: Tensor
    """row of the nearest training example of each sample, or of the first one that it equals (n)"""
    is_copy: Mask
    """which samples equal a training example (n)"""
    unseen: PerExample
    """distance of each held-out example to its nearest training example (m)"""
    is_repeat: Mask
    """which held-out examples equal a training example (m)"""
    expected: float
    """number of samples that are expected to equal a training example by chance, or an upper bound"""

    @property
    def rate(self) -> Estimate:
        """Share of the samples that are copies."""
        return proportion(self.is_copy)

    @property
    def held_out(self) -> Estimate:
        """Share of the held-out examples that equal a training example."""
        return proportion(self.is_repeat)

    @property
    def threshold(self) -> float:
        """Distance below which a sample that is no copy is a near copy."""
        return copy_threshold(self.unseen)

    @property
    def near(self) -> Estimate:
        """Share of the samples that are near copies."""
        return proportion((self.distance < self.threshold) & ~self.is_copy)

    @property
    def near_held_out(self) -> Estimate:
        """Share of the other half of the held-out examples that would be near copies; about 1 %."""
        return proportion(((self.unseen < self.threshold) & ~self.is_repeat)[1::2])

    @property
    def repeating(self) -> bool:
        """Whether rows repeat by nature: a held-out example equals a training example, or samples are expected to."""
        return bool(self.is_repeat.any()) or self.expected > LEVEL

    @property
    def p(self) -> float:
        """p-value that no larger share of samples than of held-out examples equals a training example."""
        k, other = int(self.is_copy.sum()), int(self.is_repeat.sum())
        return excess(k, len(self.is_copy), other, len(self.is_repeat))

    @property
    def copied(self) -> bool:
        """Whether samples are copies that do not repeat a training example by nature."""
        return bool(self.is_copy.any()) and (not self.repeating or self.p <= LEVEL)

    @property
    def nearly_copied(self) -> bool:
        """Whether more samples than held-out examples are near copies."""
        return self.near.low > self.near_held_out.high


def copies(samples: Tensor, training: Tensor, held_out: Tensor) -> Copies:
    """Compare samples (n, *features) with training examples (m, *features), by their bytes and by Euclidean distance.
    The threshold is set on every second held-out example, and checked on the others.
    """
    return copies_of(measured_copies((samples, training, held_out)))


def measured_copies(
    sets: tuple[Tensor, Tensor, Tensor], rows: tuple[Tensor, Tensor, Tensor] | None = None
) -> Columns:
    """Return the columns from which the copies are computed, of samples, training examples and held-out examples.

    `rows` are the same examples with the values that are compared byte for byte; those of a table are not scaled.
    """
    samples, training, held_out = (each.cpu() for each in sets)
    distance, nearest = nearest_example(samples, training)
    own, known, unseen = rows or _of_one_precision(samples, training, held_out)
    equal, repeat = equal_rows(own, known), equal_rows(unseen, known) >= 0
    is_copy = equal >= 0
    # the search through all pairs of rows takes seconds, and decides only about copies
    expected = expected_repeats(len(own), known, unseen) if bool(is_copy.any()) else 0.0
    return {
        "distance": torch.where(is_copy, 0.0, distance),
        "nearest": torch.where(is_copy, equal, nearest),
        "copy": is_copy,
        "unseen": nearest_example(held_out, training)[0],
        "unseen.copy": repeat,
        "repeats": torch.tensor([expected], dtype=torch.float64),
    }


def copies_of(columns: Columns) -> Copies:
    """Return the copies from the columns of `measured_copies`."""
    return Copies(
        columns["distance"],
        columns["nearest"],
        columns["copy"].bool(),
        columns["unseen"],
        columns["unseen.copy"].bool(),
        float(columns["repeats"]),
    )


def _of_one_precision(samples: Tensor, training: Tensor, held_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The examples as float32 if the samples have no more digits, because a generator may compute with float32."""
    kind = torch.float32 if torch.equal(samples.float().to(samples.dtype), samples) else samples.dtype
    return samples.to(kind), training.to(kind), held_out.to(kind)
