"""Blur corruptions of images in [0, 1], and the filters, zooms and warps of the common corruptions."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.core.draws import Draws
from holdfast.core.types import Ids, Inputs, PerExample
from holdfast.corruptions.constants import Constants

Edge = Literal["edge", "mirror", "symmetric"]
"""continuation of an image beyond its border: `aaa|abc`, `cb|abc` or `cba|abc`"""


def wrapped_positions(index: Tensor, size: int, edge: Edge) -> Tensor:
    """Map pixel positions that may lie outside an image to positions inside it, from 0 to `size` - 1, according to the
    padding mode `edge`.
    """
    if edge == "edge":
        return index.clamp(0, size - 1)
    last = 2 * size - 1 if edge == "symmetric" else 2 * size - 2
    index = index % max(last + (edge == "symmetric"), 1)
    return torch.minimum(index, last - index).clamp_min(0)


def along(x: Inputs, rows: Tensor, columns: Tensor) -> Tensor:
    """Apply the matrix `rows` along the height of each image and the matrix `columns` along its width, as separable
    filters require.
    """
    mapped: Tensor = rows @ x @ columns.T
    return mapped


def gaussian_kernel(x: Inputs, sigma: float, *, edge: Edge = "edge", reach: float = 4.0) -> Inputs:
    """Blur the images with a Gaussian of standard deviation `sigma`, whose kernel ends at `reach` times `sigma`."""
    radius = int(reach * sigma + 0.5)
    if radius == 0:
        return x
    offsets = torch.arange(-radius, radius + 1, device=x.device)
    taps = torch.exp(-0.5 * (offsets.to(x) / sigma) ** 2)
    taps = taps / taps.sum()

    def blurs(size: int) -> Tensor:
        """Return the matrix that blurs a line of `size` pixels."""
        ends = wrapped_positions(torch.arange(size, device=x.device)[:, None] + offsets, size, edge)
        return x.new_zeros(size, size).scatter_add_(1, ends, taps.expand(size, -1))

    return along(x, blurs(x.shape[2]), blurs(x.shape[3]))


def filtered(x: Inputs, kernel: Tensor, edge: Edge = "mirror") -> Inputs:
    """Return the images filtered with a kernel: the correlation of every channel with `kernel`, whose sides are odd."""
    n, channels, height, width = x.shape
    above, left = kernel.shape[0] // 2, kernel.shape[1] // 2
    rows = wrapped_positions(torch.arange(-above, height + above, device=x.device), height, edge)
    columns = wrapped_positions(torch.arange(-left, width + left, device=x.device), width, edge)
    padded = x[:, :, rows][:, :, :, columns].reshape(n * channels, 1, len(rows), len(columns))
    return F.conv2d(padded, kernel.to(x)[None, None]).view(x.shape)


def disk(radius: float, alias: float) -> Tensor:
    """Return a filter kernel in the form of a disk, with sum one. Its edge is smoothed by a Gaussian with standard
    deviation `alias` over 3 or 5 pixels.
    """
    half, soft = (8, 1) if radius <= 8 else (math.floor(radius), 2)
    line = torch.arange(-half, half + 1, dtype=torch.float64)
    inside = (line[:, None] ** 2 + line**2 <= radius**2).double()
    taps = torch.exp(-0.5 * (torch.arange(-soft, soft + 1).double() / alias) ** 2)
    taps = taps / taps.sum()
    return filtered((inside / inside.sum())[None, None], taps[:, None] * taps)[0, 0]


def zoomed(x: Inputs, factor: float) -> Inputs:
    """Return the centre of each image, enlarged by `factor` to the size of the whole image with bilinear
    interpolation.
    """
    size = x.shape[2:]
    cut = [math.ceil(side / factor) for side in size]
    top, left = ((side - short) // 2 for side, short in zip(size, cut, strict=True))
    middle = x[:, :, top : top + cut[0], left : left + cut[1]]
    enlarged_size = [round(short * factor) for short in cut]
    middle = F.interpolate(middle, size=enlarged_size, mode="bilinear", align_corners=True)
    top, left = ((side - short) // 2 for side, short in zip(enlarged_size, size, strict=True))
    return middle[:, :, top : top + size[0], left : left + size[1]]


def motion_blurred(x: Inputs, radius: float, sigma: float, *, degrees: PerExample) -> Inputs:
    """Apply motion blur along an angle in degrees for each image. The kernel is half a Gaussian with standard deviation
    `sigma`, over 2 `radius` + 1 pixels.
    """
    width, angle = 2 * math.ceil(radius) + 1, torch.deg2rad(degrees.double())
    taps = torch.exp(-0.5 * (torch.arange(width).double() / sigma) ** 2)
    rows, columns = (torch.arange(side, device=x.device) for side in x.shape[2:])
    image = torch.arange(len(x), device=x.device)[:, None, None]
    total = torch.zeros_like(x)
    for step, share in enumerate((taps / taps.sum()).tolist()):
        down, right = (
            torch.ceil(step * component - 0.5).long()[:, None] for component in (angle.sin(), angle.cos())
        )
        row, column = (
            wrapped_positions(rows + down, len(rows), "edge"),
            wrapped_positions(columns + right, len(columns), "edge"),
        )
        total += share * x[image, :, row[:, :, None], column[:, None, :]].movedim(3, 1)
    return total


def sampled(x: Inputs, row: Tensor, column: Tensor, edge: Edge) -> Inputs:
    """Return images whose pixels are read from `x` at the fractional positions `row` and `column` (n, height, width),
    with bilinear interpolation.
    """
    height, width = x.shape[2:]
    image = torch.arange(len(x), device=x.device)[:, None, None]
    top, left = row.floor(), column.floor()
    down, right = (row - top)[:, None].to(x), (column - left)[:, None].to(x)

    def at(below: int, beside: int) -> Inputs:
        i, j = (
            wrapped_positions(top.long() + below, height, edge),
            wrapped_positions(left.long() + beside, width, edge),
        )
        return x[image, :, i, j].movedim(3, 1)

    upper = (1 - right) * at(0, 0) + right * at(0, 1)
    return (1 - down) * upper + down * ((1 - right) * at(1, 0) + right * at(1, 1))


def clamped(x: Inputs) -> Inputs:
    """Return the images with all values clipped to [0, 1]."""
    return x.clamp(0, 1)


def gaussian_blur(x: Inputs, c: Constants, ids: Ids, rng: Draws) -> Inputs:
    """Apply the corruption Gaussian blur, with a Gaussian whose standard deviation is `c[0]` pixels."""
    return clamped(gaussian_kernel(x, c[0]))


def defocus_blur(x: Inputs, c: Constants, ids: Ids, rng: Draws) -> Inputs:
    """Blur the images like a lens out of focus: each value becomes the mean over a disk with radius `c[0]` in pixels,
    whose edge is smoothed by a Gaussian with standard deviation `c[1]`.
    """
    return clamped(filtered(x, disk(*c)))


def motion_blur(x: Inputs, c: Constants, ids: Ids, rng: Draws) -> Inputs:
    """Blur the images along a random line within 45 degrees of the horizontal, as from a moving camera. The kernel is
    half a Gaussian with radius `c[0]` and standard deviation `c[1]`, in pixels.
    """
    radius, sigma = c
    return clamped(
        motion_blurred(x, radius, sigma, degrees=90 * rng.at("angle").uniform(ids, dtype=torch.float64) - 45)
    )


def zoom_blur(x: Inputs, c: Constants, ids: Ids, rng: Draws) -> Inputs:
    """Blur the images as by zooming: return the mean of each image and its enlargements by the factors 1 + `c[1]`, 1 +
    2 `c[1]` and so on, below `c[0]`.
    """
    last, step = c
    # the spacing of `numpy.arange` in the published code, with its rounding
    n_zooms, spacing = math.ceil((last - 1) / step), (1 + step) - 1
    total = x.clone()
    for k in range(n_zooms):
        total += zoomed(x, 1 + k * spacing)
    return clamped(total / (n_zooms + 1))


def glass_blur(x: Inputs, c: Constants, ids: Ids, rng: Draws) -> Inputs:
    """Blur the images as through frosted glass: after a Gaussian blur, each pixel gets the value of a random nearby
    pixel in several rounds, and the result is blurred again.

    `c` contains the standard deviation, the largest distance in pixels and the number of rounds. Pixels are processed
    one after the other from the last one; each copies the value of another pixel, which does not change. The published
    code intends a swap, but overwrites the first pixel before it is read.
    """
    sigma, reach, rounds = c[0], int(c[1]), int(c[2])
    flat = gaussian_kernel(x, sigma).flatten(2)
    for turn in range(rounds):
        source = _scattered(x, reach, ids, rng.at("round", turn))
        flat = flat.gather(2, source[:, None].expand_as(flat))
    return clamped(gaussian_kernel(flat.view_as(x), sigma))


def _scattered(x: Inputs, reach: int, ids: Ids, rng: Draws) -> Tensor:
    """For each pixel (n, height * width), the index of the pixel whose value it gets in a round.

    If that pixel was processed before, its own source counts; such chains are resolved by pointer doubling.
    """
    height, width = x.shape[2:]
    pixel = torch.arange(height * width, device=x.device)
    row, column = pixel // width, pixel % width
    moves = (row > reach) & (row <= height - reach) & (column > reach) & (column <= width - reach)
    shift = rng.integers(ids, 2 * reach, 2, height * width) - reach
    source = (row + shift[:, 1]) * width + column + shift[:, 0]
    source = torch.where(moves, source, pixel)
    resolved = (source > pixel) & moves[source]
    # the second half of the indices stands for the pixels before the round
    ends = (pixel + len(pixel)).expand_as(source)
    follow = torch.cat((torch.where(resolved, source, source + len(pixel)), ends), dim=1)
    while True:
        further = follow.gather(1, follow)
        if torch.equal(further, follow):
            return follow[:, : len(pixel)] - len(pixel)
        follow = further
