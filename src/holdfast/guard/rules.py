"""Rules of the guard that need only the inputs: the schema, the range of values, and the defence of inputs."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from math import isfinite

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.core.errors import UsageError
from holdfast.core.normalisation import per_channel
from holdfast.core.types import Inputs
from holdfast.guard.decisions import Action, Mode, Score


def with_bits(x: Inputs, bits: int, low: float = 0.0, high: float = 1.0) -> Inputs:
    """Return the inputs rounded to `2**bits` equidistant values from `low` to `high`. The gradient is that of the
    identity.
    """
    steps = (2**bits - 1) / (high - low)
    rounded = ((x - low) * steps).round() / steps + low
    # The difference is detached, so that the gradient is one. `x + (rounded - x)` would change the last bit.
    straight: Inputs = x + (rounded - x).detach() if x.requires_grad else rounded
    return straight


def median_filtered(x: Inputs, size: int) -> Inputs:
    """Return images (n, channels, height, width) in which each value is the median of a window of `size` x `size`
    pixels around it. Images are mirrored at their borders; for an even `size` the lower median of the window is used,
    which extends further up and left.
    """
    before, after = size // 2, (size - 1) // 2
    padded = F.pad(x, (before, after, before, after), mode="reflect")
    windows = padded.unfold(2, size, 1).unfold(3, size, 1)
    medians: Inputs = windows.flatten(4).median(dim=4).values
    return medians


SCHEMA, RANGE, QUERIES = "schema", "range", "queries"
"""names of the rules that are evaluated before the model"""


class Basis(StrEnum):
    """Where the threshold of a rule comes from, or the radius of the query detector, which decides when it fires."""

    GIVEN = "given"
    """written in the settings"""
    FITTED = "fitted"
    """fitted to benign inputs by a calibration"""
    UNFITTED = "unfitted"
    """neither, so that the rule only reports"""


@dataclass(frozen=True)
class Rule:
    """What is done with the score of one rule: the threshold above which it fires, its mode and its action."""

    name: str
    mode: Mode = Mode.OBSERVE
    action: Action = Action.FLAG
    threshold: float = torch.inf
    """score above which the rule fires; infinite for a rule that is not calibrated, which never fires"""
    fixed: bool = False
    """whether calibration does not change the threshold, because it was given or is that of the query detector"""
    basis: Basis = Basis.GIVEN
    """where the threshold, or the radius of the query detector, comes from"""

    def score(self, value: float) -> Score:
        """Return the score of one input."""
        return Score(self.name, value, value > self.threshold, self.mode, self.action)


@dataclass(frozen=True)
class InputSchema:
    """Shape, data type and range of the inputs that the model accepts."""

    shape: tuple[int | None, ...]
    """sizes of one input without the batch; None where any size is accepted"""
    dtype: torch.dtype = torch.float32
    low: tuple[float, ...] = (0.0,)
    """lowest valid value: one number, or one for each channel"""
    high: tuple[float, ...] = (1.0,)
    """highest valid value: one number, or one for each channel"""

    def fault(self, x: Tensor) -> str:
        """Return what is wrong with the shape or the data type of the inputs of a request, or an empty text."""
        if x.shape[1:] == self.shape and x.dtype == self.dtype and x.shape[0]:
            return ""  # of nearly all requests
        sizes = tuple(x.shape)
        if len(sizes) != len(self.shape) + 1 or any(
            expected not in (None, size) for expected, size in zip(self.shape, sizes[1:], strict=True)
        ):
            expected = ", ".join("any" if size is None else str(size) for size in ("n", *self.shape))
            return f"the inputs have the shape {sizes}; expected ({expected})"
        if x.dtype != self.dtype:
            given, wanted = (str(kind).removeprefix("torch.") for kind in (x.dtype, self.dtype))
            return f"the inputs are {given}; expected {wanted}"
        return "" if len(x) else "the request contains no inputs"

    @cached_property
    def range_text(self) -> str:
        """The range as a message shows it."""
        return f"from {_numbers(self.low)} to {_numbers(self.high)}"

    def excess(self, x: Tensor) -> Tensor:
        """Return for each input how far its values are outside the range: 0 inside, infinite for NaN and infinity."""
        x = x if x.is_floating_point() else x.double()  # differences of unsigned integers would wrap around
        if len(self.low) == len(self.high) == 1:
            smallest, largest = torch.aminmax(x.flatten(1), dim=1)  # NaN is propagated
            outside = torch.maximum(self.low[0] - smallest, largest - self.high[0])
        else:
            low, high = (per_channel(x.new_tensor(ends), x) for ends in (self.low, self.high))
            outside = torch.maximum(low - x, x - high).flatten(1).amax(1)
        return outside.clamp_min(0).nan_to_num(nan=torch.inf, posinf=torch.inf)


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def all_finite(x: Tensor) -> bool:
    """Return whether a tensor contains neither NaN nor infinity."""
    # a sum takes a third of the time; it is not finite either if it overflows
    return isfinite(x.sum().item()) or bool(x.isfinite().all())


@dataclass(frozen=True)
class InputDefence:
    """Squeezes of the inputs before the model: fewer bits for each value, then a median filter.

    Xu, Evans & Qi, "Feature squeezing", NDSS 2018, arXiv:1704.01155, of which only the squeezes are used here.
    """

    bits: int = 0
    """number of bits of each value; 0 leaves values unchanged"""
    median: int = 0
    """side of the window of the median filter in pixels; 0 leaves images unchanged"""
    low: float = 0.0
    high: float = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        """Return the squeezed inputs (n, *shape)."""
        if self.bits:
            x = with_bits(x, self.bits, self.low, self.high)
        if self.median:
            if x.dim() != 4:
                raise UsageError(
                    f"the median filter needs images (n, channels, height, width), and the inputs have the shape "
                    f"{tuple(x.shape)}; set defence: median to 0"
                )
            x = median_filtered(x, self.median)
        return x
