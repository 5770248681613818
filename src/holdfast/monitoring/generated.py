"""Tests of a stream of generated samples: copies of examples of the reference, and repeats within the stream.

A sample is a copy if it is at most as far from an example of the reference as 1 % of these examples are from their
nearest other one, as in `holdfast audit generator`. It repeats another sample by the same distance. An alarm is raised
if the share of such samples is above that of the reference, by a confidence interval that is valid at all times.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.core.draws import Draws
from holdfast.core.types import Inputs, Mask, PerExample
from holdfast.monitoring.watching import ALPHA, WINDOW, Alarm, DriftResult, State
from holdfast.reports.numbers import percent
from holdfast.statistics.anytime import confidence_sequence
from holdfast.statistics.intervals import proportion
from holdfast.statistics.repeats import copy_threshold, nearest_example

_COMPARED = 1000
"""examples of the reference whose nearest other example is searched for"""
_AT_ALL_TIMES = (
    "In samples that are independent and distributed like the reference, a false alarm has a probability of about 5 %, "
    "however long the stream is."
)


@dataclass(frozen=True)
class Threshold:
    """The distance of copies, and how frequent they are in the reference."""

    distance: float
    rate: float
    """upper end of the interval of the share of examples that are as near to another one"""

    @classmethod
    def of(cls, x: Inputs, rng: Draws) -> "Threshold":
        """Return the threshold of the examples of a reference (n, *features), at least two. It is set on every second
        one of at most 1,000 of them, and its rate is measured on the others.
        """
        rows = rng.bits(torch.arange(len(x))).argsort()[:_COMPARED]
        nearest = _nearest_other(x, rows)
        distance = copy_threshold(nearest)
        return cls(distance, proportion(nearest[1::2] <= distance).high)


def _nearest_other(x: Inputs, rows: Tensor) -> PerExample:
    """Distance of some examples (n) to their nearest other example."""
    flat, found = x.flatten(1), []
    for some in torch.split(rows, 500):
        distances = torch.cdist(flat[some], flat)
        distances[torch.arange(len(some)), some] = torch.inf
        # computed again, because the errors of matrix products are as large as the distance of a copy
        found.append(torch.linalg.vector_norm(flat[some] - flat[distances.argmin(1)], dim=1))
    return torch.cat(found)


@dataclass
class Counted:
    """State of a test that counts samples of a kind."""

    name: ClassVar[str]
    compares: ClassVar[str] = "series"
    guarantee: ClassVar[str] = _AT_ALL_TIMES
    reads: ClassVar[str]
    fewest: ClassVar[int] = 1

    rate: float
    """share that is expected at most"""
    n: int = 0
    k: int = 0
    alarm: Alarm | None = None

    def update(self, found: Mask) -> None:
        """Count further samples (n) of the stream."""
        for is_one in found.tolist():
            self.n, self.k = self.n + 1, self.k + is_one
            if not is_one or self.alarm is not None:
                continue
            low, _ = confidence_sequence(self.k, self.n, 1 - ALPHA, expected=self.rate)
            if low > self.rate:
                evidence = f"{self.k} of {self.n}, at most {percent(self.rate)} expected"
                self.alarm = Alarm(self.n, self.name, self.name, evidence)

    def result(self) -> DriftResult:
        """Return what the test has found so far."""
        state: State = "too few samples" if not self.n else "alarm" if self.alarm else "no alarm"
        return DriftResult(self.name, type(self), state, self.alarm, None)


class Copies(Counted):
    """Counts samples that are copies of examples of the reference."""

    name = "copies"
    reads = "the distance of each sample to the nearest example of the reference"


class Repeats(Counted):
    """Counts samples that repeat an earlier one, as those of a generator that has collapsed do."""

    name = "repeats"
    reads = "the distance of each sample to the nearest of the 250 samples before it"


class SampleTests:
    """Both tests on one stream."""

    def __init__(self, reference: Inputs, rng: Draws) -> None:
        self._reference = reference
        self._threshold = Threshold.of(reference, rng)
        self._before = reference.flatten(1)[:0]
        # no more than the reference has, for whose examples the rate is known
        self._window = min(WINDOW, len(reference) - 1)
        self.copies, self.repeats = Copies(self._threshold.rate), Repeats(self._threshold.rate)

    def update(self, x: Inputs) -> None:
        """Add further samples of the stream (n, *features)."""
        distance, _ = nearest_example(x, self._reference)
        self.copies.update(distance <= self._threshold.distance)
        for sample in x.flatten(1):
            before = self._before
            near = len(before) > 0 and bool(
                torch.linalg.vector_norm(before - sample, dim=1).min() <= self._threshold.distance
            )
            self.repeats.update(torch.tensor([near]))
            self._before = torch.cat((before, sample[None]))[-self._window :]

    def results(self) -> tuple[DriftResult, ...]:
        """Return what both tests have found so far."""
        return self.copies.result(), self.repeats.result()
