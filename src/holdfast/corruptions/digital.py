"""Digital corruptions of images in [0, 1]: elastic transform, pixelation, and JPEG compression."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.core.draws import Draws
from holdfast.core.types import Ids, Inputs
from holdfast.corruptions.blur import along, clamped, gaussian_kernel, sampled, wrapped_positions
from holdfast.corruptions.constants import Constants


def cosines(side: int, like: Tensor) -> Tensor:
    """Return the basis (side, side) of the orthonormal DCT-II, one cosine in each row, lowest frequency first."""
    k = torch.arange(side, dtype=torch.float64)
    waves = torch.cos(math.pi / side * k[:, None] * (k + 0.5)) * math.sqrt(2 / side)
    waves[0] /= math.sqrt(2)
    return waves.to(like.device, like.dtype)


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


def pixelate(x: Inputs, c: Constants, ids: Ids, rng: Draws) -> Inputs:
    """Pixelate the images: shrink each side to the fraction `c[0]` of its length and enlarge it again, with box
    filters.
    """
    down = [_boxes(side, max(1, int(side * c[0])), x) for side in x.shape[2:]]
    up = [_boxes(len(matrix), side, x) for matrix, side in zip(down, x.shape[2:], strict=True)]
    return clamped(along(along(x, *down), *up))


def _boxes(size: int, new_size: int, like: Tensor) -> Tensor:
    """Matrix that resizes a line from `size` to `new_size` pixels: means of the pixels whose centres a box covers."""
    scale = size / new_size
    middle = (torch.arange(new_size, dtype=torch.float64) + 0.5) * scale
    offset = (torch.arange(size) + 0.5 - middle[:, None]) / max(scale, 1.0)
    covered = ((offset > -0.5) & (offset <= 0.5)).double()
    return (covered / covered.sum(1, keepdim=True)).to(like)


def elastic_transform(x: Inputs, c: Constants, ids: Ids, rng: Draws) -> Inputs:
    """Distort the images by a random affine map near the identity, and then by a smooth random displacement of every
    pixel.

    The constants are fractions of the shorter side: of the displacement, of its smoothness and of the affine map.
    """
    height, width = x.shape[2:]
    shift, smooth, corner_shift = (min(height, width) * share for share in c)
    rows, columns = (torch.arange(side, device=x.device, dtype=torch.float64) for side in (height, width))
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    inverse_map = _affine(x, corner_shift, ids, rng.at("corners"))
    positions = torch.stack((column, row, torch.ones_like(row)), dim=-1)
    from_column, from_row = torch.einsum("npk,hwk->pnhw", inverse_map, positions)
    warped = sampled(x, from_row, from_column, "mirror")
    dtype = torch.float64
    right, down = (
        shift
        * gaussian_kernel(
            2 * rng.at(name).uniform(ids, 1, height, width, dtype=dtype) - 1,
            smooth,
            edge="symmetric",
            reach=3.0,
        )[:, 0]
        for name in ("right", "down")
    )
    return clamped(sampled(warped, row + down, column + right, "symmetric"))


def _affine(x: Inputs, corner_shift: float, ids: Ids, rng: Draws) -> Tensor:
    """The maps (n, 2, 3) from positions (column, row, 1) of the result to those of the image.

    Three corners of a square in the centre are moved by up to `corner_shift` pixels along each axis.
    """
    height, width = x.shape[2:]
    column, row, side = width // 2, height // 2, math.floor(min(height, width) / 3)
    before = torch.tensor(
        [[column + side, row + side], [column + side, row - side], [column - side, row - side]],
        dtype=torch.float64,
        device=x.device,
    )
    after = before + corner_shift * (2 * rng.uniform(ids, 3, 2, dtype=torch.float64) - 1)
    after = torch.cat((after, torch.ones_like(after[..., :1])), dim=-1)
    inverse_map: Tensor = torch.linalg.solve(after, before.expand(len(x), 3, 2))
    return inverse_map.mT
