"""Blur corruptions of images in [0, 1]: defocus, glass, motion, zoom and Gaussian."""

import math

import torch
from torch import Tensor

from holdfast.core.draws import Draws
from holdfast.core.types import Ids, Inputs
from holdfast.corruptions.constants import Constants
from holdfast.corruptions.filters import clamped, disk, filtered, gaussian_kernel, motion_blurred, zoomed


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
