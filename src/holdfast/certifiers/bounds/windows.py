"""Backward substitution for values of images, of which each depends on a small window of the values before.

The coefficients of a function are stored for its window alone, with the position of the window, as long as the window
is small. This is the idea of "patches" in Xu et al., NeurIPS 2020, arXiv:2002.12920.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.certifiers.bounds.graph import Graph, Node, Region, Relaxation, gamma
from holdfast.certifiers.bounds.operations import (
    Activation,
    Convolution,
    Lines,
    Nonnegative,
    ReLU,
    Scaled,
    Sum,
    summed_up,
)

_SMALL = 0.6
"""largest part of a value that a window may cover, so that it is cheaper than the whole value"""
_MATRIX, _MATRIX_FEW, _FEW = 2.0, 64.0, 8
"""largest ratio of the entries of a transposed convolution as a matrix to its nonzero ones, for which the product with
the matrix is used, for many and for few channels, and the number of channels that are few: a matrix is faster than the
convolution of many small windows, above all with few channels"""


class Frame(NamedTuple):
    """Position of windows on a value (channels, height, width).

    The windows belong to the places of a grid. That of the place (i, j) begins at row `top` + i * `down` and at column
    `left` + j * `right`, which may lie outside of the value.
    """

    top: int
    left: int
    down: int
    right: int
    height: int
    width: int

    def before(self, convolution: Convolution) -> "Frame":
        """Return the frame on the input of a convolution, for windows with this frame on its output."""
        (down, right), (above, ahead) = convolution.stride, convolution.padding
        kernel = convolution.weight.shape[2:]
        return Frame(
            self.top * down - above,
            self.left * right - ahead,
            self.down * down,
            self.right * right,
            (self.height - 1) * down + kernel[0],
            (self.width - 1) * right + kernel[1],
        )

    def exceeds(self, grid: tuple[int, int], shape: torch.Size) -> bool:
        """Return whether a window of the grid lies partly outside of a value."""
        bottom = self.top + (grid[0] - 1) * self.down + self.height
        end = self.left + (grid[1] - 1) * self.right + self.width
        return self.top < 0 or self.left < 0 or bottom > shape[1] or end > shape[2]


def _union(parts: Sequence[Frame | None]) -> Frame | None:
    """The smallest frame that contains all given ones; None if one is None, or if their distances differ."""
    known = [part for part in parts if part is not None]
    if len(known) < len(parts) or len({(part.down, part.right) for part in known}) > 1:
        return None
    top, left = min(part.top for part in known), min(part.left for part in known)
    bottom, end = max(part.top + part.height for part in known), max(part.left + part.width for part in known)
    return Frame(top, left, known[0].down, known[0].right, bottom - top, end - left)


def frames(graph: Graph, index: int, until: int) -> dict[int, Frame]:
    """Return the frames of the windows of all values before the value `index`, back to the value `until`, for functions
    that are single values of `index`.

    Values without a small window are left out: their coefficients are those of the whole value. What is before such
    a value is left out, too.
    """
    known: dict[int, Frame] = {}
    pending: dict[int, list[Frame | None]] = {index: [Frame(0, 0, 1, 1, 1, 1)]}
    for i in range(index, until - 1, -1):
        if i not in pending:
            continue
        frame, moved = _small(_union(pending.pop(i)), graph.shape_of(i)), None
        if i == until:
            return known if frame is None else {**known, i: frame}
        if frame is not None and (moved := _moved(graph, i, frame)) is not None:
            known[i] = frame
        for j in graph.node(i).inputs:
            pending.setdefault(j, []).append(moved)
    return known


def _small(frame: Frame | None, shape: torch.Size) -> Frame | None:
    """The frame, if it has windows on a value of the given shape that are cheaper than the whole value."""
    if frame is None or len(shape) != 3 or frame.height * frame.width > _SMALL * shape[1] * shape[2]:
        return None
    return frame


def _moved(graph: Graph, index: int, frame: Frame) -> Frame | None:
    """The frame on the inputs of an operation, or None if its windows are not known."""
    node = graph.node(index)
    operation, inner = node.operation, graph.shape_of(node.inputs[0])
    if (convolution := as_convolution(node, inner)) is not None:
        return frame.before(convolution)
    same = all(graph.shape_of(j) == node.shape for j in node.inputs)
    if isinstance(operation, Scaled):
        constants = (operation.scale, operation.offset)
        same = same and all(each is None or _per_channel(each, inner[0]) for each in constants)
    return frame if same and isinstance(operation, Scaled | Sum | Activation) else None


def _per_channel(constant: Tensor, channels: int) -> bool:
    """Whether a constant that broadcasts to (channels, height, width) is one number, or one for each channel."""
    shape = (*(1,) * (3 - constant.dim()), *constant.shape)
    return constant.numel() == 1 or shape == (channels, 1, 1)


def as_convolution(node: Node, shape: torch.Size) -> Convolution | None:
    """Return the convolution in two dimensions that an operation on a value of the given shape is, or None."""
    operation = node.operation
    if isinstance(operation, Convolution):
        plain = len(operation.stride) == 2 and operation.groups == 1
        return operation if plain and all(step == 1 for step in operation.dilation) else None
    if isinstance(operation, Nonnegative) and not operation.terms and len(node.inputs) == 1 == len(shape) - 2:
        return _selection(operation, shape)
    return None


@lru_cache(maxsize=64)
def _selection(operation: Nonnegative, shape: torch.Size) -> Convolution | None:
    """A selection of rows, columns and channels, such as a shortcut with a stride, as a convolution with a kernel of
    one value; None if an operation that moves values is no such selection.
    """
    # where each value comes from, counted from 1; 0 for padding
    numbers = torch.arange(1, shape.numel() + 1, dtype=torch.float64).view(1, *shape)
    source = operation(numbers)[0].long()
    filled = source > 0
    if source.dim() != 3 or not filled.any():
        return None
    channels, rows, columns = filled.nonzero().unbind(1)
    place = source[filled] - 1
    from_row, from_column = place % (shape[1] * shape[2]) // shape[2], place % shape[2]
    (down, top), (right, left) = _line(rows, from_row), _line(columns, from_column)
    if down < 1 or right < 1:
        return None
    weight = torch.zeros(source.shape[0], shape[0], 1, 1)
    weight[channels, place // (shape[1] * shape[2])] = 1.0
    convolution = Convolution(weight, None, (down, right), (-top, -left), (1, 1), 1)
    return convolution if _same(convolution, numbers, source) else None


def _line(to: Tensor, start: Tensor) -> tuple[int, int]:
    """The step and the start of a sequence of positions, from two of them."""
    first, last = int(to.argmin()), int(to.argmax())
    distance = int(to[last] - to[first])
    step = int(start[last] - start[first]) // distance if distance else 1
    return step, int(start[first] - step * to[first])


def _same(convolution: Convolution, numbers: Tensor, source: Tensor) -> bool:
    """Whether a convolution with one value in its kernel selects the given values, with zeros outside."""
    (down, right), (above, ahead) = convolution.stride, convolution.padding
    _, height, width = source.shape
    below = (height - 1) * down + 1 - above - numbers.shape[2]
    after = (width - 1) * right + 1 - ahead - numbers.shape[3]
    padded = F.pad(numbers, (ahead, after, above, below))[:, :, ::down, ::right]
    return bool((F.conv2d(padded, convolution.weight.double())[0].long() == source).all())


@dataclass(frozen=True, eq=False)
class Windows:
    """Linear functions with coefficients on windows of a value (channels, height, width)."""

    a: Tensor
    """coefficients (n, k, channels, h, w) of k functions for each example"""
    places: tuple[Tensor, Tensor]
    """row and column (n * k each) of the place in the grid to which the window of each function belongs"""
    grid: tuple[int, int]
    """numbers of rows and columns of the grid"""
    frame: Frame
    inside: bool = False
    """whether coefficients outside of the value are known to be zero"""
    channel: Tensor | None = None
    """index (n, k) of the only channel whose coefficients are not zero, if there is one"""

    @staticmethod
    def single(chosen: Tensor, signs: Tensor, shape: torch.Size) -> "Windows":
        """Return the functions that are single values, with indices (n, k), times signs (n, k), of a value of the given
        shape.
        """
        rows, columns = shape[1:]
        place = (chosen % (rows * columns)).flatten()
        channel = chosen // (rows * columns)
        a = torch.zeros(*chosen.shape, shape[0], dtype=signs.dtype, device=signs.device)
        a.scatter_(2, channel[:, :, None], signs[:, :, None])
        places, frame = (place // columns, place % columns), Frame(0, 0, 1, 1, 1, 1)
        return Windows(a[..., None, None], places, (rows, columns), frame, inside=True, channel=channel)

    @staticmethod
    def joined(parts: "list[Windows]", frame: Frame) -> "Windows":
        """Return the sums of functions whose windows lie in the frame."""
        first = parts[0]
        if len(parts) == 1:
            return first
        a = sum((part._in(frame) for part in parts[1:]), first._in(frame))
        inside = all(part.inside for part in parts)
        return replace(first, a=a, frame=frame, inside=inside, channel=None)

    def _in(self, frame: Frame) -> Tensor:
        before, above = self.frame.left - frame.left, self.frame.top - frame.top
        after = frame.width - self.frame.width - before
        return F.pad(self.a, (before, after, above, frame.height - self.frame.height - above))

    def gathered(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Return the windows (n, k, channels, h, w) of tensors (n, channels, height, width), with zeros outside."""
        joined = torch.cat(values, 1)
        n, k, channels, h, w = self.a.shape
        frame, (rows, columns) = self.frame, self.grid
        below = frame.top + (rows - 1) * frame.down + h - joined.shape[2]
        after = frame.left + (columns - 1) * frame.right + w - joined.shape[3]
        # negative widths crop
        padded = F.pad(joined, (-frame.left, after, -frame.top, below))
        windows = padded.unfold(2, h, frame.down).unfold(3, w, frame.right).permute(0, 2, 3, 1, 4, 5)
        examples = torch.arange(n, device=joined.device).repeat_interleave(k)
        if rows * columns <= k:  # to copy the windows of all places first makes their selection faster
            every = windows.reshape(n * rows * columns, -1)
            chosen = every.index_select(0, (examples * rows + self.places[0]) * columns + self.places[1])
        else:
            chosen = windows[examples, *self.places]
        return chosen.view(n, k, len(values), channels, h, w).unbind(2)

    def whole(self, shape: torch.Size) -> Tensor:
        """Return the coefficients (n, k, *shape) on the whole value."""
        n, k, channels, h, w = self.a.shape
        frame, (rows, columns), (_, height, width) = self.frame, self.grid, shape
        above, ahead = max(0, -frame.top), max(0, -frame.left)
        below = max(0, frame.top + (rows - 1) * frame.down + h - height)
        after = max(0, frame.left + (columns - 1) * frame.right + w - width)
        wide = ahead + width + after
        device = self.a.device
        row = (self.places[0] * frame.down + frame.top + above)[:, None] + torch.arange(h, device=device)
        column = (self.places[1] * frame.right + frame.left + ahead)[:, None] + torch.arange(w, device=device)
        entries = (row[:, :, None] * wide + column[:, None]).view(n, k, 1, h * w).expand(-1, -1, channels, -1)
        padded = self.a.new_zeros(n, k, channels, (above + height + below) * wide)
        padded = padded.scatter(3, entries, self.a.flatten(3)).view(n, k, channels, -1, wide)
        return padded[..., above : above + height, ahead : ahead + width].contiguous()

    def minimum(self, region: Region) -> Tensor:
        """Return the minima (n, k) of the functions over a region of values, reduced by their rounding errors."""
        a = self.a
        low, high = self.gathered(region.low, region.high)
        products = a * torch.where(a > 0, low, high)
        terms = a[0, 0, 0].numel() + a.shape[2]
        lower, rounding = _summed(products), 1.01 * gamma(terms + 4, a.dtype) * _summed(products.abs())
        if region.norm is not None:
            free = torch.ones_like(region.low) if region.free is None else region.free.to(region.low)
            inside, centre = self.gathered(free.expand_as(region.low), region.centre)
            rows = (a * inside).flatten(2)
            dual = rows.norm(dim=2) if region.norm == 2 else rows.abs().amax(2)
            products = a * centre
            in_ball = _summed(products) - region.radius * dual * (1 + gamma(rows.shape[2] + 4, a.dtype))
            in_ball = in_ball - 2 * gamma(terms + 4, a.dtype) * (
                _summed(products.abs()) + region.radius * dual
            )
            return torch.maximum(lower - rounding, in_ball)
        return lower - rounding


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sums (n, k) of products over windows (n, k, channels, h, w)."""
    return _summed(a * b)


def _summed(a: Tensor) -> Tensor:
    """Sums (n, k) over windows (n, k, channels, h, w), over positions and then over channels."""
    return a.flatten(3).sum(3).sum(2)


def step(relaxation: Relaxation, index: int, windows: Windows) -> tuple[list[Windows], Tensor, Tensor]:
    """Substitute an operation in functions of its output.

    Returns the functions of each input, the constants (n, k) that are added to them, and the rounding errors (n, k).
    The operation must be one with windows: its inputs are among `frames`, or become whole values.
    """
    node, n = relaxation.graph.node(index), len(windows.a)
    operation, inner = node.operation, relaxation.graph.shape_of(node.inputs[0])
    noise = relaxation.error_of(index).view(n, *node.shape)
    if isinstance(operation, Activation):
        moved, added, rounding = _activated(relaxation, index, operation, windows, noise)
        return [moved], added, rounding
    if windows.inside or not windows.frame.exceeds(windows.grid, node.shape):
        a, (noise,) = windows.a, windows.gathered(noise)
    else:  # entries outside of the value belong to the padding, which is zero
        noise, inside = windows.gathered(noise, torch.ones_like(noise))
        a = windows.a * inside
    rounding = _dot(a.abs(), noise)
    windows = replace(windows, a=a, inside=True)
    if isinstance(operation, Sum):
        return [windows, replace(windows, a=a * operation.factor)], torch.zeros_like(rounding), rounding
    added = torch.zeros_like(rounding)
    if isinstance(operation, Scaled):
        if operation.offset is not None:
            added = (summed_up(a, 3) * operation.offset.flatten()).sum(2)
        scaled = a if operation.scale is None else a * operation.scale.reshape(-1, 1, 1)
        return [replace(windows, a=scaled)], added, rounding
    convolution = as_convolution(node, inner)
    assert convolution is not None
    if convolution.bias is not None:
        added = summed_up(a, 3) @ convolution.bias
    if windows.channel is None:
        back = _transposed(convolution, a)
    else:
        factor = a[..., 0, 0].gather(2, windows.channel[:, :, None])
        back = convolution.weight.to(a)[windows.channel] * factor[..., None, None]
    frame = windows.frame.before(convolution)
    moved = replace(windows, a=back, frame=frame, inside=False, channel=None)
    return [moved], added, rounding


def _activated(
    relaxation: Relaxation, index: int, operation: Activation, windows: Windows, noise: Tensor
) -> tuple[Windows, Tensor, Tensor]:
    lines = relaxation.lines_of(index)
    assert isinstance(lines, Lines)
    a, negative = windows.a, windows.a.clamp(max=0)
    steeper = lines.upper_slope - lines.lower_slope
    slopes, steeper, offset, noise = windows.gathered(lines.lower_slope, steeper, lines.upper_offset, noise)
    added = _dot(negative, offset)
    if not isinstance(operation, ReLU):  # its lower bound has no offset
        (offset,) = windows.gathered(lines.lower_offset)
        added = added + _dot(a - negative, offset)
    # the slopes are zero outside of the value
    moved = replace(windows, a=torch.addcmul(a * slopes, negative, steeper), inside=True)
    return moved, added, _dot(a.abs(), noise)


def _transposed(operation: Convolution, a: Tensor) -> Tensor:
    """The transposed convolution of windows, without padding."""
    h, w = a.shape[3:]
    weight = operation.weight.to(a)
    outer, inner, *kernel = weight.shape
    size = [
        (length - 1) * stride + width
        for length, stride, width in zip((h, w), operation.stride, kernel, strict=True)
    ]
    entries, nonzero = size[0] * size[1], kernel[0] * kernel[1]
    if entries > (_MATRIX_FEW if inner < _FEW else _MATRIX) * nonzero:
        back = F.conv_transpose2d(a.flatten(0, 1), weight, stride=operation.stride)
        return back.view(*a.shape[:2], *back.shape[1:])
    one = torch.eye(outer * h * w, dtype=a.dtype, device=a.device).view(-1, outer, h, w)
    matrix = F.conv_transpose2d(one, weight, stride=operation.stride).flatten(1)
    return (a.flatten(2) @ matrix).view(*a.shape[:2], inner, *size)
