"""PatchAttack: gradient ascent on the values of a rectangle, at the positions of each image where the gradients are
largest.

Karmon et al., "LaVAN: Localized and Visible Adversarial Noise", ICML 2018, arXiv:1801.02608. Differs from the paper:
each image has its own patch, at positions chosen by the size of the gradient inside them instead of by trial; the
margin is lowered by the gradient's sign, in few steps with sizes along a cosine, because more positions break more
examples than longer paths do.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.attacks.parts.ascent import cosine, gradient
from holdfast.attacks.parts.images import expect_patch
from holdfast.attacks.parts.losses import Best, Loss, margin, margin_loss
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.model import Bounds, Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs, Positive, Rows, Steps
from holdfast.threats.transformations import Corners, Patch


@dataclass(frozen=True)
class PatchAttack:
    """Optimises the values of a rectangle of each image by gradient ascent, at several positions."""

    steps: Steps = 10
    """number of gradient steps of one start"""
    places: Steps = 20
    """number of starts, each at another position, that with the next largest gradients; if the threat model allows
    fewer positions, they are used again with other noise. Each is run on the examples that survive the previous starts
    """
    reach: Positive = 2.5
    """path length of one start, in multiples of the width of the box"""
    loss: Loss = margin_loss
    """loss that is maximised: `margin_loss`, `cross_entropy`, `dlr`, `probability_margin`"""

    needs: ClassVar[Access] = "gradients"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        patch, best = expect_patch(threat.constraint, self), Best(batch)
        if not len(batch):
            return best.x
        grad, logits = gradient(model, batch, self.loss)
        best.offer(batch, batch.x, margin(logits, batch))
        weights = patch.sums(grad.abs().sum(1), batch.x.shape[1:])
        allowed = patch.allowed(batch.truth, batch.x.shape[1:])
        weights = weights if allowed is None else weights.masked_fill(~allowed, -1.0)
        unused = weights.clone()
        free = unused.flatten(1).amax(1) >= 0
        for start in range(self.places):
            rows = best.surviving
            rows = rows[free[rows]]
            if not len(rows):
                break
            exhausted = rows[weights[rows].flatten(1).amax(1) < 0]
            weights[exhausted] = unused[exhausted]
            remaining, corners = batch.take(rows), heaviest(patch, weights, rows, batch.x.shape[1:])
            self._fill(
                model, remaining, patch, patch.mask(remaining.x, corners), best, rng.at("place", start)
            )
        return best.x

    def _fill(
        self, model: Model, remaining: Batch, patch: Patch, mask: Tensor, best: Best, rng: Draws
    ) -> None:
        """Gradient ascent from noise inside the rectangle; an example is dropped once it is broken. Gradients are those
        at the nearest printable colours.
        """
        x = noisy(remaining, mask, model.bounds, rng)
        for step in range(self.steps):
            printed = patch.printed(x, mask)
            grad, logits = gradient(model, remaining.at(printed), self.loss)
            margins = margin(logits, remaining)
            best.offer(remaining, printed, margins)
            surviving = margins > 0
            remaining, x, grad, mask = (
                remaining.take(surviving),
                x[surviving],
                grad[surviving],
                mask[surviving],
            )
            if not len(remaining):
                return
            size = self.reach / self.steps * cosine(step, self.steps)
            x = ascended(x, grad, size, remaining, mask, model.bounds)
        with torch.no_grad():
            printed = patch.printed(x, mask)
            best.offer(remaining, printed, margin(model(printed, remaining.ids), remaining))


def noisy(batch: Batch, mask: Tensor, bounds: Bounds, rng: Draws) -> Inputs:
    """Return the images with uniform noise at the pixels of a mask (n, 1, height, width)."""
    low, high = bounds.like(batch.x)
    noise = rng.uniform(batch.ids, *batch.x.shape[1:], dtype=batch.x.dtype)
    return torch.where(mask, low + noise * (high - low), batch.x)


def ascended(x: Inputs, grad: Inputs, size: float, batch: Batch, mask: Tensor, bounds: Bounds) -> Inputs:
    """Return the images `x` after a step along the sign of the gradient at the pixels of a mask. `size` is a fraction
    of the width of the box; the other pixels are those of the clean images in the batch.
    """
    low, high = bounds.like(batch.x)
    return torch.where(mask, bounds.clamp(x + size * (high - low) * grad.sign()), batch.x)


def heaviest(patch: Patch, weights: Tensor, rows: Rows, shape: torch.Size) -> Corners:
    """Return for each example in `rows` the position of the largest weight (n, rows, columns) of all examples. It and
    positions within half a patch are then excluded in `weights`.
    """
    down, right = patch.places(shape)
    top = weights[rows].flatten(1).argmax(1)
    row, column = top // len(right), top % len(right)
    y, x = torch.arange(len(down), device=rows.device), torch.arange(len(right), device=rows.device)
    near_y = 2 * (y - row[:, None]).abs() < patch.height
    near_x = 2 * (x - column[:, None]).abs() < patch.width
    excluded = near_y[:, :, None] & near_x[:, None, :]
    weights[rows] = weights[rows].masked_fill(excluded, -1.0)
    return row + down.start, column + right.start
