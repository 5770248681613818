"""Weather: snow, frost and fog, on images in [0, 1]."""

import torch
from torch import Tensor

from holdfast.core.draws import Draws
from holdfast.core.types import Ids, Inputs
from holdfast.ops.corruptions.colour import grey, paint
from holdfast.ops.corruptions.constants import Constants
from holdfast.ops.corruptions.filters import clamped, moved, zoomed

_ICE = (0.57, 0.66, 0.70)
_ICE_SPREAD = 0.11


def snow(x: Inputs, c: Constants, ids: Ids, rng: Draws) -> Inputs:
    """Flakes of zoomed normal noise above a threshold, with motion blur, added to a whitened image."""
    mean, spread, factor, threshold, radius, sigma, kept = c
    flakes = mean + spread * rng.at("flakes").normal(ids, 1, *x.shape[2:], dtype=x.dtype)
    flakes = zoomed(flakes, factor)
    flakes = clamped(torch.where(flakes < threshold, 0, flakes))
    flakes = moved(
        flakes, radius, sigma, degrees=90 * rng.at("angle").uniform(ids, dtype=torch.float64) - 135
    )
    white = torch.maximum(x, 1.5 * grey(x) + 0.5)
    return clamped(kept * x + (1 - kept) * white + flakes + flakes.flip(2, 3))


def fog(x: Inputs, c: Constants, ids: Ids, rng: Draws) -> Inputs:
    """Add a plasma fractal times an amount, and scale the result back to the brightest value."""
    amount, decay = c
    brightest = x.amax((1, 2, 3), keepdim=True)
    thick = x + amount * plasma(x, decay, ids, rng)
    return clamped(thick * brightest / (brightest + amount))


def frost(x: Inputs, c: Constants, ids: Ids, rng: Draws) -> Inputs:
    """A weighted sum of the image and ice crystals.

    The published code crops photographs of frost; these crystals are the ridges of two plasma fractals and needles in
    three directions, with approximately the colour and contrast of those photographs.
    """
    kept, iced = c
    coarse, fine = (
        1 - (2 * plasma(x, decay, ids, rng.at("ridges", i)) - 1).abs() for i, decay in enumerate((2.0, 1.5))
    )
    seeds = (rng.at("seeds").uniform(ids, 1, *x.shape[2:], dtype=x.dtype) > 0.97).to(x)
    first = 180 * rng.at("angle").uniform(ids, dtype=torch.float64)
    needles = sum(
        moved(seeds, min(x.shape[2:]) / 8, min(x.shape[2:]) / 12, degrees=first + turn)
        for turn in (0, 60, 120)
    )
    ice = coarse**2 + fine**2 + 4 * needles
    ice = (ice - ice.mean((2, 3), keepdim=True)) / ice.std((2, 3), correction=0, keepdim=True).clamp_min(1e-6)
    return clamped(kept * x + iced * clamped(paint(*_ICE, x) + _ICE_SPREAD * ice))


def plasma(x: Inputs, decay: float, ids: Ids, rng: Draws) -> Tensor:
    """Clouds (n, 1, height, width) from 0 to 1 by the diamond-square algorithm, on a torus of the next power of two."""
    side = max(2, 1 << (max(x.shape[2:]) - 1).bit_length())
    field, step, size = x.new_zeros(len(x), side, side), side, 100.0
    while step >= 2:
        half, k = step // 2, side // step

        def around(total: Tensor, place: str, k: int = k, size: float = size, step: int = step) -> Tensor:
            u = rng.at(place, step).uniform(ids, k, k, dtype=x.dtype)
            return total / 4 + size**2 * (2 * u - 1)

        corners = field[:, ::step, ::step].clone()
        squares = corners + corners.roll(-1, 1)
        middles = around(squares + squares.roll(-1, 2), "middle")
        across = middles + middles.roll(1, 1) + corners + corners.roll(-1, 2)
        down = middles + middles.roll(1, 2) + corners + corners.roll(-1, 1)
        field[:, half::step, half::step] = middles
        field[:, ::step, half::step] = around(across, "across")
        field[:, half::step, ::step] = around(down, "down")
        step, size = half, size / decay
    field = field - field.amin((1, 2), keepdim=True)
    field = field / field.amax((1, 2), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    return field[:, None, : x.shape[2], : x.shape[3]]
