"""Shared parts of attacks that fit one change, such as a patch, and apply it to all examples."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.attacks.parts.best import Best
from holdfast.attacks.parts.losses import cross_entropy
from holdfast.attacks.parts.patch_places import expect_patch, pasted
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.meter import margin
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs, Logits, PerExample
from holdfast.threats.patches import Corners

_ENOUGH = 9.0  # cross-entropy at which an example is clipped, so that none dominates the others (1811.11304)


def truncated(logits: Logits, batch: Batch) -> PerExample:
    """Return the cross-entropy of each example, clipped at 9 so that broken examples do not dominate. With targets, it
    is minus the cross-entropy of the target.
    """
    return cross_entropy(logits, batch).clamp_max(_ENOUGH)


def draw_minibatch(batch: Batch, n: int, rng: Draws, step: int) -> Batch:
    """Return `n` random examples of a batch for one step of a fit. Each example is used once before any is used
    again.
    """
    n = min(n, len(batch))
    steps = len(batch) // n
    order = rng.at("order", step // steps).bits(batch.ids).argsort()
    return batch.take(order[step % steps * n :][:n])


def unfitted(attack: object) -> UsageError:
    """Return the error for an attack that was called before it was fitted."""
    name = type(attack).__name__
    return UsageError(
        f"{name} must be fitted before it attacks: {name}().fit(model, other_examples, threat, rng=…) and then "
        f"{name}().fitted(…), or use assess, which fits it"
    )


@dataclass(frozen=True)
class Added:
    """Attack that adds one fitted perturbation to every input and projects the result onto the valid inputs of the
    ball.
    """

    learned: Tensor
    """fitted change, of shape (1, *features)"""

    needs: ClassVar[Access] = "none"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        return threat.constraint.project(batch.x + self.learned.to(batch.x), batch.x, model.bounds)


@dataclass(frozen=True)
class Pasted:
    """Attack that pastes one fitted patch into each image, at the allowed position where the margin is lowest.

    The threat model leaves the position to the attacker, who queries the model. Positions are tried in random order
    until the image is broken. Cost: a forward for each position.
    """

    learned: Tensor
    """fitted patch, of shape (1, channels, height, width)"""
    places: int = 1_000
    """largest number of positions that are tried for an image; of more, some are chosen at random, the same for all
    images"""

    needs: ClassVar[Access] = "labels"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        best = Best(batch)
        for corner in self._corners(threat, batch.x.shape[1:], rng.at("places")):
            remaining = batch.take(best.surviving)
            if not len(remaining):
                break
            corners = (corner[0].expand(len(remaining)), corner[1].expand(len(remaining)))
            x = self._pasted(model, remaining, corners)
            with torch.no_grad():
                best.offer(remaining, x, margin(model(x, remaining.ids), remaining))
        return best.x

    def tried(self, threat: ThreatModel, shape: torch.Size) -> int:
        """Return the largest number of positions at which the patch is tried in an image of this shape (channels,
        height, width).
        """
        rows, columns = expect_patch(threat.constraint, self).places(shape)
        return min(len(rows) * len(columns), self.places)

    def at_random(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        """Return the images with the patch at one random position of each image, without queries of the model."""
        patch = expect_patch(threat.constraint, self)
        return self._pasted(model, batch, patch.drawn(batch.ids, batch.x.shape[1:], rng.at("place")))

    def _corners(self, threat: ThreatModel, shape: torch.Size, rng: Draws) -> Tensor:
        """The upper left corners that are tried, in order: int64 (places, 2)."""
        rows, columns = expect_patch(threat.constraint, self).places(shape)
        positions = torch.arange(len(rows) * len(columns), device=self.learned.device)
        chosen = positions[rng.bits(positions).argsort()[: self.places]]
        return torch.stack((chosen // len(columns) + rows.start, chosen % len(columns) + columns.start), 1)

    def _pasted(self, model: Model, batch: Batch, corners: Corners) -> Inputs:
        return model.bounds.clamp(pasted(batch.x, self.learned.to(batch.x), corners))
