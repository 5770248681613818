"""Comparison of the ranges of values of two sets of examples, by which other units are recognised."""

from dataclasses import dataclass

import torch

from holdfast.core.errors import UsageError
from holdfast.core.types import Inputs

_LEAST_WIDTH, _MOST_SHIFT = 0.55, 1 / 3
"""width of a range, and shift of its middle, relative to the wider one, beyond which the units are probably others"""
_USUAL = ((0.0, 1.0), (-1.0, 1.0), (-0.5, 0.5), (0.0, 255.0))
_NEAR = 0.05  # distance of the ends from those of a usual range, relative to its width
_ENDS = (0.01, 0.99)  # quantiles of the values of rows, in which single values may be far away
_VALUES = 1_000_000  # of which quantiles are computed


@dataclass(frozen=True)
class Ranges:
    """The ranges of the values of two sets of examples."""

    own: tuple[float, float]
    first: tuple[float, float]
    """range of the examples with which the others are compared"""

    @classmethod
    def of(cls, x: Inputs, first: Inputs) -> "Ranges":
        """Return the ranges of inputs (n, *features): those of all values, and for rows those of 98 % of them."""
        return cls(_range(x), _range(first))

    @property
    def differ(self) -> bool:
        """Whether one range is twice as wide as the other, or shifted by a third of it. A single value inside the range
        of the first examples is none: the inputs are constant.
        """
        (low, high), (first_low, first_high) = self.own, self.first
        width, first_width = high - low, first_high - first_low
        largest, shift = max(width, first_width), abs(low + high - first_low - first_high) / 2
        if width == 0 and first_low <= low <= first_high:
            return False
        return min(width, first_width) <= _LEAST_WIDTH * largest or shift >= _MOST_SHIFT * largest

    @property
    def may_be_poor(self) -> bool:
        """Whether the range lies inside that of the first examples and is not a usual one, so that a generator may be
        poor instead of having other units.
        """
        low, high = self.own
        is_usual = any(
            max(abs(low - usual), abs(high - other)) <= _NEAR * (other - usual) for usual, other in _USUAL
        )
        return self.first[0] <= low and high <= self.first[1] and not is_usual

    def sentence(self, subject: str, first: str) -> str:
        """Return a sentence with both ranges, whose subjects include the verb."""
        (low, high), (first_low, first_high) = self.own, self.first
        return (
            f"{subject} values from {low:.4g} to {high:.4g}, and {first} values from {first_low:.4g} to "
            f"{first_high:.4g}"
        )

    def refuse(self, subject: str, first: str) -> None:
        """Raise `UsageError` if the ranges differ."""
        if self.differ:
            raise UsageError(f"{self.sentence(subject, first)}; write both in the same range")


def _range(x: Inputs) -> tuple[float, float]:
    values = x.nan_to_num().flatten()
    if x.dim() > 2:
        return float(values.min()), float(values.max())
    some = values[:: -(-len(values) // _VALUES)].double()
    low, high = torch.quantile(some, some.new_tensor(_ENDS)).tolist()
    return low, high
