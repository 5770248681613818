"""What attacks share that are learned once and then the same for every example."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs, Logits, PerExample
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
    """Paste one learned patch into every image, at a random place of those that the threat allows."""

    learned: Tensor
    """(1, channels, height, width)"""

    needs: ClassVar[Access] = "none"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        patch = expect_patch(threat.constraint, self)
        corners = patch.drawn(batch.ids, batch.x.shape[1:], rng.at("place"))
        return model.bounds.clamp(pasted(batch.x, self.learned.to(batch.x), corners))
