"""Backward substitution for values of convolutions, of which each depends on a small window of the image only.

The coefficients of a function are stored for its window alone, with the position of the window. This is the idea of
"patches" in Xu et al., NeurIPS 2020, arXiv:2002.12920.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.certifiers.graph import Graph, gamma
from holdfast.certifiers.linear import Convolution, Linear, Scaled
from holdfast.certifiers.nonlinear import Activation, Lines, ReLU
from holdfast.certifiers.region import Region
from holdfast.certifiers.relaxation import Relaxation

_SMALL = 0.6
"""largest part of a value that a window may cover, so that it is cheaper than the whole value"""
_DENSE = 64
"""largest ratio of the entries of a transposed convolution as a matrix to its nonzero ones, for which the product with
the matrix is used; it is faster than the convolution of many small windows"""


@dataclass(frozen=True, eq=False)
class _Windows:
    """Linear functions with coefficients on windows of a value (channels, height, width).

    The windows are at the places of a grid: the place (i, j) begins at row `top` + i * `down` and at column `left` +
    j * `right`, which may lie outside of the value.
    """

    a: Tensor
    """coefficients (n, k, channels, h, w) of k functions for each example"""
    places: Tensor
    """indices (n * k) of the windows among the places of all examples"""
    grid: tuple[int, int]
    top: int
    left: int
    down: int
    right: int

    def gathered(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Return the windows (n, k, channels, h, w) of tensors (n, channels, height, width), with zeros outside."""
        joined = torch.cat(values, 1)
        n, k, channels, h, w = self.a.shape
        height, width = joined.shape[2:]
        rows, columns = self.grid
        below = self.top + (rows - 1) * self.down + h - height
        after = self.left + (columns - 1) * self.right + w - width
        # negative widths crop
        padded = F.pad(joined, (-self.left, after, -self.top, below))
        windows = padded.unfold(2, h, self.down).unfold(3, w, self.right).permute(0, 2, 3, 1, 4, 5)
        chosen = windows.reshape(n * rows * columns, -1)[self.places].view(n, k, len(values), channels, h, w)
        return chosen.unbind(2)

    def moved(self, a: Tensor) -> "_Windows":
        """Return functions with the coefficients `a` on the same windows."""
        return replace(self, a=a)


def local(graph: Graph, index: int) -> bool:
    """Return whether a value is that of a convolution whose values depend on small windows of the input only."""
    size: tuple[int, int] | None = None
    if index == 0 or not isinstance(graph.node(index).operation, Convolution):
        return False
    while index:
        node = graph.node(index)
        operation, inner = node.operation, graph.shape_of(node.inputs[0])
        if len(node.inputs) != 1 or len(inner) != 3:
            return False
        if isinstance(operation, Convolution):
            if any(step != 1 for step in operation.dilation) or operation.groups != 1:
                return False
            before = (1, 1) if size is None else size
            kernel, stride = operation.weight.shape[2:], operation.stride
            size = ((before[0] - 1) * stride[0] + kernel[0], (before[1] - 1) * stride[1] + kernel[1])
            if size[0] * size[1] > _SMALL * inner[1] * inner[2]:
                return False
        elif isinstance(operation, Scaled):
            constants = (operation.scale, operation.offset)
            if any(each is not None and not _per_channel(each, inner[0]) for each in constants):
                return False
        elif not isinstance(operation, Activation):
            return False
        index = node.inputs[0]
    return True


def _per_channel(constant: Tensor, channels: int) -> bool:
    """Whether a constant that broadcasts to (channels, height, width) is one number, or one for each channel."""
    shape = (*(1,) * (3 - constant.dim()), *constant.shape)
    return constant.numel() == 1 or shape == (channels, 1, 1)


