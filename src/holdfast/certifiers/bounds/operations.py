"""Linear and nonlinear operations of a traced network, with their interval bounds, linear bounds and transposes."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Interval = tuple[Tensor, Tensor]
"""lower and upper bounds of the values of a node, (n, *shape) each"""


class Linear(ABC):
    """Base class of operations that are linear in their inputs, up to a constant: f(x, …) = W x + … + b.

    Rounding errors follow the standard model of floating-point arithmetic (Higham, "Accuracy and Stability of Numerical
    Algorithms", 2002, section 3.1): a sum of `terms` products differs from its exact value by at most a factor
    `terms` u / (1 - `terms` u) of the sum of the magnitudes, in any order of summation, with the unit roundoff u.
    """

    terms: int
    """largest number of products that are summed for one value, in the operation or in its transpose; 0 if values are
    only moved"""

    @abstractmethod
    def __call__(self, *x: Tensor) -> Tensor:
        """Return the values of the operation, (n, *shape)."""

    @abstractmethod
    def interval(self, *x: Interval) -> Interval:
        """Return bounds of the values for all inputs within the given bounds, without the rounding error."""

    @abstractmethod
    def transposed(self, a: Tensor, shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
        """Return the coefficients (n, k, *shape) of linear functions with respect to each input, from their
        coefficients `a` with respect to the output. `shapes` are those of the inputs, without the batch dimension.
        """

    def constants(self, a: Tensor) -> Tensor | None:
        """Return the constants (n, k) that the offset b adds to linear functions with the coefficients `a`, or None if
        there is no offset.
        """
        return None

    @abstractmethod
    def magnitude_bound(self, *x: Tensor) -> Tensor:
        """Return |W| x + |b| for magnitudes `x` of the inputs, which bounds the sums in the rounding error."""


@dataclass(frozen=True, eq=False)
class Dense(Linear):
    """Matrix multiplication of the last dimension: y = x W^T + b, with `weight` (out, in) and `bias` (out) or None."""

    weight: Tensor
    bias: Tensor | None

    @property
    def terms(self) -> int:  # type: ignore[override]
        """Larger one of the numbers of inputs and outputs, plus one for the offset."""
        return max(self.weight.shape) + 1

    def __call__(self, *x: Tensor) -> Tensor:
        """Return x W^T + b."""
        return F.linear(x[0], self.weight, self.bias)

    def interval(self, *x: Interval) -> Interval:
        """Return the exact range of each output by interval arithmetic with centre and radius."""
        ((low, high),) = x
        centre = F.linear((low + high) / 2, self.weight, self.bias)
        radius = F.linear((high - low) / 2, self.weight.abs())
        return centre - radius, centre + radius

    def transposed(self, a: Tensor, shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
        """Return a W."""
        return (a @ self.weight,)

    def constants(self, a: Tensor) -> Tensor | None:
        """Return a b, summed over all further dimensions."""
        if self.bias is None:
            return None
        products = a @ self.bias
        return products.flatten(2).sum(2) if products.dim() > 2 else products

    def magnitude_bound(self, *x: Tensor) -> Tensor:
        """Return x |W|^T + |b|."""
        return F.linear(x[0], self.weight.abs(), None if self.bias is None else self.bias.abs())


_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSES = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@dataclass(frozen=True, eq=False)
class Convolution(Linear):
    """Convolution in one, two or three dimensions with zero padding, as in `torch.nn.functional.conv2d`."""

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def terms(self) -> int:  # type: ignore[override]
        """Number of weights that are summed for one output or, in the transpose, for one input, plus one."""
        kernel = math.prod(self.weight.shape[2:])
        return max(self.weight.shape[1], self.weight.shape[0] // self.groups) * kernel + 1

    def _convolved(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        convolve = _CONVOLUTIONS[len(self.stride)]
        y: Tensor = convolve(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return y

    def __call__(self, *x: Tensor) -> Tensor:
        """Return the convolution of x with the kernel, plus the bias."""
        return self._convolved(x[0], self.weight, self.bias)

    def interval(self, *x: Interval) -> Interval:
        """Return the exact range of each output by interval arithmetic with centre and radius."""
        ((low, high),) = x
        centre = self._convolved((low + high) / 2, self.weight, self.bias)
        radius = self._convolved((high - low) / 2, self.weight.abs(), None)
        return centre - radius, centre + radius

    def transposed(self, a: Tensor, shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
        """Return the transposed convolution of the coefficients."""
        size = shapes[0][1:]
        # inputs beyond the last stride are not read, so their coefficients are zero
        beyond = tuple(
            total - ((out - 1) * step - 2 * pad + spread * (kernel - 1) + 1)
            for total, out, step, pad, spread, kernel in zip(
                size,
                a.shape[3:],
                self.stride,
                self.padding,
                self.dilation,
                self.weight.shape[2:],
                strict=True,
            )
        )
        transpose = _TRANSPOSES[len(self.stride)]
        back: Tensor = transpose(
            a.flatten(0, 1), self.weight, None, self.stride, self.padding, beyond, self.groups, self.dilation
        )
        return (back.view(*a.shape[:2], *back.shape[1:]),)

    def constants(self, a: Tensor) -> Tensor | None:
        """Return the coefficients, summed over positions, times the bias of each channel."""
        return None if self.bias is None else a.flatten(3).sum(3) @ self.bias

    def magnitude_bound(self, *x: Tensor) -> Tensor:
        """Return the convolution of x with the magnitudes of the kernel, plus those of the bias."""
        return self._convolved(x[0], self.weight.abs(), None if self.bias is None else self.bias.abs())


@dataclass(frozen=True, eq=False)
class Scaled(Linear):
    """Multiplication by a constant and addition of a constant: y = scale * x + offset.

    `scale` and `offset` broadcast to the shape of one example, or are None for 1 and 0. Batch norm in evaluation mode
    and the normalisation of inputs are of this form.
    """

    scale: Tensor | None
    offset: Tensor | None
    terms = 3

    def __call__(self, *x: Tensor) -> Tensor:
        """Return scale * x + offset."""
        y = x[0] if self.scale is None else x[0] * self.scale
        return y if self.offset is None else y + self.offset

    def interval(self, *x: Interval) -> Interval:
        """Return the exact range of each output; a negative factor exchanges the bounds."""
        ((low, high),) = x
        first, second = self(low), self(high)
        return (
            (first, second)
            if self.scale is None
            else (torch.minimum(first, second), torch.maximum(first, second))
        )

    def transposed(self, a: Tensor, shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
        """Return a * scale, summed over copies if the constants have more values than the input."""
        return (_summed(a if self.scale is None else a * self.scale, shapes[0]),)

    def constants(self, a: Tensor) -> Tensor | None:
        """Return a * offset, summed over the shape of an example."""
        return None if self.offset is None else (a * self.offset).flatten(2).sum(2)

    def magnitude_bound(self, *x: Tensor) -> Tensor:
        """Return |scale| * x + |offset|."""
        y = x[0] if self.scale is None else x[0] * self.scale.abs()
        return y if self.offset is None else y + self.offset.abs()


@dataclass(frozen=True, eq=False)
class Nonnegative(Linear):
    """Linear operation with nonnegative weights and no offset, such as average pooling, padding with zeros, or a view.

    `function` maps batches (n, *shape) and treats examples independently. Since it is monotone, the bounds of its
    inputs are mapped to those of its outputs. The transpose is its vector-Jacobian product.
    """

    function: Callable[..., Tensor]
    terms: int = 0

    def __call__(self, *x: Tensor) -> Tensor:
        """Return the values of the function."""
        return self.function(*x)

    def interval(self, *x: Interval) -> Interval:
        """Return the values of the function for the lower and for the upper bounds of its inputs."""
        return self.function(*(low for low, _ in x)), self.function(*(high for _, high in x))

    def transposed(self, a: Tensor, shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
        """Return the vector-Jacobian products of the function, which do not depend on its inputs."""
        rows = a.flatten(0, 1)
        zeros = [rows.new_zeros(len(rows), *shape) for shape in shapes]
        pull = torch.func.vjp(self.function, *zeros)[1]
        return tuple(each.view(*a.shape[:2], *each.shape[1:]) for each in pull(rows))

    def magnitude_bound(self, *x: Tensor) -> Tensor:
        """Return the values of the function for magnitudes `x` of its inputs; they bound rounding errors."""
        return self.function(*x)


@dataclass(frozen=True, eq=False)
class Sum(Linear):
    """Sum or difference of two nodes: y = x_1 + factor * x_2, with broadcasting between their shapes."""

    factor: float = 1.0
    terms = 2

    def __call__(self, *x: Tensor) -> Tensor:
        """Return x_1 + factor * x_2."""
        return torch.add(x[0], x[1], alpha=self.factor)

    def interval(self, *x: Interval) -> Interval:
        """Return the sum of the intervals."""
        (low, high), (low_2, high_2) = x
        if self.factor < 0:
            low_2, high_2 = high_2, low_2
        return torch.add(low, low_2, alpha=self.factor), torch.add(high, high_2, alpha=self.factor)

    def transposed(self, a: Tensor, shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
        """Return the coefficients for both inputs; those of a broadcast input are summed over the copies."""
        return _summed(a, shapes[0]), _summed(a * self.factor, shapes[1])

    def magnitude_bound(self, *x: Tensor) -> Tensor:
        """Return x_1 + |factor| * x_2."""
        return torch.add(x[0], x[1], alpha=abs(self.factor))


def _summed(a: Tensor, shape: torch.Size) -> Tensor:
    """Coefficients of an input of the given shape, which was broadcast to the shape of the coefficients."""
    full = a.shape[2:]
    if full == shape:
        return a
    padded = (1,) * (len(full) - len(shape)) + tuple(shape)
    dims = [2 + i for i, (size, kept) in enumerate(zip(full, padded, strict=True)) if kept == 1 and size != 1]
    return (a.sum(dims, keepdim=True) if dims else a).reshape(*a.shape[:2], *shape)


def joined_parts(*x: Tensor, fixed: Sequence[Tensor | None], dim: int) -> Tensor:
    """Return tensors joined along a dimension. None in `fixed` stands for the next one of `x` (n, …); constants
    (1, …) are repeated.
    """
    varying = iter(x)
    n = len(x[0])
    parts = [next(varying) if each is None else each.to(x[0]).expand(n, *each.shape[1:]) for each in fixed]
    return torch.cat(parts, dim)


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
