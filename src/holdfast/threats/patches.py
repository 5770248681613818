"""Patches as a constraint, such as `patch:5x5` in a threat model: only one rectangle of each image changes.

Brown et al., "Adversarial Patch", 2017, arXiv:1712.09665; Karmon et al., "LaVAN: Localized and Visible Adversarial
Noise", ICML 2018, arXiv:1801.02608.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.constraints import Constraint
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Bounds
from holdfast.core.types import Count, Ids, Inputs, PerExample, Steps

Corners = tuple[Tensor, Tensor]
"""row and column of the upper left corner of a rectangle, for each example, each int64 (n)"""


@dataclass(frozen=True)
class Patch(Constraint):
    """Constraint that only one rectangle of an image changes, and that its pixels may have any valid value.

    `at` is the row and column of its upper left corner, `centre`, or `anywhere`, where the attacker chooses the
    position. With `jitter` the position varies by up to that many pixels. The patch stays inside the rectangle
    `within`, if there is one: `anywhere` and `centre` then refer to that rectangle.
    """

    name: ClassVar[str] = "patch"

    height: Steps = 5
    width: Steps = 5
    at: str = "anywhere"
    """`anywhere`, `centre` or `ROW:COLUMN`"""
    jitter: Count = 0
    """largest deviation from the position in pixels, along each axis"""
    within: str = ""
    """`ROW:COLUMN-ROW:COLUMN`, the first and the last pixel that the patch may cover; empty for the whole image"""

    @property
    def counts_pixels(self) -> bool:
        """Always true: a patch changes pixels."""
        return True

    def refuse_unfit(self, x: Inputs) -> None:
        """Raise `UsageError` if the patch does not fit into images in the shape of `x`."""
        self.places(x.shape[1:])

    @property
    def limits(self) -> Mapping[str, float | str]:
        """Settings of the patch by name, such as its height and width."""
        confined = {"within": self.within} if self.within else {}
        return {"height": self.height, "width": self.width, "at": self.at, "jitter": self.jitter, **confined}

    def places(self, shape: torch.Size) -> tuple[range, range]:
        """Return the rows and the columns at which the upper left corner of the patch may be, in images of `shape`
        (channels, height, width).

        Raises `UsageError` if the patch does not fit.
        """
        if len(shape) != 3:
            raise UsageError(
                f"{self} needs images (n, channels, height, width); the inputs have shape {tuple(shape)}"
            )
        first_row, first_column, last_row, last_column = 0, 0, shape[1] - 1, shape[2] - 1
        if self.within:
            first_row, first_column, last_row, last_column = map(int, re.split("[:-]", self.within))
        rows, columns = (
            range(first_row, last_row - self.height + 2),
            range(first_column, last_column - self.width + 2),
        )
        row, column = rows.start + (len(rows) - 1) // 2, columns.start + (len(columns) - 1) // 2
        if ":" in self.at:
            row, column = map(int, self.at.split(":"))
        outside = last_row >= shape[1] or last_column >= shape[2]
        if outside or row not in rows or column not in columns:
            raise UsageError(
                f"{self} does not fit into images of {shape[1]}x{shape[2]}; give a smaller one, or another place"
            )
        if self.at == "anywhere":
            return rows, columns
        return _near(row, self.jitter, rows), _near(column, self.jitter, columns)

    def drawn(self, ids: Ids, shape: torch.Size, rng: Draws) -> Corners:
        """Return a random allowed position of the patch for each example, as the row and column of its upper left
        corner.
        """
        rows, columns = self.places(shape)
        down = rng.at("row").integers(ids, len(rows)) + rows.start
        return down, rng.at("column").integers(ids, len(columns)) + columns.start

    def mask(self, x: Inputs, corners: Corners) -> Tensor:
        """Return a mask (n, 1, height, width) of the pixels that a patch with its upper left corner at `corners`
        covers.
        """
        down = torch.arange(x.shape[2], device=x.device) - corners[0][:, None]
        right = torch.arange(x.shape[3], device=x.device) - corners[1][:, None]
        inside = ((down >= 0) & (down < self.height))[:, :, None] & ((right >= 0) & (right < self.width))[
            :, None, :
        ]
        return inside[:, None]

    def distance(self, x_adv: Inputs, x: Inputs) -> PerExample:
        """Return for each example 0 if nothing changed, 1 if one patch covers all changes, else infinity."""
        changed = (x_adv != x).any(1).to(x)
        missed = changed.flatten(1).sum(1) - self.sums(changed, x.shape[1:]).flatten(1).amax(1)
        anything = changed.flatten(1).any(1).to(x)
        # A number of pixels that was computed from averages is not exact.
        return torch.where(missed > 0.5, torch.inf, anything)

    def project(self, x_adv: Inputs, x: Inputs, bounds: Bounds) -> Inputs:
        """Return the images with all changes undone outside one patch, placed where it contains most of the change, and
        with its values clamped to their valid range.
        """
        clamped = bounds.clamp(x_adv)
        size = self.sums(((clamped - x) ** 2).sum(1), x.shape[1:])
        best = size.flatten(1).argmax(1)
        rows, columns = self.places(x.shape[1:])
        corners = (best // len(columns) + rows.start, best % len(columns) + columns.start)
        return torch.where(self.mask(x, corners), clamped, x)

    def steepest(self, gradient: Inputs, x: Inputs, bounds: Bounds) -> Inputs:
        """Return the sign of the gradient, multiplied by the width of the range of valid values."""
        low, high = bounds.like(x)
        return gradient.sign() * (high - low)

    def sample(self, batch: Batch, bounds: Bounds, rng: Draws) -> Inputs:
        """Return the images with uniform noise inside one patch at a random position of each image."""
        low, high = bounds.like(batch.x)
        u = rng.at("value").uniform(batch.ids, *batch.x.shape[1:], dtype=batch.x.dtype)
        inside = self.mask(batch.x, self.drawn(batch.ids, batch.x.shape[1:], rng))
        return torch.where(inside, low + u * (high - low), batch.x)

    def resized(self, eps: float) -> "Patch":
        """Return the patch itself for any `eps`, because a patch has no radius."""
        return self

    def sums(self, values: Tensor, shape: torch.Size) -> Tensor:
        """Return the sums of `values` (n, height, width) over the pixels of the patch at each of its positions, as (n,
        rows, columns).
        """
        rows, columns = self.places(shape)
        inside = values[
            :, None, rows.start : rows.stop + self.height - 1, columns.start : columns.stop + self.width - 1
        ]
        size = (self.height, self.width)
        return F.avg_pool2d(inside, size, stride=1)[:, 0] * (self.height * self.width)


def _near(middle: int, reach: int, free: range) -> range:
    """The part of `free` that is at most `reach` away from `middle`."""
    return range(max(free.start, middle - reach), min(free.stop - 1, middle + reach) + 1)
