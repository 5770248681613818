"""UniversalDeepFool: one perturbation for all inputs, computed as a sum of DeepFool steps of single examples.

Moosavi-Dezfooli et al., "Universal adversarial perturbations", CVPR 2017, arXiv:1610.08401. Differs from the paper:
several examples take one step of DeepFool at once and the mean of their steps is added, where the paper moves one
example after the other across its boundary; an input counts as broken if it is misclassified, not if its prediction
changes; and the rate is counted during a pass, for each example when it is used.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.attacks.parts.boundaries import across, planes, rivals_of
from holdfast.attacks.parts.images import Added, draw_minibatch, unfitted
from holdfast.attacks.parts.losses import expect_norm, firmly_broken
from holdfast.core.batch import Batch
from holdfast.core.constraints import L2, Linf
from holdfast.core.draws import Draws
from holdfast.core.model import Bounds, Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Fraction, Inputs, Positive, Steps

_PLAIN = L2(1.0)  # steps are Euclidean under any norm, as in the paper; only their sum is projected
_EVERYWHERE = Bounds(-torch.inf, torch.inf)


@dataclass(frozen=True)
class UniversalDeepFool:
    """Computes one perturbation for all inputs as a sum of DeepFool steps of single examples."""

    examples: Steps = 1000
    """largest number of examples of the fit split; half of them are used to choose among the fits"""
    fits: Steps = 3
    """number of fits with different random numbers; the one that breaks most examples is used"""
    passes: Steps = 10
    """largest number of passes over the examples"""
    batch: Steps = 10
    """number of examples whose steps are computed at once and averaged"""
    candidates: Steps = 9
    """number of wrong classes that are compared, likeliest first"""
    overshoot: Positive = 0.02
    """fraction of a step by which it goes beyond the linear boundary"""
    rate: Fraction = 0.8
    """fraction of broken examples in a pass at which the fit ends"""

    needs: ClassVar[Access] = "gradients"

    def fit(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Tensor:
        """Compute one perturbation on the examples of a batch and return it, of shape (1, *features)."""
        norm = expect_norm(threat.constraint, self, Linf, L2)
        delta, zero = torch.zeros_like(batch.x[:1]), torch.zeros_like(batch.x[:1])
        n_batches = max(1, len(batch) // self.batch)
        for epoch in range(self.passes):
            n_broken, n_used = 0, 0
            for k in range(n_batches):
                minibatch = draw_minibatch(batch, self.batch, rng, epoch * n_batches + k)
                step, n_surviving = self._step(model, minibatch.at(model.bounds.clamp(minibatch.x + delta)))
                delta = norm.project(delta + step, zero, _EVERYWHERE)
                n_broken, n_used = n_broken + len(minibatch) - n_surviving, n_used + len(minibatch)
            if n_broken >= self.rate * n_used:
                break
        return delta

    def _step(self, model: Model, minibatch: Batch) -> tuple[Tensor, int]:
        """The mean step of the examples that survive, as a batch of one, and the number of these examples."""
        with torch.no_grad():
            logits = model(minibatch.x, minibatch.ids)
        surviving = ~firmly_broken(logits, minibatch)
        remaining, zero = minibatch.take(surviving), torch.zeros_like(minibatch.x[:1])
        if not len(remaining):
            return zero, 0
        margins, grads = planes(
            model, remaining, remaining.x, rivals_of(logits[surviving], remaining, self.candidates)
        )
        stepped = across(_PLAIN, _EVERYWHERE, remaining, remaining.x, grads, margins, self.overshoot)
        return (stepped - remaining.x).mean(0, keepdim=True), len(remaining)

    def refit(self, k: int, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Tensor:
        """Return the perturbation of fit number `k`; each fit has its own random numbers."""
        return self.fit(model, batch, threat, rng=rng.at("fit", k))

    def fitted(self, learned: Tensor) -> Added:
        """Return the attack that adds the fitted perturbation `learned` to every input."""
        return Added(learned)

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        raise unfitted(self)
