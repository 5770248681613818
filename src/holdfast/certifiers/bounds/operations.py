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
    """largest number of products that are summed for one value; 0 if values are only moved"""

    @property
    def back_terms(self) -> int:
        """Largest number of products that are summed for one value of the transpose."""
        return self.terms

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
        there is no offset. They are summed over one dimension after the other, so that a product is part of at most as
        many additions as the lengths of all dimensions add up to.
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
        """Number of inputs, plus one for the offset."""
        return self.weight.shape[1] + 1

    @property
    def back_terms(self) -> int:
        """Number of outputs."""
        return len(self.weight)

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
        return None if self.bias is None else summed_up(a @ self.bias, 2)

    def magnitude_bound(self, *x: Tensor) -> Tensor:
        """Return x |W|^T + |b|."""
        return F.linear(x[0], self.weight.abs(), None if self.bias is None else self.bias.abs())


def summed_up(a: Tensor, dims: int) -> Tensor:
    """Return the sums over all dimensions but the first `dims`, over one dimension after the other."""
    while a.dim() > dims:
        a = a.sum(-1)
    return a


def _overlapping(kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> int:
    """Largest number of positions of a kernel that read the same value."""
    steps = zip(kernel, stride, dilation, strict=True)
    return math.prod(math.ceil(width * math.gcd(step, spread) / step) for width, step, spread in steps)


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
        """Number of weights that are summed for one output, plus one for the offset."""
        return self.weight[0].numel() + 1

    @property
    def back_terms(self) -> int:
        """Number of outputs in which one input is a term."""
        positions = _overlapping(self.weight.shape[2:], self.stride, self.dilation)
        return len(self.weight) // self.groups * positions

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
        return None if self.bias is None else summed_up(a, 3) @ self.bias

    def magnitude_bound(self, *x: Tensor) -> Tensor:
        """Return the convolution of x with the magnitudes of the kernel, plus those of the bias."""
        return self._convolved(x[0], self.weight.abs(), None if self.bias is None else self.bias.abs())


@dataclass(frozen=True, eq=False)
class TransposedConvolution(Linear):
    """Transposed convolution, as in `torch.nn.functional.conv_transpose2d`, with a kernel (in, out / groups, ...)."""

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    groups: int

    @property
    def terms(self) -> int:  # type: ignore[override]
        """Number of inputs that are terms of one output, plus one for the offset."""
        positions = _overlapping(self.weight.shape[2:], self.stride, self.dilation)
        return len(self.weight) // self.groups * positions + 1

    @property
    def back_terms(self) -> int:
        """Number of weights that are summed for one input."""
        return self.weight[0].numel()

    def _applied(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        transpose = _TRANSPOSES[len(self.stride)]
        y: Tensor = transpose(
            x, weight, bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation
        )
        return y

    def __call__(self, *x: Tensor) -> Tensor:
        """Return the transposed convolution of x with the kernel, plus the bias."""
        return self._applied(x[0], self.weight, self.bias)

    def interval(self, *x: Interval) -> Interval:
        """Return the exact range of each output by interval arithmetic with centre and radius."""
        ((low, high),) = x
        centre = self._applied((low + high) / 2, self.weight, self.bias)
        radius = self._applied((high - low) / 2, self.weight.abs(), None)
        return centre - radius, centre + radius

    def transposed(self, a: Tensor, shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
        """Return the convolution of the coefficients."""
        convolve = _CONVOLUTIONS[len(self.stride)]
        back: Tensor = convolve(
            a.flatten(0, 1), self.weight, None, self.stride, self.padding, self.dilation, self.groups
        )
        return (back.view(*a.shape[:2], *back.shape[1:]),)

    def constants(self, a: Tensor) -> Tensor | None:
        """Return the coefficients, summed over positions, times the bias of each channel."""
        return None if self.bias is None else summed_up(a, 3) @ self.bias

    def magnitude_bound(self, *x: Tensor) -> Tensor:
        """Return the transposed convolution of x with the magnitudes of the kernel, plus those of the bias."""
        return self._applied(x[0], self.weight.abs(), None if self.bias is None else self.bias.abs())


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
        return None if self.offset is None else summed_up(a * self.offset, 2)

    def magnitude_bound(self, *x: Tensor) -> Tensor:
        """Return |scale| * x + |offset|."""
        y = x[0] if self.scale is None else x[0] * self.scale.abs()
        return y if self.offset is None else y + self.offset.abs()


def _pulled(
    function: Callable[..., Tensor], rows: Tensor, shapes: Sequence[torch.Size]
) -> tuple[Tensor, ...]:
    """Vector-Jacobian products of a linear function of inputs of some shapes, for each of the rows."""
    tracked = torch.is_grad_enabled()
    zeros = [rows.new_zeros(len(rows), *shape).requires_grad_() for shape in shapes]
    with torch.enable_grad():  # not torch.func.vjp, which imports the compiler of torch
        y = function(*zeros)
        return torch.autograd.grad(y, zeros, rows, create_graph=tracked, materialize_grads=True)


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
        pulled = _pulled(self.function, a.flatten(0, 1), shapes)
        return tuple(each.view(*a.shape[:2], *each.shape[1:]) for each in pulled)

    def magnitude_bound(self, *x: Tensor) -> Tensor:
        """Return the values of the function for magnitudes `x` of its inputs; they bound rounding errors."""
        return self.function(*x)


@dataclass(frozen=True, eq=False)
class Reduction(Nonnegative):
    """Sum or mean over dimensions."""

    dims: tuple[int, ...] = ()
    """dimensions of a batch"""
    divisor: int = 1

    def transposed(self, a: Tensor, shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
        """Return the coefficients of a result for each of its terms, without a copy in the memory."""
        left = [1 if i in self.dims else size for i, size in enumerate(shapes[0], 1)]
        each = a.reshape(*a.shape[:2], *left)
        return ((each if self.divisor == 1 else each / self.divisor).expand(*a.shape[:2], *shapes[0]),)


@dataclass(frozen=True, eq=False)
class Sum(Linear):
    """Sum or difference of two nodes: y = x_1 + factor * x_2, with broadcasting between their shapes."""

    factor: float = 1.0
    least: float = -math.inf
    """smallest sum, also after rounding, where it is known otherwise"""
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


@dataclass(frozen=True, eq=False)
class Contracted(Linear):
    """Sums of products of a value with a constant: y = einsum(`equation`, x, `constant`), for one example."""

    equation: str
    constant: Tensor

    @property
    def terms(self) -> int:  # type: ignore[override]
        """Largest number of products in one sum, at most the number of values of the constant."""
        return self.constant.numel()

    def _applied(self, x: Tensor, constant: Tensor) -> Tensor:
        first, second, out = letters(self.equation)
        return torch.einsum(f"N{first},{second}->N{out}", x, constant)

    def __call__(self, *x: Tensor) -> Tensor:
        """Return the sums."""
        return self._applied(x[0], self.constant)

    def interval(self, *x: Interval) -> Interval:
        """Return the exact range of each output by interval arithmetic with centre and radius."""
        ((low, high),) = x
        centre = self._applied((low + high) / 2, self.constant)
        radius = self._applied((high - low) / 2, self.constant.abs())
        return centre - radius, centre + radius

    def transposed(self, a: Tensor, shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
        """Return the sums of the coefficients times the constant."""
        first, second, out = letters(self.equation)
        return (torch.einsum(f"NR{out},{second}->NR{first}", a, self.constant),)

    def magnitude_bound(self, *x: Tensor) -> Tensor:
        """Return the sums with the magnitudes of the constant."""
        return self._applied(x[0], self.constant.abs())


def letters(equation: str) -> tuple[str, str, str]:
    """Return the letters of both factors and of the result of an einsum equation."""
    factors, _, out = equation.partition("->")
    first, second = factors.split(",")
    return first, second, out


@dataclass(frozen=True, eq=False)
class Differences(Linear):
    """Differences of the values along the last dimension: y_ij = x_j - x_i, with shape (…, size, size)."""

    size: int

    @property
    def terms(self) -> int:  # type: ignore[override]
        """Number of differences that contain one value, plus one."""
        return 2 * self.size + 1

    def __call__(self, *x: Tensor) -> Tensor:
        """Return the differences."""
        return x[0][..., None, :] - x[0][..., None]

    def interval(self, *x: Interval) -> Interval:
        """Return the exact range of each difference, which is 0 for a value and itself."""
        ((low, high),) = x
        same = torch.eye(self.size, dtype=torch.bool, device=low.device)
        least = low[..., None, :] - high[..., None]
        return least.masked_fill(same, 0.0), (-least.transpose(-1, -2)).masked_fill(same, 0.0)

    def transposed(self, a: Tensor, shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
        """Return the sums of the coefficients of the differences in which a value is first, minus the others."""
        return (a.sum(-2) - a.sum(-1),)

    def magnitude_bound(self, *x: Tensor) -> Tensor:
        """Return the sums of two magnitudes, and 0 for the difference of a value and itself."""
        same = torch.eye(self.size, dtype=torch.bool, device=x[0].device)
        return (x[0][..., None, :] + x[0][..., None]).masked_fill(same, 0.0)


@dataclass(frozen=True, eq=False)
class Centred(Linear):
    """Subtraction of the mean of the values along the last dimension, which has `size` values."""

    size: int

    @property
    def terms(self) -> int:  # type: ignore[override]
        """Number of values in a mean, plus three."""
        return self.size + 3

    def __call__(self, *x: Tensor) -> Tensor:
        """Return x minus its mean."""
        return x[0] - x[0].mean(-1, keepdim=True)

    def interval(self, *x: Interval) -> Interval:
        """Return the exact range of each output: each value is part of its mean, too."""
        ((low, high),) = x
        width = (high - low) / self.size
        least, most = low - high.mean(-1, keepdim=True), high - low.mean(-1, keepdim=True)
        return least + width, most - width

    def transposed(self, a: Tensor, shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
        """Return the coefficients minus their mean."""
        return (a - a.mean(-1, keepdim=True),)

    def magnitude_bound(self, *x: Tensor) -> Tensor:
        """Return x plus its mean."""
        return x[0] + x[0].mean(-1, keepdim=True)


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

    def slope_range(self, x: Interval) -> Interval:
        """Return the smallest and the largest slope among the candidates, between which slopes are optimised."""
        candidates = torch.stack(self.candidates(x))
        return candidates.amin(0), candidates.amax(0)

    def lines_at(self, positions: tuple[Tensor, Tensor], x: Interval) -> Lines:
        """Return linear bounds (n, k, *shape) whose slopes are at the given positions between the smallest (0) and the
        largest (1) slope: those of the lower and of the upper lines, (n, k, *shape) each.

        The offsets are enlarged by the rounding errors of their computation.
        """
        wide = (x[0][:, None], x[1][:, None])
        least, most = (each[:, None] for each in self.slope_range(x))
        lower, upper = (torch.lerp(least, most, each) for each in positions)
        return Lines(lower, self.rounded_offsets(lower, wide)[0], upper, self.rounded_offsets(upper, wide)[1])

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
    """Function whose derivative is Lipschitz continuous, except at a few kinks, such as tanh, sigmoid, GELU or SELU.

    The extrema of g(x) = f(x) - s x are bounded by the values of g on a grid and at the kinks: between neighbours at a
    distance h, a function with a derivative of Lipschitz constant M exceeds the larger one of the two values by at most
    M h^2 / 8.
    """

    function: Callable[[Tensor], Tensor]
    curvature: float
    """Lipschitz constant M of the derivative"""
    nodes: int = 64
    """number of cells of the grid over an interval"""
    kinks: tuple[float, ...] = ()
    """points at which the derivative jumps"""
    error: float = 0.0
    """largest difference between the function and the one of the network"""

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
        places = (low + width * (k / self.nodes) for k in range(1, self.nodes))
        kinks = (torch.clamp(torch.full_like(low, kink), low, high) for kink in self.kinks)
        beyond = self.curvature * (width / self.nodes).square() / 8 + self.error
        if slope.requires_grad:
            smallest, largest = self._extrema(slope, (low, *places, *kinks, high))
            return smallest - beyond, largest + beyond
        smallest = largest = self(low) - slope * low
        for at in (*places, *kinks, high):
            value = self(at) - slope * at
            smallest, largest = torch.minimum(smallest, value), torch.maximum(largest, value)
        return smallest - beyond, largest + beyond

    def _extrema(self, slope: Tensor, points: tuple[Tensor, ...]) -> Interval:
        """The extrema of f(x) - slope * x over some points, with gradients with respect to the slope alone: those of
        the function at the extreme points, so that nothing is stored for the others.
        """
        with torch.no_grad():
            at_smallest = at_largest = points[0].expand_as(slope)
            smallest = largest = self(points[0]) - slope * points[0]
            for at in points[1:]:
                value = self(at) - slope * at
                at_smallest = torch.where(value < smallest, at, at_smallest)
                at_largest = torch.where(value > largest, at, at_largest)
                smallest, largest = torch.minimum(smallest, value), torch.maximum(largest, value)
            values = self(at_smallest), self(at_largest)
        return values[0] - slope * at_smallest, values[1] - slope * at_largest

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
class Curved(Activation):
    """Function that is convex or concave on each side of zero, such as the exponential function or a power.

    Where it is convex on an interval, its lower bound is the tangent in the middle, and its upper bound the secant;
    where it is concave, the other way round. An interval that leaves the domain has no bounds.
    """

    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    below: int
    """1 if the function is convex for negative numbers, -1 if it is concave, 0 if it is not defined"""
    above: int
    """1 if the function is convex for positive numbers, -1 if it is concave"""
    at_zero: bool
    """whether the function is defined and continuous at zero"""
    turns: bool = False
    """whether the function has its minimum at zero, as an even power; otherwise it is monotone on each side"""

    def __call__(self, x: Tensor) -> Tensor:
        """Return the values of the function."""
        return self.function(x)

    def defined(self, x: Interval) -> Tensor:
        """Return the mask of the intervals inside of the domain."""
        low, high = x
        positive = low >= 0 if self.at_zero else low > 0
        if not self.below:
            return positive
        return low <= high if self.at_zero else positive | (high < 0)

    def _inside(self, x: Interval) -> tuple[Interval, Tensor]:
        """The intervals, with [1, 1] in place of those outside of the domain, and the mask of the others."""
        inside = self.defined(x)
        return (torch.where(inside, x[0], 1.0), torch.where(inside, x[1], 1.0)), inside

    def interval(self, x: Interval) -> Interval:
        """Return the range, enlarged by rounding errors; infinite outside of the domain."""
        (low, high), inside = self._inside(x)
        smallest, largest = self._range(low, high)
        eps = 8 * torch.finfo(low.dtype).eps
        least, most = smallest - eps * smallest.abs(), largest + eps * largest.abs()
        return torch.where(inside, least, -torch.inf), torch.where(inside, most, torch.inf)

    def _range(self, low: Tensor, high: Tensor) -> Interval:
        first, second = self(low), self(high)
        smallest, largest = torch.minimum(first, second), torch.maximum(first, second)
        # a value that overflows is at least the largest number
        smallest = smallest.clamp(max=torch.finfo(low.dtype).max)
        return (torch.where((low < 0) & (high > 0), 0.0, smallest) if self.turns else smallest), largest

    def offsets(self, slope: Tensor, x: Interval) -> Interval:
        """Return bounds of the extrema: those at the ends of an interval, and a bound from the tangent in the middle,
        above which a convex function lies.
        """
        (low, high), inside = self._inside(x)
        on_line = _times(slope, low), _times(slope, high)
        at_low, at_high = self(low) - on_line[0], self(high) - on_line[1]
        ends = torch.minimum(at_low, at_high), torch.maximum(at_low, at_high)
        middle, radius = _centred((low, high))
        # at zero, a root has no derivative
        steep = torch.where(high > low, self.derivative(middle) - slope, 0.0)
        at_middle = self(middle) - _times(slope, middle)
        spread = _times(steep.abs(), radius) * (1 + 4 * torch.finfo(low.dtype).eps)
        convex, concave = self._bent(low, high)
        smallest, largest = self._range(low, high)
        constant = smallest - torch.maximum(*on_line), largest - torch.minimum(*on_line)
        least = torch.where(convex, at_middle - spread, torch.where(concave, ends[0], constant[0]))
        most = torch.where(concave, at_middle + spread, torch.where(convex, ends[1], constant[1]))
        # after an overflow, only the constant is a number
        least, most = torch.fmax(least, constant[0]), torch.fmin(most, constant[1])
        return torch.where(inside, least, -torch.inf), torch.where(inside, most, torch.inf)

    def rounded_offsets(self, slope: Tensor, x: Interval) -> Interval:
        """Return the offsets for a slope, each enlarged by the rounding error of its computation."""
        smallest, largest = self.offsets(slope, x)
        size = _times(slope.abs(), torch.maximum(x[0].abs(), x[1].abs()))
        eps = 8 * torch.finfo(slope.dtype).eps
        return smallest - eps * (size + smallest.abs()), largest + eps * (size + largest.abs())

    def _bent(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The masks of the intervals on which the function is convex, and on which it is concave."""
        negative, positive = high <= 0, low >= 0
        if self.below == self.above:
            everywhere = torch.ones_like(positive)
            return (everywhere, ~everywhere) if self.above > 0 else (~everywhere, everywhere)
        convex = (positive if self.above > 0 else torch.zeros_like(positive)) | (
            negative if self.below > 0 else torch.zeros_like(positive)
        )
        concave = (positive if self.above < 0 else torch.zeros_like(positive)) | (
            negative if self.below < 0 else torch.zeros_like(positive)
        )
        return convex, concave & ~convex

    def candidates(self, x: Interval) -> tuple[Tensor, ...]:
        """Return the slopes of the secant and of the tangent in the middle, and 0."""
        (low, high), _ = self._inside(x)
        width = high - low
        wide = width > _NARROW * torch.maximum(low.abs(), high.abs())
        slopes = (self(high) - self(low)) / torch.where(wide, width, 1.0), self.derivative((low + high) / 2)
        finite = [torch.where(wide & each.isfinite(), each, 0.0) for each in slopes]
        return (*finite, torch.zeros_like(width))

    def lines(self, x: Interval) -> Lines:
        """Return the tangent in the middle and the secant, whichever bounds the function on which side."""
        secant_slope, tangent_slope, zero = self.candidates(x)
        (low, high), inside = self._inside(x)
        convex, concave = self._bent(low, high)
        lower = torch.where(convex, tangent_slope, torch.where(concave, secant_slope, zero))
        upper = torch.where(concave, tangent_slope, torch.where(convex, secant_slope, zero))
        lower, upper = torch.where(inside, lower, 0.0), torch.where(inside, upper, 0.0)
        return Lines(lower, self.rounded_offsets(lower, x)[0], upper, self.rounded_offsets(upper, x)[1])


def _times(slope: Tensor, x: Tensor) -> Tensor:
    """The products of slopes and numbers, which may be infinite; 0 where the slope is 0."""
    return torch.where(slope == 0, 0.0, slope * x)


EXPONENTIAL = Curved(torch.exp, torch.exp, below=1, above=1, at_zero=True)


@dataclass(frozen=True, eq=False)
class ExponentialSum:
    """Sums of exponentials of differences, s_i = sum_j exp(d_ij) with d_ij = x_j - x_i, of which the inverse is a
    softmax. Some j may be left out; a sum without terms is 1.

    Its input is a value of `Differences`, and a substitution leads directly to the values x, so that no coefficients of
    the differences are stored.
    """

    absent: Tensor | None
    """mask of the terms that are left out, which broadcasts to the differences (…, size, size), or None"""

    def _masked(self, x: Tensor) -> Tensor:
        return x if self.absent is None else x.masked_fill(self.absent, 0.0)

    def _summed(self, x: Tensor, empty: float = 1.0) -> Tensor:
        total = self._masked(x).sum(-1)
        return total if self.absent is None else total.where(~self.absent.all(-1), empty)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the sums (n, …, size) for differences (n, …, size, size)."""
        return self._summed(x.exp())

    def interval(self, x: Interval) -> Interval:
        """Return the exact range of the sums, enlarged by rounding errors."""
        # exponentials that overflow are left out, because their gradients are not numbers
        size = x[0].shape[-1]
        limit = math.log(torch.finfo(x[0].dtype).max / (4 * size))
        least, most = (
            self._summed(each)
            for each in EXPONENTIAL.interval((x[0].clamp(max=limit), x[1].clamp(max=limit)))
        )
        rounding = 2 * size * torch.finfo(least.dtype).eps
        exceeds = self._masked((x[1] > limit).to(x[1].dtype)).amax(-1) > 0
        return least * (1 - rounding), torch.where(exceeds, torch.inf, most * (1 + rounding))

    def lines(self, x: Interval) -> "SumLines":
        """Return linear bounds of the sums over the intervals of the differences."""
        lines = EXPONENTIAL.lines(x)
        lower, upper = self._masked(lines.lower_slope), self._masked(lines.upper_slope)
        size = x[0].shape[-1]
        # so that no sum overflows
        smallest = lines.lower_offset.clamp(max=torch.finfo(lower.dtype).max / (4 * size))
        rounding = 2 * size * torch.finfo(lower.dtype).eps
        least, most = (
            self._summed(each - sign * rounding * each.abs())
            for each, sign in ((smallest, 1), (lines.upper_offset, -1))
        )
        return SumLines(lower, least, upper, most)

    def transposed(self, a: Tensor, lines: "SumLines") -> tuple[Tensor, Tensor]:
        """Return the coefficients with respect to the values x of lower bounds of linear functions with the
        coefficients `a` (n, k, …, size), and the constants (n, k).
        """
        size, positive = a.shape[-1], a.clamp(min=0)
        back, constant = torch.zeros(()), torch.zeros(())
        for part, slope, offset in (
            (positive, lines.lower_slope, lines.lower_offset),
            (a - positive, lines.upper_slope, lines.upper_offset),
        ):
            flat, slopes = part.reshape(*a.shape[:2], -1, size), slope.reshape(len(slope), -1, size, size)
            back = back + torch.einsum("nkgi,ngij->nkgj", flat, slopes) - flat * slopes.sum(-1)[:, None]
            if bool(offset.isinf().any()):  # after an overflow; no coefficient may use it
                constant = constant + _times(part, offset[:, None]).flatten(2).sum(2)
            else:
                constant = constant + weighted(part, offset)
        return back.reshape(*back.shape[:2], *a.shape[2:]), constant


class SumLines(NamedTuple):
    """Linear bounds of sums of exponentials: slopes (n, …, size, size) of the differences, and offsets (n, …, size)."""

    lower_slope: Tensor
    lower_offset: Tensor
    upper_slope: Tensor
    upper_offset: Tensor


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
        (back,) = _pulled(self.windows, entries.flatten(0, 1), [shape])
        return back.view(*entries.shape[:2], *shape)


class PoolLines(NamedTuple):
    """Linear bounds of a maximum: lower . x <= max(x) <= upper . x + upper_offset for the values x of a window."""

    lower: Tensor
    """coefficients (n, *out, size)"""
    upper: Tensor
    """coefficients (n, *out, size)"""
    upper_offset: Tensor
    """constants (n, *out)"""


def gathered_windows(x: Tensor, index: Tensor, dims: int, out: tuple[int, ...]) -> Tensor:
    """Return the windows (n, *out, size) of values, whose last dimensions `dims` are joined, from the places (windows,
    size) of their entries; -1 stands for padding with zero.
    """
    filled = F.pad(x.flatten(-dims), (0, 1))  # a last entry, at the place -1
    return filled[..., index].reshape(len(x), *out, index.shape[1])


def reduced_windows(x: Tensor, shape: tuple[int, ...], dims: list[int], out: tuple[int, ...]) -> Tensor:
    """Return windows (n, *out, size) of the values along some dimensions of x in the given shape."""
    moved = x.reshape(len(x), *shape).movedim([dim + 1 for dim in dims], [*range(-len(dims), 0)])
    return moved.reshape(len(x), *out, -1)


def pooling_windows(
    x: Tensor, side: tuple[int, int], out: tuple[int, ...], settings: Mapping[str, Any]
) -> Tensor:
    """Return the windows (n, *out, size) of images, whose last dimensions are `side`, with zeros for padding.
    `settings` are those of `torch.nn.functional.unfold`.
    """
    images = x.reshape(len(x), -1, *side)
    unfolded: Tensor = F.unfold(images, **settings)
    size = math.prod(settings["kernel_size"])
    return unfolded.view(len(x), images.shape[1], size, -1).movedim(2, -1).reshape(len(x), *out, size)


_JOINT = 2**16
"""largest number of single products of one example up to which their exact ranges are added"""


@dataclass(frozen=True, eq=False)
class Product:
    """Sums of products of two values: z = einsum(`equation`, u, v), for one example. No value has a letter that is
    only its own.

    With centres c and radii r of the bounds of u and v, each product is bounded by planes (McCormick, "Computability of
    global solutions to factorable nonconvex programs", 1976), for any s and t in [-1, 1]:

    u v >= (c_v + s r_v) u + (c_u + s r_u) v - c_u c_v - r_u r_v - s (c_u r_v + c_v r_u),
    u v <= (c_v + t r_v) u + (c_u - t r_u) v - c_u c_v + r_u r_v - t (c_u r_v - c_v r_u).

    With 0, both have the same slopes, so that a substitution is one matrix product for each factor. If one factor is
    known to be nonnegative, such as the weights of attention, tighter bounds follow from planes whose slope in the
    other factor is its smallest value: u v = l v + (u - l) v, where u - l is nonnegative.
    """

    equation: str
    nonnegative: int | None = None
    """the factor, 0 or 1, that is known to be nonnegative"""
    largest: float = math.inf
    """largest magnitude of a result, where it is known otherwise"""

    def __call__(self, *x: Tensor) -> Tensor:
        """Return the sums."""
        first, second, out = letters(self.equation)
        y: Tensor = torch.einsum(f"N{first},N{second}->N{out}", x[0], x[1])
        return y

    @property
    def usual(self) -> tuple[float, float]:
        """The numbers s and t of the planes that are used without a choice."""
        return {None: (0.0, 0.0), 0: (-1.0, 1.0), 1: (-1.0, -1.0)}[self.nonnegative]

    @property
    def joint(self) -> str:
        """Letters of a single product."""
        first, second, _ = letters(self.equation)
        return first + "".join(each for each in second if each not in first)

    def joint_shape(self, shapes: Sequence[torch.Size]) -> torch.Size:
        """Return the shape of all single products, for factors of the given shapes."""
        sizes = self._sizes(shapes)
        return torch.Size(sizes[each] for each in self.joint)

    def _sizes(self, shapes: Sequence[torch.Size]) -> dict[str, int]:
        first, second, _ = letters(self.equation)
        return {**dict(zip(first, shapes[0], strict=True)), **dict(zip(second, shapes[1], strict=True))}

    def terms(self, shapes: Sequence[torch.Size]) -> tuple[int, int]:
        """Return the number of products that are added for one result, and the sum of those that are added in a
        substitution, for one coefficient of each factor and for the constant.
        """
        sizes = self._sizes(shapes)
        total = math.prod(sizes.values())
        each = [math.prod(sizes[name] for name in kept) for kept in letters(self.equation)]
        constant = min(each) if self.nonnegative is None else each[self.nonnegative]
        return total // each[2], 2 * (total // each[0] + total // each[1]) + constant

    def interval(self, *x: Interval) -> Interval:
        """Return bounds of the sums, without the rounding error: the exact ranges of all products are added if they are
        few, and otherwise bounds from centres and radii.
        """
        (low, high), (low_2, high_2) = x
        shapes = low.shape[1:], low_2.shape[1:]
        first, second, out = letters(self.equation)
        if self.joint_shape(shapes).numel() > _JOINT:
            centre, radius, centre_2, radius_2 = *_centred((low, high)), *_centred((low_2, high_2))
            middle = self(centre, centre_2)
            spread = self(centre.abs() + radius, radius_2) + self(radius, centre_2.abs())
            return middle - spread, middle + spread
        u, v = (
            [self._placed(each, own) for each in ends] for ends, own in zip(x, (first, second), strict=True)
        )
        products = [one * other for one in u for other in v]
        least = torch.minimum(torch.minimum(*products[:2]), torch.minimum(*products[2:]))
        most = torch.maximum(torch.maximum(*products[:2]), torch.maximum(*products[2:]))
        summed = [1 + i for i, each in enumerate(self.joint) if each not in out]
        if summed:
            least, most = least.sum(summed), most.sum(summed)
        left = "".join(each for each in self.joint if each in out)
        order = [0, *(1 + left.index(each) for each in out)]
        least, most = least.permute(order), most.permute(order)
        if self.largest < math.inf:
            least, most = least.clamp(-self.largest, self.largest), most.clamp(-self.largest, self.largest)
        return least, most

    def _placed(self, x: Tensor, own: str) -> Tensor:
        """A factor with one dimension for each letter of a single product."""
        order = sorted(range(len(own)), key=lambda i: self.joint.index(own[i]))
        shape = [x.shape[1 + own.index(each)] if each in own else 1 for each in self.joint]
        return x.permute(0, *(1 + i for i in order)).reshape(len(x), *shape)

    def magnitude_bound(self, *x: Tensor) -> Tensor:
        """Return the sums for magnitudes of the factors; they bound rounding errors."""
        return self(*x)

    def planes(self, u: Interval, v: Interval) -> "Planes":
        """Return what the planes of all products depend on, for the bounds of both factors."""
        centre, radius, centre_2, radius_2 = *_centred(u), *_centred(v)
        return Planes(centre, radius, centre_2, radius_2, self(centre, centre_2), self(radius, radius_2))

    def transposed(
        self, a: Tensor, planes: "Planes", choice: tuple[Tensor, Tensor] | None = None
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Return the coefficients with respect to both factors of lower bounds of linear functions with the
        coefficients `a` (n, k, *shape), and the constants (n, k). `choice` are s and t (n, *joint shape) of each
        product.
        """
        first, second, out = letters(self.equation)
        if choice is None and self.nonnegative is not None:
            return self._from_least(a, planes)
        back = self._moved(a, planes.centre_2, out, second, first)
        back_2 = self._moved(a, planes.centre, out, first, second)
        # of three equal sums, the one with the fewest terms
        sums = (a, planes.product), (back, planes.centre), (back_2, planes.centre_2)
        few, values = min(sums, key=lambda each: each[1][0].numel())
        constant = -weighted(few, values) - weighted(a.abs(), planes.spread)
        if choice is None:
            return (back, back_2), constant
        joint = self.joint
        u, r_u = self._placed(planes.centre, first), self._placed(planes.radius, first)
        v, r_v = self._placed(planes.centre_2, second), self._placed(planes.radius_2, second)
        for part, (own, sign) in zip(
            (a.clamp(min=0), a.clamp(max=0)), zip(choice, (1, -1), strict=True), strict=True
        ):
            back = back + self._moved(part, own * r_v, out, joint, first)
            back_2 = back_2 + self._moved(part, sign * own * r_u, out, joint, second)
            offset = torch.einsum(f"N{joint}->N{out}", own * (u * r_v + sign * v * r_u))
            constant = constant - weighted(part, offset)
        return (back, back_2), constant

    def gaps(self, a: Tensor, planes: "Planes") -> tuple[Tensor, Tensor]:
        """Return the distances of the planes from the products in the middle, for nonnegative coefficients (n, *shape),
        summed over the products of each element of both factors.
        """
        first, second, out = letters(self.equation)
        return (
            self._moved(a[:, None], planes.radius_2, out, second, first)[:, 0] * planes.radius,
            self._moved(a[:, None], planes.radius, out, first, second)[:, 0] * planes.radius_2,
        )

    def _from_least(self, a: Tensor, planes: "Planes") -> tuple[tuple[Tensor, Tensor], Tensor]:
        """The coefficients and constants for u v = l v + (u - l) v, with the smallest value l of the nonnegative factor
        u, and bounds of the other factor v in the second product.
        """
        first, second, out = letters(self.equation)
        parts = (planes.centre, planes.radius, first), (planes.centre_2, planes.radius_2, second)
        (centre, radius, own), (centre_2, radius_2, other) = parts[:: -1 if self.nonnegative else 1]
        least = centre - radius
        back = self._moved(a, centre_2, out, other, own) - self._moved(a.abs(), radius_2, out, other, own)
        back_2 = self._moved(a, least, out, own, other)
        both = (back_2, back) if self.nonnegative else (back, back_2)
        return both, -weighted(back, least)

    def _moved(self, a: Tensor, slopes: Tensor, out: str, own: str, to: str) -> Tensor:
        if to == out == self.joint:
            return a * self._placed(slopes, own)[:, None]
        return torch.einsum(f"NR{out},N{own}->NR{to}", a, slopes)


class Planes(NamedTuple):
    """What the planes of the products of two values depend on."""

    centre: Tensor
    """centres (n, *shape) of the bounds of the first factor"""
    radius: Tensor
    centre_2: Tensor
    """centres (n, *shape) of the bounds of the second factor"""
    radius_2: Tensor
    product: Tensor
    """sums of the products of the centres (n, *out)"""
    spread: Tensor
    """sums of the products of the radii (n, *out)"""


def _centred(x: Interval) -> Interval:
    """Centres and radii of intervals. With the rounded centre, the radius is rounded up."""
    low, high = x
    centre = (low + high) / 2
    return centre, torch.maximum(high - centre, centre - low) * (1 + 4 * torch.finfo(low.dtype).eps)


def weighted(rows: Tensor, values: Tensor) -> Tensor:
    """Return the sums (n, k) of the products of rows (n or 1, k, *shape) with values (n, *shape)."""
    flat, entries = values.flatten(1), rows.flatten(2)
    if len(entries) == 1:
        return flat @ entries[0].t()
    # a product of matrices of one row is many times faster than one of matrices of one column
    return (flat[:, None] @ entries.transpose(1, 2))[:, 0]
