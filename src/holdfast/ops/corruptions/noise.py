"""Noise: Gaussian, shot, impulse and speckle, of images in [0, 1]; results are clipped."""

import torch

from holdfast.core.draws import Draws
from holdfast.core.types import Ids, Inputs
from holdfast.ops.corruptions.constants import Constants
from holdfast.ops.corruptions.filters import clamped


def gaussian_noise(x: Inputs, c: Constants, ids: Ids, rng: Draws) -> Inputs:
    """Normal noise of standard deviation `c` on every value."""
    return clamped(x + c[0] * rng.normal(ids, *x.shape[1:], dtype=x.dtype))


def speckle_noise(x: Inputs, c: Constants, ids: Ids, rng: Draws) -> Inputs:
    """Normal noise in proportion to the value."""
    return clamped(x + c[0] * x * rng.normal(ids, *x.shape[1:], dtype=x.dtype))


def impulse_noise(x: Inputs, c: Constants, ids: Ids, rng: Draws) -> Inputs:
    """Set a share `c` of all values to 0 or 1 with equal probability."""
    hit = rng.at("hit").uniform(ids, *x.shape[1:], dtype=x.dtype) <= c[0]
    salt = (rng.at("salt").signs(ids, *x.shape[1:], dtype=x.dtype) + 1) / 2
    return torch.where(hit, salt, x)


def shot_noise(x: Inputs, c: Constants, ids: Ids, rng: Draws) -> Inputs:
    """Poisson noise: counts of photons, of which a value of 1 emits `c` on average, divided by `c`.

    The count is the quantile of a uniform random number: that of the normal distribution with a correction for
    skewness, then moved to the exact count.
    """
    mean = c[0] * x.double()
    u = rng.uniform(ids, *x.shape[1:], dtype=torch.float64).clamp(1e-16, 1 - 1e-16)
    z = torch.special.ndtri(u)
    count = (mean + mean.sqrt() * z + (z**2 - 1) / 6).floor().clamp_min(0)
    while (short := torch.special.gammaincc(count + 1, mean) < u).any():
        count += short
    while (far := (count > 0) & (torch.special.gammaincc(count.clamp_min(1), mean) >= u)).any():
        count -= far.double()
    return clamped((count / c[0]).to(x))
