"""Geometric and colour transformations of a batch of images, which are differentiable and have an amount for each
image.

Rotations, shifts and scales are one affine map with bilinear interpolation; pixels from outside get the lower bound of
the box, as in Engstrom et al., arXiv:1712.02779. Hue and saturation are linear in the chroma plane of YIQ.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.core.model import Bounds
from holdfast.core.per_example import spread
from holdfast.core.types import Inputs, PerExample

if TYPE_CHECKING:
    from holdfast.threats.transformations import Transformation

Amounts = Mapping[str, PerExample]
"""amount along each axis for each example, by name of the axis"""

_SPATIAL = ("rotate", "shift_x", "shift_y", "scale", "perspective_x", "perspective_y")
_COLOURED = ("hue", "saturation")
_TO_YIQ = ((0.299, 0.587, 0.114), (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135))


def transformed(x: Inputs, amounts: Amounts, bounds: Bounds) -> Inputs:
    """Transform the images `x` (n, channels, height, width), such as by rotation, shift or hue. Each image has its own
    amount of each transformation.

    With all amounts zero the result is bitwise equal to `x` and still has a gradient. `rotate` and `hue` are in
    degrees, `shift_x` and `shift_y` in pixels (right and down). `scale`, `saturation` and `contrast` are added to a
    factor of one. `brightness` is a fraction of the box's width. `blur` is the standard deviation of a Gaussian in
    pixels (its sign is ignored). `perspective_x` and `perspective_y` are how much nearer the right or the lower side is
    than the centre.
    """
    if not amounts:
        return x
    out = x
    if any(name in amounts for name in _SPATIAL):
        out = _warped(out, amounts, bounds)
    if "blur" in amounts:
        out = _blurred(out, amounts["blur"])
    if any(name in amounts for name in (*_COLOURED, "brightness", "contrast")):
        out = _recoloured(out, amounts, bounds)
    still = torch.stack([amount == 0 for amount in amounts.values()]).all(0)
    # the value of `x` with the gradient of `out`
    return torch.where(spread(still, x), x + (out - out.detach()), bounds.clamp(out))


def flowed(x: Inputs, flow: Tensor, bounds: Bounds) -> Inputs:
    """Return images whose pixels are displaced: each pixel is read from `x` at an offset `flow` (n, 2, height, width),
    in pixels to the right and down.

    Outside of the image the value of the border continues. Pixels without a displacement are bitwise unchanged, and
    have a gradient.
    """
    height, width = x.shape[2:]
    rows = torch.arange(height, device=x.device, dtype=x.dtype)[:, None] + flow[:, 1]
    columns = torch.arange(width, device=x.device, dtype=x.dtype) + flow[:, 0]
    grid = torch.stack(((2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1), dim=-1)
    out = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
    still = (flow == 0).all(1, keepdim=True)
    # the value of `x` with the gradient of `out`
    return torch.where(still, x + (out - out.detach()), bounds.clamp(out))


def reached(x: Inputs, position: Tensor, constraint: "Transformation", bounds: Bounds) -> Inputs:
    """Return images transformed by `position` (n, axes), which gives the amount of each transformation as a fraction of
    its limit, from -1 to 1.
    """
    amounts = {axis: limit * position[:, k] for k, (axis, limit) in enumerate(constraint.axes.items())}
    return transformed(x, amounts, bounds)


def _warped(x: Inputs, amounts: Amounts, bounds: Bounds) -> Inputs:
    """Apply rotation, scale, shift and perspective as one homography by backward mapping."""
    height, width = x.shape[2:]
    zero = x.new_zeros(len(x))
    angle = torch.deg2rad(amounts.get("rotate", zero))
    zoom = 1 + amounts.get("scale", zero)
    rows = torch.arange(height, device=x.device, dtype=x.dtype) - (height - 1) / 2
    columns = torch.arange(width, device=x.device, dtype=x.dtype) - (width - 1) / 2
    down = rows[None, :, None] - amounts.get("shift_y", zero)[:, None, None]
    right = columns[None, None, :] - amounts.get("shift_x", zero)[:, None, None]
    cos, sin = ((side / zoom)[:, None, None] for side in (angle.cos(), angle.sin()))
    from_right, from_down = cos * right + sin * down, cos * down - sin * right
    nearer = (
        1
        + amounts.get("perspective_x", zero)[:, None, None] * from_right * 2 / width
        + amounts.get("perspective_y", zero)[:, None, None] * from_down * 2 / height
    )
    grid = torch.stack((from_right * 2 / width / nearer, from_down * 2 / height / nearer), dim=-1)
    low, _ = bounds.like(x)
    # shifted, because pixels from outside are 0 in `grid_sample` and must be the lower bound
    return F.grid_sample(x - low, grid, mode="bilinear", padding_mode="zeros", align_corners=False) + low


def _blurred(x: Inputs, sigma: PerExample) -> Inputs:
    """A Gaussian blur along rows, then along columns, with its own width for each example."""
    reach = min(4, x.shape[2] - 1, x.shape[3] - 1)
    offsets = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
    # a width of zero would divide by zero; one of 1e-3 changes no pixel
    kernel = torch.exp(-(offsets**2) / (2 * sigma.abs().clamp_min(1e-3)[:, None] ** 2))
    kernel = kernel / kernel.sum(1, keepdim=True)
    n, channels, height, width = x.shape
    weight = kernel.repeat_interleave(channels, 0)[:, None]
    flat = F.pad(x.reshape(1, n * channels, height, width), (reach,) * 4, mode="replicate")
    once = F.conv2d(flat, weight[:, :, None], groups=n * channels)
    return F.conv2d(once, weight[..., None], groups=n * channels).view_as(x)


def _recoloured(x: Inputs, amounts: Amounts, bounds: Bounds) -> Inputs:
    if any(name in amounts for name in _COLOURED):
        x = _chroma(x, amounts)
    if "contrast" in amounts:
        mean = x.flatten(1).mean(1)
        x = spread(mean, x) + spread(1 + amounts["contrast"], x) * (x - spread(mean, x))
    if "brightness" in amounts:
        x = x + bounds.width * spread(amounts["brightness"], x)
    return x


def _chroma(x: Inputs, amounts: Amounts) -> Inputs:
    """Rotate and scale the two colour channels of YIQ, which keeps the brightness."""
    no_change = x.new_zeros(len(x))
    angle = torch.deg2rad(amounts.get("hue", no_change))
    stretch = 1 + amounts.get("saturation", no_change)
    cos, sin = stretch * angle.cos(), stretch * angle.sin()
    zero, one = torch.zeros_like(cos), torch.ones_like(cos)
    rotation = torch.stack((one, zero, zero, zero, cos, -sin, zero, sin, cos), dim=1).view(-1, 3, 3)
    to_yiq = torch.tensor(_TO_YIQ, device=x.device, dtype=x.dtype)
    mixed = torch.linalg.inv(to_yiq) @ rotation @ to_yiq
    return torch.einsum("nij,njhw->nihw", mixed, x)
