"""Nonlinear operations of a traced network, and linear functions that bound them.

An activation f acts on each value. For a value in [low, high], any slope s gives two bounds: s x + min(f(x) - s x) and
s x + max(f(x) - s x), with the extrema over [low, high]. The classes differ only in how the extrema are computed. The
slopes are chosen so that the area between bound and function is smallest among some candidates, as in CROWN (Zhang et
al., "Efficient Neural Network Robustness Certification with General Activation Functions", NeurIPS 2018,
arXiv:1811.00866), which chooses tangents by hand for each function.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.certifiers.bounds.linear import Interval

_NARROW = 1e-6
"""width of an interval, relative to its values, below which slopes of secants are not computed"""


class Lines(NamedTuple):
    """Linear bounds of an activation: lower_slope * x + lower_offset <= f(x) <= upper_slope * x + upper_offset.

    All have the shape (n, *shape) of the values.
    """

    lower_slope: Tensor
    lower_offset: Tensor
    upper_slope: Tensor
    upper_offset: Tensor


class Activation(ABC):
    """Base class of functions that act on each value of a tensor."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """Return the values of the function."""

    @abstractmethod
    def interval(self, x: Interval) -> Interval:
        """Return bounds of the values of the function for all inputs within the given bounds."""

    @abstractmethod
    def offsets(self, slope: Tensor, x: Interval) -> Interval:
        """Return the smallest and the largest value of f(x) - slope * x over the intervals, or bounds of them."""

    @abstractmethod
    def candidates(self, x: Interval) -> tuple[Tensor, ...]:
        """Return slopes among which those of the linear bounds are chosen."""

    def lines(self, x: Interval) -> Lines:
        """Return linear bounds of the function over the intervals, those with the smallest area among the candidates.

        The offsets are enlarged by the rounding errors of their computation.
        """
        low, high = x
        middle = (low + high) / 2
        # a candidate replaces an equally good one only if it is better by more than rounding, because the last bits of
        # the interval, and with them the choice, depend on the batch
        better = 64 * torch.finfo(low.dtype).eps * (1 + torch.maximum(low.abs(), high.abs()))
        chosen: Lines | None = None
        for slope in self.candidates(x):
            smallest, largest = self.rounded_offsets(slope, x)
            if chosen is None:
                chosen = Lines(slope, smallest, slope, largest)
                continue
            lower = slope * middle + smallest > chosen.lower_slope * middle + chosen.lower_offset + better
            upper = slope * middle + largest < chosen.upper_slope * middle + chosen.upper_offset - better
            chosen = Lines(
                torch.where(lower, slope, chosen.lower_slope),
                torch.where(lower, smallest, chosen.lower_offset),
                torch.where(upper, slope, chosen.upper_slope),
                torch.where(upper, largest, chosen.upper_offset),
            )
        assert chosen is not None
        return chosen

    def rounded_offsets(self, slope: Tensor, x: Interval) -> Interval:
        """Return the offsets for a slope, enlarged by the rounding errors of their computation."""
        smallest, largest = self.offsets(slope, x)
        low, high = x
        size = torch.maximum(low.abs(), high.abs())
        error = 8 * torch.finfo(low.dtype).eps * ((slope.abs() + 1) * size + smallest.abs() + largest.abs())
        return smallest - error, largest + error


def secant(f: Callable[[Tensor], Tensor], x: Interval) -> Tensor:
    """Return the slope of the line through the ends of the graph of a function over each interval; 0 where an interval
    is too narrow for it.
    """
    low, high = x
    width = high - low
    wide = width > _NARROW * (1 + torch.maximum(low.abs(), high.abs()))
    return torch.where(wide, (f(high) - f(low)) / torch.where(wide, width, 1.0), 0.0)


@dataclass(frozen=True)
class ReLU(Activation):
    """max(x, 0). Over an interval with both signs, the upper bound is the secant, and the lower bound has the slope 1
    if more of the interval is positive, otherwise 0.
    """

    def __call__(self, x: Tensor) -> Tensor:
        """Return max(x, 0)."""
        return x.relu()

    def interval(self, x: Interval) -> Interval:
        """Return the exact range."""
        return x[0].relu(), x[1].relu()

    def offsets(self, slope: Tensor, x: Interval) -> Interval:
        """Return the exact extrema; the minimum is at 0 or an end of the interval, the maximum at an end."""
        low, high = x
        at_low, at_high = low.relu() - slope * low, high.relu() - slope * high
        kink = torch.where((low < 0) & (high > 0), 0.0, torch.inf)
        return torch.minimum(torch.minimum(at_low, at_high), kink), torch.maximum(at_low, at_high)

    def candidates(self, x: Interval) -> tuple[Tensor, ...]:
        """Return the slope of the secant, 0 and 1."""
        return secant(self, x), torch.zeros_like(x[0]), torch.ones_like(x[0])

    def lines(self, x: Interval) -> Lines:
        """Return the bounds in closed form, which are those of `Activation.lines`."""
        low, high = x
        below, above = low.clamp(max=0), high.clamp(min=0)
        wide = above - below
        tiny = torch.finfo(low.dtype).tiny
        slope = torch.where(wide < tiny, 1.0, above / wide.clamp(min=tiny))
        zero = torch.zeros_like(slope)
        # rounding of the slope moves the bound at the ends by at most 4 units in the last place of them
        enlarged = (-slope * below) * (1 + 8 * torch.finfo(low.dtype).eps)
        lower = (high > -low).to(low.dtype)
        return Lines(lower, zero, torch.where(low >= 0, 1.0, slope), torch.where(low >= 0, zero, enlarged))


@dataclass(frozen=True, eq=False)
class Piecewise(Activation):
    """Function that is linear between a few points, such as a clamp. Extrema over intervals are exact."""

    function: Callable[[Tensor], Tensor]
    points: tuple[float, ...]
    """points between which the function is linear"""
    slopes: tuple[float, ...]
    """slopes of the linear pieces"""

    def __call__(self, x: Tensor) -> Tensor:
        """Return the values of the function."""
        return self.function(x)

    def interval(self, x: Interval) -> Interval:
        """Return the exact range."""
        return self.rounded_offsets(torch.zeros_like(x[0]), x)

    def offsets(self, slope: Tensor, x: Interval) -> Interval:
        """Return the exact extrema, which are at the ends of the interval or at the points inside it."""
        low, high = x
        at_low, at_high = self(low) - slope * low, self(high) - slope * high
        smallest, largest = torch.minimum(at_low, at_high), torch.maximum(at_low, at_high)
        for point in self.points:
            inside = (low < point) & (point < high)
            value = self(torch.full_like(low, point)) - slope * point
            smallest = torch.where(inside, torch.minimum(smallest, value), smallest)
            largest = torch.where(inside, torch.maximum(largest, value), largest)
        return smallest, largest

    def candidates(self, x: Interval) -> tuple[Tensor, ...]:
        """Return the slopes of the secant and of the pieces."""
        return secant(self, x), *(torch.full_like(x[0], slope) for slope in self.slopes)


@dataclass(frozen=True, eq=False)
class Smooth(Activation):
    """Function with a Lipschitz continuous derivative, such as tanh, sigmoid, GELU or SiLU.

    The extrema of g(x) = f(x) - s x are bounded by the values of g on a grid: between neighbours at a distance h, a
    function with a derivative of Lipschitz constant M exceeds the larger one of the two values by at most M h^2 / 8.
    """

    function: Callable[[Tensor], Tensor]
    curvature: float
    """Lipschitz constant M of the derivative"""
    nodes: int = 64
    """number of cells of the grid over an interval"""

    def __call__(self, x: Tensor) -> Tensor:
        """Return the values of the function."""
        return self.function(x)

    def interval(self, x: Interval) -> Interval:
        """Return bounds of the range from a grid."""
        return self.rounded_offsets(torch.zeros_like(x[0]), x)

    def offsets(self, slope: Tensor, x: Interval) -> Interval:
        """Return bounds of the extrema from a grid."""
        low, high = x
        width = high - low
        smallest = largest = self(low) - slope * low
        for k in range(1, self.nodes + 1):
            at = high if k == self.nodes else low + width * (k / self.nodes)
            value = self(at) - slope * at
            smallest, largest = torch.minimum(smallest, value), torch.maximum(largest, value)
        beyond = self.curvature * (width / self.nodes).square() / 8
        return smallest - beyond, largest + beyond

    def candidates(self, x: Interval) -> tuple[Tensor, ...]:
        """Return the slopes of the secant and of the tangents at the ends and in the middle."""
        low, high = x
        return secant(self, x), *(self._slope(at) for at in (low, (low + high) / 2, high))

    def _slope(self, at: Tensor) -> Tensor:
        with torch.enable_grad():
            point = at.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self(point).sum(), point)
        return slope


@dataclass(frozen=True, eq=False)
class MaxPool:
    """Maximum over the windows of an image, with linear bounds in the values of each window.

    The lower bound is the value with the largest lower bound t. The upper bound is t plus the sum over the window of
    the secants of max(x_i - t, 0), or the constant of the largest upper bound, whichever is smaller in the middle.
    """

    windows: Callable[[Tensor], Tensor]
    """function from values (m, *shape) to those of the windows (m, *out, size), with zeros for padding"""
    padding: Tensor
    """mask (*out, size) of the entries of windows that are padding and not values"""

    def __call__(self, x: Tensor) -> Tensor:
        """Return the maxima (n, *out)."""
        return self.windows(x).masked_fill(self.padding, -torch.inf).amax(-1)

    def interval(self, x: Interval) -> Interval:
        """Return the exact range of the maxima."""
        return self(x[0]), self(x[1])

    def lines(self, x: Interval) -> "PoolLines":
        """Return linear bounds of the maxima over the intervals. The offsets are enlarged by the rounding errors of
        their computation.
        """
        low = self.windows(x[0]).masked_fill(self.padding, -torch.inf)
        high = self.windows(x[1]).masked_fill(self.padding, -torch.inf)
        best, first = low.max(-1)
        above = (high - best[..., None]).clamp(min=0)
        inside = above > 0
        slopes = torch.where(inside, above / torch.where(inside, high - low, 1.0), 0.0).clamp(max=1.0)
        known = torch.where(inside, low, 0.0)
        offset = best - (slopes * known).sum(-1)
        size = (slopes * known.abs()).sum(-1) + best.abs() + torch.where(inside, high.abs(), 0.0).sum(-1)
        offset = offset + 4 * (low.shape[-1] + 2) * torch.finfo(low.dtype).eps * size
        largest = high.amax(-1)
        at_middle = offset + (slopes * torch.where(inside, (low + high) / 2, 0.0)).sum(-1)
        constant = largest < at_middle
        return PoolLines(
            torch.zeros_like(slopes).scatter_(-1, first[..., None], 1.0),
            torch.where(constant[..., None], 0.0, slopes),
            torch.where(constant, largest, offset),
        )

    def transposed(self, a: Tensor, lines: "PoolLines", shape: torch.Size) -> Tensor:
        """Return the coefficients (n, k, *shape) with respect to the inputs of lower bounds of linear functions with
        the coefficients `a` (n, k, *out) of the maxima.
        """
        negative = a.clamp(max=0)
        entries = (a - negative)[..., None] * lines.lower[:, None] + negative[..., None] * lines.upper[
            :, None
        ]
        rows = entries.flatten(0, 1)
        pull = torch.func.vjp(self.windows, rows.new_zeros(len(rows), *shape))[1]
        back: Tensor = pull(rows)[0]
        return back.view(*a.shape[:2], *shape)


class PoolLines(NamedTuple):
    """Linear bounds of a maximum: lower . x <= max(x) <= upper . x + upper_offset for the values x of a window."""

    lower: Tensor
    """coefficients (n, *out, size)"""
    upper: Tensor
    """coefficients (n, *out, size)"""
    upper_offset: Tensor
    """constants (n, *out)"""


def pooling_windows(x: Tensor, out: tuple[int, ...], settings: Mapping[str, Any]) -> Tensor:
    """Return the windows (n, channels, *out, size) of images, with zeros for padding. `settings` are those of
    `torch.nn.functional.unfold`.
    """
    channels = x.shape[1]
    unfolded: Tensor = F.unfold(x, **settings)
    size = math.prod(settings["kernel_size"])
    return unfolded.view(len(x), channels, size, *out).movedim(2, -1)
