"""Changes to training images that leave their class alone, over a whole batch at once and on its device."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.types import Inputs

Augmentation = Literal["none", "shift", "crop-flip"]
_REACH = {"shift": 2, "crop-flip": 4}  # pixels: customary for digits, and for photographs of 32 x 32


def augmented(batch: Batch, how: Augmentation, rng: Draws) -> Batch:
    """The batch with other images of the same classes; `how` is "none", or inputs must be (n, channels, h, w)."""
    if how == "none":
        return batch
    if batch.x.dim() != 4:
        raise UsageError(
            f"augmentation {how!r} is for images, and inputs have shape {tuple(batch.x.shape[1:])}; use none"
        )
    reach = _REACH[how]
    down, right = rng.at("shift").integers(batch.ids, 2 * reach + 1, 2).unbind(1)
    x = windows(batch.x, reach, down, right)
    if how == "crop-flip":
        turned = rng.at("flip").bits(batch.ids) < 0
        x = torch.where(turned[:, None, None, None], x.flip(3), x)
    return batch.at(x)


def windows(x: Inputs, reach: int, down: Tensor, right: Tensor) -> Inputs:
    """Images (n, channels, h, w) padded with `reach` zeros a side, each seen through a window from `down`, `right`."""
    height, width = x.shape[2:]
    padded = F.pad(x, (reach,) * 4)
    rows = down[:, None] + torch.arange(height, device=x.device)
    columns = right[:, None] + torch.arange(width, device=x.device)
    each = torch.arange(len(x), device=x.device)[:, None, None]
    return padded[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