def window_bounds(relaxation: Relaxation, index: int, chosen: Tensor, signs: Tensor) -> Tensor:
    """Return lower bounds (n, k) of the chosen values of a convolution, times signs (n, k).

    `chosen` are indices (n, k) of values of the flattened output. `local` must be true for the value.
    """
    graph, node = relaxation.graph, relaxation.graph.node(index)
    operation = node.operation
    assert isinstance(operation, Convolution)
    n, rows, columns = len(chosen), *node.shape[1:]
    channel, place = chosen // (rows * columns), chosen % (rows * columns)
    examples = torch.arange(n, device=chosen.device)[:, None] * (rows * columns)
    windows = _Windows(
        operation.weight[channel] * signs[:, :, None, None, None],
        (examples + place).flatten(),
        (rows, columns),
        -operation.padding[0],
        -operation.padding[1],
        *operation.stride,
    )
    error = relaxation.error_of(index).gather(1, chosen)
    constant = torch.zeros_like(error)
    if operation.bias is not None:
        constant = operation.bias[channel] * signs
    at = node.inputs[0]
    while at:
        node = graph.node(at)
        noise = relaxation.error_of(at).view(n, *node.shape)
        if isinstance(node.operation, Activation):
            windows, added, rounding = _activated(relaxation, at, node.operation, windows, noise)
        else:
            assert isinstance(node.operation, Linear)
            windows, added, rounding = _linear(node.operation, windows, noise)
        constant, error = constant + added, error + rounding
        at = node.inputs[0]
    return _minimum(relaxation.region, windows) + constant - error * 1.01


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sums (n, k) of products over windows (n, k, channels, h, w)."""
    return (a * b).flatten(2).sum(2)


def _activated(
    relaxation: Relaxation, index: int, operation: Activation, windows: _Windows, noise: Tensor
) -> tuple[_Windows, Tensor, Tensor]:
    lines = relaxation.lines_of(index)
    assert isinstance(lines, Lines)
    a, negative = windows.a, windows.a.clamp(max=0)
    steeper = lines.upper_slope - lines.lower_slope
    slopes, steeper, offset, noise = windows.gathered(lines.lower_slope, steeper, lines.upper_offset, noise)
    added = _dot(negative, offset)
    if not isinstance(operation, ReLU):  # its lower bound has no offset
        (offset,) = windows.gathered(lines.lower_offset)
        added = added + _dot(a - negative, offset)
    return windows.moved(torch.addcmul(a * slopes, negative, steeper)), added, _dot(a.abs(), noise)


def _linear(operation: Linear, windows: _Windows, noise: Tensor) -> tuple[_Windows, Tensor, Tensor]:
    # entries outside of the value belong to the padding, which is zero
    noise, inside = windows.gathered(noise, torch.ones_like(noise))
    a = windows.a * inside
    rounding = _dot(a.abs(), noise)
    added = torch.zeros_like(rounding)
    if isinstance(operation, Scaled):
        if operation.offset is not None:
            added = (a * operation.offset.reshape(-1, 1, 1)).flatten(2).sum(2)
        return (
            windows.moved(a if operation.scale is None else a * operation.scale.reshape(-1, 1, 1)),
            added,
            rounding,
        )
    assert isinstance(operation, Convolution)
    if operation.bias is not None:
        added = a.flatten(3).sum(3) @ operation.bias
    (down, right), (above, before) = operation.stride, operation.padding
    moved = replace(
        windows,
        a=_transposed(operation, a),
        top=windows.top * down - above,
        left=windows.left * right - before,
        down=windows.down * down,
        right=windows.right * right,
    )
    return moved, added, rounding


def _transposed(operation: Convolution, a: Tensor) -> Tensor:
    """The transposed convolution of windows, without padding."""
    h, w = a.shape[3:]
    outer, inner, *kernel = operation.weight.shape
    size = [
        (length - 1) * step + width
        for length, step, width in zip((h, w), operation.stride, kernel, strict=True)
    ]
    entries, nonzero = size[0] * size[1], kernel[0] * kernel[1]
    if entries > _DENSE * nonzero:
        back = F.conv_transpose2d(a.flatten(0, 1), operation.weight, stride=operation.stride)
        return back.view(*a.shape[:2], *back.shape[1:])
    one = torch.eye(outer * h * w, dtype=a.dtype, device=a.device).view(-1, outer, h, w)
    matrix = F.conv_transpose2d(one, operation.weight, stride=operation.stride).flatten(1)
    return (a.flatten(2) @ matrix).view(*a.shape[:2], inner, *size)


def _minimum(region: Region, windows: _Windows) -> Tensor:
    """Minima of the functions over the region, reduced by their rounding errors."""
    a = windows.a
    middle, radius = windows.gathered((region.high + region.low) / 2, (region.high - region.low) / 2)
    sizes = a.abs()
    spread = _dot(sizes, radius)
    rounding = gamma(a[0, 0].numel() + 4, a.dtype) * (_dot(sizes, middle.abs()) + spread)
    lower = _dot(a, middle) - spread
    if region.norm is not None:
        inside, centre = windows.gathered(torch.ones_like(region.low), region.centre)
        rows = (a * inside).flatten(2)
        dual = rows.norm(dim=2) if region.norm == 2 else rows.abs().amax(2)
        in_ball = _dot(a, centre) - region.radius * dual * (1 + gamma(rows.shape[2] + 4, a.dtype))
        lower = torch.maximum(lower, in_ball) - rounding
    return lower - rounding
