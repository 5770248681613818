"""JPEG compression of images: the loss of the baseline codec of ITU-T T.81 at a given quality, with colours at half the
resolution.

Tables and their scaling are those of the Independent JPEG Group's library (Annex K of the standard). Differs from the
library: the cosine transforms are exact, while the library uses fixed point, so that a coefficient near a tie may be
rounded the other way: less than one level of 256 on average over an image, up to 20 in a few values.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.core.draws import Draws
from holdfast.core.types import Ids, Inputs
from holdfast.corruptions.constants import Constants
from holdfast.corruptions.cosines import cosines
from holdfast.corruptions.filters import wrapped_positions

_LIGHT = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_COLOUR = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)
_ROUNDING = 1e-4
"""Largest float error at a tie, which the library rounds away from zero."""
_TO_YCC = ((0.299, 0.587, 0.114), (-0.168735892, -0.331264108, 0.5), (0.5, -0.418687589, -0.081312411))
_FROM_YCC = ((1.0, 0.0, 1.402), (1.0, -0.344136286, -0.714136286), (1.0, 1.772, 0.0))


def jpeg_compression(x: Inputs, c: Constants, ids: Ids, rng: Draws) -> Inputs:
    """Encode the images as JPEG at the quality `c[0]` and decode them. They are rounded to 256 levels before."""
    levels = (255 * x).round()
    if x.shape[1] == 1:
        return _coded(levels, _LIGHT, c[0]) / 255
    height, width = x.shape[2:]
    planes = _mixed(levels, _TO_YCC).round()
    light, colour = planes[:, :1], (planes[:, 1:] + 128).clamp(0, 255)
    odd = torch.arange(width + width % 2, device=x.device) % 2
    mean = F.avg_pool2d(_filled(colour, 2), 2)
    # ties are rounded down in even columns and up in odd ones, and vice versa when colours are enlarged
    half = _coded((mean + 0.25 + 0.25 * odd[: mean.shape[3]]).floor(), _COLOUR, c[0])
    # each value is at the centre of its four pixels: weights 9/16 of the nearest, 3/16, 3/16 and 1/16 of the next
    full = F.interpolate(half, scale_factor=2, mode="bilinear", align_corners=False)
    full = (full + (8 - odd) / 16).floor()
    decoded = torch.cat((_coded(light, _LIGHT, c[0]), full[:, :, :height, :width] - 128), dim=1)
    return _mixed(decoded, _FROM_YCC).round().clamp(0, 255) / 255


def _mixed(x: Inputs, matrix: tuple[tuple[float, ...], ...]) -> Inputs:
    return torch.einsum("ij,njhw->nihw", x.new_tensor(matrix), x)


def _filled(x: Inputs, block: int) -> Inputs:
    """The images with their last row and column repeated up to whole blocks."""
    rows, columns = (
        wrapped_positions(torch.arange(-(-side // block) * block, device=x.device), side, "edge")
        for side in x.shape[2:]
    )
    return x[:, :, rows][:, :, :, columns]


def _coded(levels: Inputs, table: tuple[tuple[int, ...], ...], quality: float) -> Inputs:
    """Levels 0 to 255 after cosine transform, quantisation and inverse transform of each block."""
    height, width = levels.shape[2:]
    padded = _filled(levels, 8)
    n, channels, tall, broad = padded.shape
    blocks = (padded - 128).view(n, channels, tall // 8, 8, broad // 8, 8).transpose(3, 4)
    waves, steps = cosines(8, levels), _steps(table, quality, levels)
    coefficients = waves @ blocks @ waves.T / steps
    quantised = (coefficients.abs() + 0.5 + _ROUNDING).floor() * coefficients.sign() * steps
    decoded = (waves.T @ quantised @ waves).transpose(3, 4).reshape(n, channels, tall, broad)
    return (decoded + 128).round().clamp(0, 255)[:, :, :height, :width]


def _steps(table: tuple[tuple[int, ...], ...], quality: float, like: Tensor) -> Tensor:
    percent = int(5000 / quality) if quality < 50 else int(200 - 2 * quality)
    return ((like.new_tensor(table) * percent + 50) / 100).floor().clamp(1, 255)
