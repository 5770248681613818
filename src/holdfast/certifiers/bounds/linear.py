"""Linear operations of a traced network, with their interval bounds and their transposes.

All operations act on batches: tensors (n, *shape). Coefficients of linear functions are tensors (n, k, *shape): k
functions for each example.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
