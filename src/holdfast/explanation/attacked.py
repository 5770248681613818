"""The examples of a model with their smallest changes, which the figures of its explanation share."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from holdfast.attacks.fmn import FMN
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.per_example import spread
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Inputs, Labels, Mask, PerExample
from holdfast.explanation.counterfactual import broken, counterfactual
from holdfast.explanation.wording import About
from holdfast.io.data.example_groups import Groups
from holdfast.runs.harness import Target


@dataclass(frozen=True)
class Measured:
    """What a run has stored about the examples."""

    ids: Tensor | None = None
    broken: Mask | None = None
    """mask of the examples that the run broke, in the order of `ids`"""
    adversarial_ids: Tensor | None = None
    adversarial: Inputs | None = None
    doubts: Mapping[str, str] = field(default_factory=dict)
    """state of each doubt by its name"""
    groups: Groups | None = None


@dataclass(frozen=True)
class Attacked:
    """The examples with adversarial inputs, which the figures share."""

    target: Target
    batch: Batch
    threat: ThreatModel
    about: About
    x_adv: Inputs
    """smallest changes that were found; clean inputs where none was found or the example is misclassified"""
    distance: PerExample
    """distances of `x_adv`; 0 for misclassified examples, and infinite if none was found"""
    predicted: Labels
    becomes: Labels
    """predicted classes of `x_adv`"""
    surviving: Mask
    """correct, and not broken inside the constraint"""
    missed: int
    """number of examples that survived the run, and that this search breaks"""
    rng: Draws

    @property
    def hit(self) -> Mask:
        """Correctly classified examples for which an adversarial input was found inside the constraint."""
        return (self.predicted == self.batch.y) & ~self.surviving & (self.distance > 0) & self.found

    @property
    def found(self) -> Mask:
        """Examples for which an adversarial input was found, inside the constraint or not."""
        return self.distance.isfinite()

    def named(self, label: int) -> str:
        """Return the name of a class."""
        return self.about.name_of(label)

    def called(self, label: int) -> str:
        """Return a class for a sentence."""
        return self.about.called(label)


def attacked(
    target: Target, batch: Batch, threat: ThreatModel, about: About, known: Measured, rng: Draws
) -> Attacked:
    """Return the examples of `batch` with the smallest changes that a search finds, or that a run has stored."""
    predicted = target.predicted(target.logits(batch.x))
    correct = predicted == batch.y
    x_adv, distance = _smallest(target, batch, threat, rng)
    for row, place in _positions(known.adversarial_ids, batch).items():
        assert known.adversarial is not None
        stored = known.adversarial[place : place + 1].to(batch.x)
        size = threat.constraint.distance(stored, batch.x[row : row + 1])[0]
        if size < distance[row] and bool(broken(target, batch.take(torch.tensor([row])), stored)[0]):
            x_adv[row : row + 1], distance[row] = stored, size
    distance = torch.where(correct, distance, 0.0)
    x_adv = torch.where(spread(correct & distance.isfinite(), x_adv), x_adv, batch.x)
    surviving, missed = correct & (distance > threat.constraint.eps * (1 + 1e-6) + 1e-7), 0
    if known.broken is not None:
        for row, place in _positions(known.ids, batch).items():
            missed += bool(correct[row] & ~surviving[row]) and not bool(known.broken[place])
            surviving[row] &= not bool(known.broken[place])
    becomes = target.predicted(target.logits(x_adv))
    return Attacked(target, batch, threat, about, x_adv, distance, predicted, becomes, surviving, missed, rng)


def _positions(ids: Tensor | None, batch: Batch) -> dict[int, int]:
    """Rows of the batch with the position of their ids in a stored column."""
    if ids is None:
        return {}
    stored = {value: place for place, value in enumerate(ids.tolist())}
    return {row: stored[value] for row, value in enumerate(batch.ids.tolist()) if value in stored}


def _smallest(target: Target, batch: Batch, threat: ThreatModel, rng: Draws) -> tuple[Inputs, PerExample]:
    """The smallest change of each example that is found, and its size."""
    goal = None if threat.goal is None else torch.full_like(batch.y, threat.goal)
    own = batch.towards(goal)
    constraint = threat.constraint
    if constraint.is_ball and target.bare.access == "gradients" and threat.access == "gradients":
        free = replace(threat, constraint=constraint.resized(math.inf))
        parts = [
            FMN()(target.queried(target.quick, some), some, free, rng=rng.at("model"))
            for some in own.split(256)
        ]
        x_adv = torch.cat(parts)
        done = torch.cat([broken(target, a, x) for a, x in zip(own.split(256), parts, strict=True)])
        distance = constraint.distance(x_adv, batch.x)
        return x_adv, torch.where(done, distance, torch.inf)
    points, sizes = [], []
    for row in range(len(own)):
        one = own.take(torch.tensor([row]))
        result = counterfactual(target, one, threat, rng=rng)
        points.append(one.x if result.nearest is None else result.nearest)
        sizes.append(result.distance)
    return torch.cat(points), torch.tensor(sizes, dtype=batch.x.dtype, device=batch.x.device)
