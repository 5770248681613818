"""What attacks share that are learned once and then the same for every example."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.meter import margin
from holdfast.core.model import Model
from holdfast.core.patches import Corners
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs, Logits, PerExample
from holdfast.ops.best import Best
from holdfast.ops.losses import cross_entropy
from holdfast.ops.patches import expect_patch, pasted

_ENOUGH = 9.0  # cross-entropy beyond which an example counts no more, so that none outweighs the others (1811.11304)


def truncated(logits: Logits, batch: Batch) -> PerExample:
    """The cross-entropy, no further than where an example is long broken; with targets, minus the target's."""
    return cross_entropy(logits, batch).clamp_max(_ENOUGH)


def some(batch: Batch, n: int, rng: Draws, step: int) -> Batch:
    """`n` examples at random, none twice before all had their turn."""
    n = min(n, len(batch))
    steps = len(batch) // n
    order = rng.at("order", step // steps).bits(batch.ids).argsort()
    return batch.take(order[step % steps * n :][:n])


def unfitted(attack: object) -> UsageError:
    """What is said when an attack that must be learned first is called."""
    name = type(attack).__name__
    return UsageError(
        f"{name} is learned before it attacks: {name}().fit(model, other_examples, threat, rng=…) and then "
        f"{name}().fitted(…), or let assess do it, with --fit DATA where the data has no train split"
    )


@dataclass(frozen=True)
class Added:
    """Add one learned change to every input, projected onto ball and box."""

    learned: Tensor
    """(1, *features)"""

    needs: ClassVar[Access] = "none"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        return threat.constraint.project(batch.x + self.learned.to(batch.x), batch.x, model.bounds)


@dataclass(frozen=True)
class Pasted:
    """Paste one learned patch into each image, at the place of those that the threat allows where the model does worst.

    The threat leaves the choice of the place to the attacker, who looks at the model's answers. Places are tried in
    random order, and an image that is broken is tried no further. Cost: a forward for each place.
    """

    learned: Tensor
    """(1, channels, height, width)"""
    places: int = 1_000
    """of an image that are tried, at most: all, or so many that are drawn at random, the same for every image"""

    needs: ClassVar[Access] = "labels"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        best = Best(batch)
        for corner in self._corners(threat, batch.x.shape[1:], rng.at("places")):
            left = batch.take(best.standing)
            if not len(left):
                break
            corners = (corner[0].expand(len(left)), corner[1].expand(len(left)))
            x = self._pasted(model, left, corners)
            with torch.no_grad():
                best.offer(left, x, margin(model(x, left.ids), left))
        return best.x

    def tried(self, threat: ThreatModel, shape: torch.Size) -> int:
        """At how many places of an image of this shape (channels, height, width) it is tried, at most."""
        rows, columns = expect_patch(threat.constraint, self).places(shape)
        return min(len(rows) * len(columns), self.places)

    def at_random(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        """The images with the patch at one random place of each."""
        patch = expect_patch(threat.constraint, self)
        return self._pasted(model, batch, patch.drawn(batch.ids, batch.x.shape[1:], rng.at("place")))

    def _corners(self, threat: ThreatModel, shape: torch.Size, rng: Draws) -> Tensor:
        """The upper left corners that are tried, in their order: int64 (places, 2)."""
        rows, columns = expect_patch(threat.constraint, self).places(shape)
        across = torch.arange(len(rows) * len(columns), device=self.learned.device)
        drawn = across[rng.bits(across).argsort()[: self.places]]
        return torch.stack((drawn // len(columns) + rows.start, drawn % len(columns) + columns.start), 1)

    def _pasted(self, model: Model, batch: Batch, corners: Corners) -> Inputs:
        return model.bounds.clamp(pasted(batch.x, self.learned.to(batch.x), corners))
