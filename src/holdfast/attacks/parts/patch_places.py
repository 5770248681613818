"""Functions for attacks that change one rectangle of each image."""

import torch
from torch import Tensor

from holdfast.core.constraints import Constraint
from holdfast.core.errors import UsageError
from holdfast.core.types import Inputs
from holdfast.threats.patches import Corners, Patch


def expect_patch(constraint: Constraint, attack: object) -> Patch:
    """Return the constraint if it is a patch, for attacks on patches. Raises `UsageError` otherwise."""
    if isinstance(constraint, Patch):
        return constraint
    raise UsageError(
        f"{type(attack).__name__} fills a rectangle of an image; the threat model is {constraint}. "
        f"Choose a threat such as patch:5x5, or leave the attack out"
    )


def pasted(x: Inputs, filling: Tensor, corners: Corners) -> Inputs:
    """Return the images with the patch values `filling` (1, channels, height, width) pasted at a position of each
    image. The result is differentiable in `filling`.
    """
    height, width = filling.shape[2:]
    rows = corners[0][:, None, None] + torch.arange(height, device=x.device)[:, None]
    columns = corners[1][:, None, None] + torch.arange(width, device=x.device)
    images = torch.arange(len(x), device=x.device)[:, None, None]
    values = filling.permute(0, 2, 3, 1).expand(len(x), -1, -1, -1)
    return x.permute(0, 2, 3, 1).index_put((images, rows, columns), values).permute(0, 3, 1, 2)
