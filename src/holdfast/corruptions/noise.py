"""Noise corruptions of images in [0, 1]: Gaussian, shot, impulse and speckle. Results are clipped to [0, 1]."""

import torch

from holdfast.core.draws import Draws
from holdfast.core.types import Ids, Inputs
from holdfast.corruptions.constants import Constants
from holdfast.corruptions.filters import clamped


def gaussian_noise(x: Inputs, c: Constants, ids: Ids, rng: Draws) -> Inputs:
    """Add normal noise with standard deviation `c[0]` to every value of the images."""
    return clamped(x + c[0] * rng.normal(ids, *x.shape[1:], dtype=x.dtype))


def speckle_noise(x: Inputs, c: Constants, ids: Ids, rng: Draws) -> Inputs:
    """Add normal noise to every value of the images, with a standard deviation of `c[0]` times the value."""
    return clamped(x + c[0] * x * rng.normal(ids, *x.shape[1:], dtype=x.dtype))


def impulse_noise(x: Inputs, c: Constants, ids: Ids, rng: Draws) -> Inputs:
    """Replace each value of the images with probability `c[0]` by 0 or 1, which are equally likely."""
    hit = rng.at("hit").uniform(ids, *x.shape[1:], dtype=x.dtype) <= c[0]
    salt = (rng.at("salt").signs(ids, *x.shape[1:], dtype=x.dtype) + 1) / 2
    return torch.where(hit, salt, x)


def shot_noise(x: Inputs, c: Constants, ids: Ids, rng: Draws) -> Inputs:
    """Replace each value of the images by a Poisson random number with mean `c[0]` times the value, divided by `c[0]`,
    as when photons are counted.

    The count is the quantile of a uniform random number: that of the normal distribution with a correction for
    skewness, then moved to the exact count.
    """
    mean = c[0] * x.double()
    # the normal quantile is infinite at 0 and 1
    u = rng.uniform(ids, *x.shape[1:], dtype=torch.float64).clamp(1e-16, 1 - 1e-16)
    z = torch.special.ndtri(u)
    count = (mean + mean.sqrt() * z + (z**2 - 1) / 6).floor().clamp_min(0)
    while (too_low := torch.special.gammaincc(count + 1, mean) < u).any():
        count += too_low
    while (too_high := (count > 0) & (torch.special.gammaincc(count.clamp_min(1), mean) >= u)).any():
        count -= too_high.double()
    return clamped((count / c[0]).to(x))
