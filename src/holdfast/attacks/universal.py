"""Universal: one perturbation that is added to all inputs, fitted on examples that are not used for the evaluation.

Moosavi-Dezfooli et al., "Universal adversarial perturbations", CVPR 2017, arXiv:1610.08401; this is the stochastic
gradient method of Shafahi et al., "Universal Adversarial Training", AAAI 2020, arXiv:1811.11304. Differs from the
paper: step sizes follow a cosine; the gradient of each batch, divided by its mean absolute value, is added to a
momentum, as in Dong et al., CVPR 2018, arXiv:1710.06081, which makes the results of different fits more similar; and of
several fits the best on separate examples is used. Most inputs end in one class, and the number of broken examples
depends on which one, so that each fit begins with steps towards another class.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.attacks.parts.ascent import cosine, gradient
from holdfast.attacks.parts.images import Added, draw_minibatch, truncated, unfitted
from holdfast.attacks.parts.losses import expect_norm
from holdfast.core.batch import Batch
from holdfast.core.constraints import L2, Linf
from holdfast.core.draws import Draws
from holdfast.core.model import Bounds, Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Fraction, Inputs, Positive, Steps

_TINY = 1e-30  # prevents a division by zero where the gradient is zero
_BEGIN = 1 / 3  # share of the steps that are targeted


@dataclass(frozen=True)
class Universal:
    """Optimises one perturbation that breaks the model on as many inputs as possible, and adds it to each."""

    examples: Steps = 2000
    """largest number of examples of the fit split; half of them are used to choose among the fits"""
    fits: Steps = 10
    """number of fits, each with first steps towards another class; the fit that breaks most examples is used"""
    steps: Steps = 150
    """number of gradient steps of a fit, each on some of the examples"""
    batch: Steps = 100
    """number of examples in one gradient step"""
    step_size: Positive = 0.2
    """mean step size, in multiples of eps"""
    momentum: Fraction = 0.9
    """factor of the accumulated direction in each step"""

    needs: ClassVar[Access] = "gradients"

    def fit(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Tensor:
        """Optimise one perturbation on the examples of a batch and return it, of shape (1, *features)."""
        return self.refit(0, model, batch, threat, rng=rng)

    def refit(self, k: int, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Tensor:
        """Return the perturbation of fit number `k`. Each fit has its own random numbers and, in an untargeted attack,
        begins towards another class.
        """
        norm, draws = expect_norm(threat.constraint, self, Linf, L2), rng.at("fit", k)
        delta, everywhere = torch.zeros_like(batch.x[:1]), Bounds(-torch.inf, torch.inf)
        momentum = torch.zeros_like(delta)
        towards = None if batch.target is not None else _likely(model, batch, k)
        for step in range(self.steps):
            minibatch = draw_minibatch(batch, self.batch, draws, step)
            if towards is not None and step < _BEGIN * self.steps:
                minibatch = minibatch.towards(torch.full_like(minibatch.y, towards))
            grad, _ = gradient(model, minibatch.at(model.bounds.clamp(minibatch.x + delta)), truncated)
            slope = grad.sum(0, keepdim=True)
            momentum = self.momentum * momentum + slope / slope.abs().mean().clamp_min(_TINY)
            uphill = norm.steepest(momentum, delta, everywhere)
            size = self.step_size * norm.eps * cosine(step, self.steps)
            delta = norm.project(delta + size * uphill, torch.zeros_like(delta), everywhere)
        return delta

    def fitted(self, learned: Tensor) -> Added:
        """Return the attack that adds the fitted perturbation `learned` to every input."""
        return Added(learned)

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        raise unfitted(self)


def _likely(model: Model, batch: Batch, k: int) -> int:
    """The class of rank `k` (modulo the number of classes) by mean probability for examples of other classes."""
    with torch.no_grad():
        logits = model(batch.x, batch.ids)
    probabilities = logits.softmax(1).double().scatter(1, batch.y[:, None], 0.0).mean(0)
    return int(probabilities.argsort(descending=True, stable=True)[k % len(probabilities)])
