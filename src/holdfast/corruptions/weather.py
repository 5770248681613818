"""Weather corruptions of images in [0, 1]: snow, frost, fog, and spatter (drops of water or mud on the lens)."""

import torch
from torch import Tensor

from holdfast.core.draws import Draws
from holdfast.core.types import Ids, Inputs
from holdfast.corruptions.blur import (
    clamped,
    filtered,
    gaussian_kernel,
    motion_blurred,
    wrapped_positions,
    zoomed,
)
from holdfast.corruptions.constants import Constants
from holdfast.corruptions.noise import grey, paint

_WATER = (175 / 255, 238 / 255, 238 / 255)  # pale turquoise, as in the published code
_MUD = (63 / 255, 42 / 255, 20 / 255)  # brown, as in the published code
_FAR = 20.0
"""distance in pixels from the edge of a drop at which it has its full depth"""
_RELIEF = ((-2, -1, 0), (-1, 1, 1), (0, 1, 2))  # emboss filter, as in the published code
_LOW, _HIGH = 50, 150
"""thresholds of the gradient that continues an edge and of the one that starts it"""
_KNIGHT = 2.1969
"""length of the step (1, 2) in Borgefors' distance for neighbourhoods of 5 x 5; (1, 1) is 1.4"""


def spatter(x: Inputs, c: Constants, ids: Ids, rng: Draws) -> Inputs:
    """Add drops of water or mud to the images. The drops are where smooth normal noise exceeds a threshold; water has
    bright edges.
    """
    mean, spread, smooth, threshold, strength, mud = c
    liquid = mean + spread * rng.normal(ids, 1, *x.shape[2:], dtype=x.dtype)
    liquid = gaussian_kernel(liquid, smooth)
    if mud:
        cover = gaussian_kernel((liquid > threshold).to(x), strength)
        cover = torch.where(cover < 0.8, 0, cover)
        return clamped(x * (1 - cover) + paint(*_MUD, x) * cover)
    drops = torch.where(liquid < threshold, 0, (255 * liquid).floor().clamp(0, 255))
    shine = drops * _relief(drops)
    shine = shine / shine.amax((1, 2, 3), keepdim=True).clamp_min(1)
    return clamped(x + strength * shine * paint(*_WATER, x))


def _relief(drops: Inputs) -> Inputs:
    """Highlights of the drops: their depth after histogram equalisation, lit from one corner."""
    mean = drops.new_full((3, 3), 1.0)
    depth = (filtered(_distance(_rims(drops)), mean) / 9 + 1e-4).floor()
    lit = filtered(_equalised(depth), drops.new_tensor(_RELIEF)).clamp(0, 255)
    return (filtered(lit, mean) / 9).round()


def _shifted(x: Tensor, down: int, right: int, beyond: float) -> Tensor:
    """The value `down` rows and `right` columns from each pixel, `beyond` outside the image."""
    rows, columns = (torch.arange(side, device=x.device) for side in x.shape[2:])
    row, column = rows + down, columns + right
    inside = ((row == wrapped_positions(row, len(rows), "edge"))[:, None]) & (
        column == wrapped_positions(column, len(columns), "edge")
    )
    values = x[:, :, wrapped_positions(row, len(rows), "edge")][
        :, :, :, wrapped_positions(column, len(columns), "edge")
    ]
    return torch.where(inside, values, beyond)


def _rims(drops: Inputs) -> Tensor:
    """Canny's edges as a mask: ridges of the gradient that exceed the upper threshold somewhere."""
    sobel = drops.new_tensor(((-1, 0, 1), (-2, 0, 2), (-1, 0, 1)))
    right, down = filtered(drops, sobel, "edge"), filtered(drops, sobel.T, "edge")
    steep = right.abs() + down.abs()

    def exceeds(below: int, beside: int, *, ties: bool) -> Tensor:
        neighbour = _shifted(steep, below, beside, 0.0)
        return steep >= neighbour if ties else steep > neighbour

    # the tangent of 22.5 degrees, as OpenCV's Canny rounds it
    flat = down.abs() < right.abs() * (13573 / 32768)
    upright = down.abs() > right.abs() * (2 + 13573 / 32768)
    rising = torch.where(
        right * down < 0,
        exceeds(-1, 1, ties=False) & exceeds(1, -1, ties=False),
        exceeds(-1, -1, ties=False) & exceeds(1, 1, ties=False),
    )
    ridge = torch.where(upright, exceeds(-1, 0, ties=False) & exceeds(1, 0, ties=True), rising)
    ridge = torch.where(flat, exceeds(0, -1, ties=False) & exceeds(0, 1, ties=True), ridge)
    weak, strong = ridge & (steep > _LOW), ridge & (steep > _HIGH)
    while True:
        grown = weak & (torch.max_pool2d(strong.to(drops), 3, stride=1, padding=1) > 0)
        if torch.equal(grown, strong):
            return strong
        strong = grown


def _distance(rims: Tensor) -> Inputs:
    """Distance to the nearest edge in steps of 1, 1.4 and knight's moves, at most `_FAR`."""
    away = torch.where(rims, 0.0, _FAR)
    steps = [
        (i, j) for i in range(-2, 3) for j in range(-2, 3) if abs(i) + abs(j) in (1, 3) or abs(i * j) == 1
    ]
    lengths = {1: 1.0, 2: 1.4, 3: _KNIGHT}
    while True:
        nearer = away
        for i, j in steps:
            nearer = torch.minimum(nearer, _shifted(nearer, i, j, _FAR) + lengths[abs(i) + abs(j)])
        if torch.equal(nearer, away):
            return away
        away = nearer


