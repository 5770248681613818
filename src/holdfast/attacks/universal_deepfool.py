"""UniversalDeepFool: one perturbation for all inputs, added up from the shortest ways out of their classes.

Moosavi-Dezfooli et al., "Universal adversarial perturbations", CVPR 2017, arXiv:1610.08401. Differs from the paper:
several examples take one step of DeepFool at once, and the mean of their steps is added, where there one example after
the other goes all its way; an input is fooled where it gets a wrong class, not where it gets another one; and the rate
is counted along a pass, each example at its turn.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.constraints import L2, Linf
from holdfast.core.draws import Draws
from holdfast.core.model import Bounds, Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Fraction, Inputs, Positive, Steps
from holdfast.ops.closest import firmly_broken
from holdfast.ops.learned import Added, some, unfitted
from holdfast.ops.norms import expect_norm
from holdfast.ops.planes import across, planes, rivals_of

_PLAIN = L2(1.0)  # steps are Euclidean under any norm, as in the paper; only what they add up to is projected
_EVERYWHERE = Bounds(-torch.inf, torch.inf)


@dataclass(frozen=True)
class UniversalDeepFool:
    """Learn one change by stepping out of one class after the other, and add it to each input."""

    examples: Steps = 1000
    """examples of the fit split that it is learned on, at most; half of them choose among the fits"""
    fits: Steps = 3
    """times that it is learned from other draws; the one that breaks most of the choosing examples is taken"""
    passes: Steps = 10
    """times that each of them takes its turn, at most"""
    batch: Steps = 10
    """examples that step at once"""
    candidates: Steps = 9
    """how many of the likeliest other classes are looked at"""
    overshoot: Positive = 0.02
    """share of a step by which it goes beyond the linear boundary"""
    rate: Fraction = 0.8
    """share of the examples to be fooled; reached in one pass, the next is left out"""

    needs: ClassVar[Access] = "gradients"

    def fit(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Tensor:
        """The change, as a batch of one."""
        norm = expect_norm(threat.constraint, self, Linf, L2)
        delta, none = torch.zeros_like(batch.x[:1]), torch.zeros_like(batch.x[:1])
        turns = max(1, len(batch) // self.batch)
        for each in range(self.passes):
            fooled, seen = 0, 0
            for turn in range(turns):
                few = some(batch, self.batch, rng, each * turns + turn)
                step, left = self._step(model, few.at(model.bounds.clamp(few.x + delta)))
                delta = norm.project(delta + step, none, _EVERYWHERE)
                fooled, seen = fooled + len(few) - left, seen + len(few)
            if fooled >= self.rate * seen:
                break
        return delta

    def _step(self, model: Model, few: Batch) -> tuple[Tensor, int]:
        """The mean step of those that still stand, as a batch of one, and how many they are."""
        with torch.no_grad():
            logits = model(few.x, few.ids)
        stands = ~firmly_broken(logits, few)
        left, none = few.take(stands), torch.zeros_like(few.x[:1])
        if not len(left):
            return none, 0
        margins, grads = planes(model, left, left.x, rivals_of(logits[stands], left, self.candidates))
        moved = across(_PLAIN, _EVERYWHERE, left, left.x, grads, margins, self.overshoot)
        return (moved - left.x).mean(0, keepdim=True), len(left)

    def refit(self, k: int, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Tensor:
        """What fit `k` learns, by draws of its own."""
        return self.fit(model, batch, threat, rng=rng.at("fit", k))

    def fitted(self, learned: Tensor) -> Added:
        """The attack that adds it to every input."""
        return Added(learned)

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        raise unfitted(self)
