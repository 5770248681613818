"""Digital corruptions of images in [0, 1]: elastic transform and pixelation."""

import math

import torch
from torch import Tensor

from holdfast.core.draws import Draws
from holdfast.core.types import Ids, Inputs
from holdfast.corruptions.constants import Constants
from holdfast.corruptions.filters import along, clamped, gaussian_kernel, sampled


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