def _equalised(levels: Inputs) -> Inputs:
    """Histogram equalisation of levels 0 to 255; an image of a single level is unchanged."""
    flat = levels.flatten(1).long()
    counts = torch.zeros(len(flat), 256, dtype=torch.float64, device=flat.device)
    counts.scatter_add_(1, flat, torch.ones_like(flat, dtype=torch.float64))
    darkest = counts.gather(1, flat.amin(1, keepdim=True))
    share = (counts.cumsum(1) - darkest) / (flat.shape[1] - darkest).clamp_min(1)
    spread_out = (255 * share).round().gather(1, flat)
    return torch.where(darkest == flat.shape[1], flat.double(), spread_out).to(levels).view_as(levels)


_ICE = (0.57, 0.66, 0.70)  # approximate mean colour of the published photographs
_ICE_SPREAD = 0.11  # approximate standard deviation of their pixels


def snow(x: Inputs, c: Constants, ids: Ids, rng: Draws) -> Inputs:
    """Add snow to the images: they are whitened, and flakes are added, made from normal noise that is enlarged, cut off
    below a threshold and blurred along a direction.
    """
    mean, spread, factor, threshold, radius, sigma, image_weight = c
    flakes = mean + spread * rng.at("flakes").normal(ids, 1, *x.shape[2:], dtype=x.dtype)
    flakes = zoomed(flakes, factor)
    flakes = clamped(torch.where(flakes < threshold, 0, flakes))
    flakes = motion_blurred(
        flakes, radius, sigma, degrees=90 * rng.at("angle").uniform(ids, dtype=torch.float64) - 135
    )
    white = torch.maximum(x, 1.5 * grey(x) + 0.5)
    return clamped(image_weight * x + (1 - image_weight) * white + flakes + flakes.flip(2, 3))


def fog(x: Inputs, c: Constants, ids: Ids, rng: Draws) -> Inputs:
    """Add fog to the images: a fractal cloud pattern is added, and the result is scaled back to the brightest value of
    each image.
    """
    amount, decay = c
    brightest = x.amax((1, 2, 3), keepdim=True)
    thick = x + amount * plasma(x, decay, ids, rng)
    return clamped(thick * brightest / (brightest + amount))


def frost(x: Inputs, c: Constants, ids: Ids, rng: Draws) -> Inputs:
    """Add frost to the images: return a weighted sum of each image and a picture of ice crystals.

    The published code crops photographs of frost; these crystals are the ridges of two plasma fractals and needles in
    three directions, with approximately the colour and contrast of those photographs.
    """
    image_weight, ice_weight = c
    coarse, fine = (
        1 - (2 * plasma(x, decay, ids, rng.at("ridges", i)) - 1).abs() for i, decay in enumerate((2.0, 1.5))
    )
    seeds = (rng.at("seeds").uniform(ids, 1, *x.shape[2:], dtype=x.dtype) > 0.97).to(x)
    first = 180 * rng.at("angle").uniform(ids, dtype=torch.float64)
    needles = sum(
        motion_blurred(seeds, min(x.shape[2:]) / 8, min(x.shape[2:]) / 12, degrees=first + rotation)
        for rotation in (0, 60, 120)
    )
    ice = coarse**2 + fine**2 + 4 * needles
    ice = (ice - ice.mean((2, 3), keepdim=True)) / ice.std((2, 3), correction=0, keepdim=True).clamp_min(1e-6)
    return clamped(image_weight * x + ice_weight * clamped(paint(*_ICE, x) + _ICE_SPREAD * ice))


def plasma(x: Inputs, decay: float, ids: Ids, rng: Draws) -> Tensor:
    """Return random cloud patterns (n, 1, height, width) with values from 0 to 1, made by the diamond-square
    algorithm.
    """
    side = max(2, 1 << (max(x.shape[2:]) - 1).bit_length())
    field, step, size = x.new_zeros(len(x), side, side), side, 100.0
    while step >= 2:
        half, k = step // 2, side // step

        def displaced(total: Tensor, place: str, k: int = k, size: float = size, step: int = step) -> Tensor:
            u = rng.at(place, step).uniform(ids, k, k, dtype=x.dtype)
            return total / 4 + size**2 * (2 * u - 1)

        corners = field[:, ::step, ::step].clone()
        squares = corners + corners.roll(-1, 1)
        middles = displaced(squares + squares.roll(-1, 2), "middle")
        across = middles + middles.roll(1, 1) + corners + corners.roll(-1, 2)
        down = middles + middles.roll(1, 2) + corners + corners.roll(-1, 1)
        field[:, half::step, half::step] = middles
        field[:, ::step, half::step] = displaced(across, "across")
        field[:, half::step, ::step] = displaced(down, "down")
        step, size = half, size / decay
    field = field - field.amin((1, 2), keepdim=True)
    field = field / field.amax((1, 2), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    return field[:, None, : x.shape[2], : x.shape[3]]
