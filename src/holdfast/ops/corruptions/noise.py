"""Noise: Gaussian, shot, impulse and speckle. Images lie in [0, 1]; what leaves it is cut."""

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
    """A share `c` of all values becomes 0 or 1, with equal chance."""
    hit = rng.at("hit").uniform(ids, *x.shape[1:], dtype=x.dtype) <= c[0]
    salt = (rng.at("salt").signs(ids, *x.shape[1:], dtype=x.dtype) + 1) / 2
    return torch.where(hit, salt, x)


def shot_noise(x: Inputs, c: Constants, ids: Ids, rng: Draws) -> Inputs:
    """Counts of photons where a value of 1 sends `c` of them: Poisson, over `c`.

    The quantile of a uniform draw: that of the normal, corrected for skewness, then walked to the exact count.
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
