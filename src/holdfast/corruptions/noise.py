"""Noise and colour corruptions of images in [0, 1]."""

import torch
from torch import Tensor

from holdfast.core.draws import Draws
from holdfast.core.types import Ids, Inputs
from holdfast.corruptions.blur import clamped
from holdfast.corruptions.constants import Constants


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


_GREY = (0.299, 0.587, 0.114)  # weights of red, green and blue in luma (ITU-R BT.601)


def grey(x: Inputs) -> Tensor:
    """Return the luminance of each pixel of an image, as (n, 1, height, width), with the weights of ITU-R BT.601."""
    if x.shape[1] == 1:
        return x
    return (x * x.new_tensor(_GREY)[:, None, None]).sum(1, keepdim=True)


def paint(red: float, green: float, blue: float, x: Inputs) -> Tensor:
    """Return a colour as a tensor that broadcasts with the images `x`. For grey images it is the luminance of the
    colour.
    """
    colour = x.new_tensor((red, green, blue))[:, None, None]
    return colour if x.shape[1] == 3 else grey(colour[None])[0]


def brightness(x: Inputs, c: Constants, ids: Ids, rng: Draws) -> Inputs:
    """Brighten the images: add `c[0]` to the value of each pixel in the colour space HSV (hue, saturation, value)."""
    value = x.amax(1, keepdim=True)
    brighter = (value + c[0]).clamp_max(1)
    return torch.where(value > 0, x * (brighter / value.clamp_min(torch.finfo(x.dtype).tiny)), brighter)


def saturate(x: Inputs, c: Constants, ids: Ids, rng: Draws) -> Inputs:
    """Change the saturation of the images: multiply it by `c[0]` and add `c[1]`. Pixels without a hue are treated as
    red, and grey images do not change.
    """
    if x.shape[1] == 1:
        return x
    value, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    tiny = torch.finfo(x.dtype).tiny
    strength = ((value - low) / value.clamp_min(tiny) * c[0] + c[1]).clamp(0, 1)
    depth = torch.where(value > low, (value - x) / (value - low).clamp_min(tiny), 1 - paint(1, 0, 0, x))
    return clamped(value * (1 - strength * depth))


def contrast(x: Inputs, c: Constants, ids: Ids, rng: Draws) -> Inputs:
    """Change the contrast of the images: multiply the difference between each value and the mean of its channel by
    `c[0]`.
    """
    mean = x.mean((2, 3), keepdim=True)
    return clamped((x - mean) * c[0] + mean)
