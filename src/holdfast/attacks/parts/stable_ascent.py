"""Gradient ascent on the expectation of the margin, whose number of draws increases until the sign of the mean gradient
is stable.

Expectation over transformation: Athalye et al., "Synthesizing robust adversarial examples", ICML 2018,
arXiv:1707.07397. Differs from the paper: the number of draws is not fixed. The mean gradient is computed from two
halves of the draws, and the number of draws is doubled while the signs of the halves differ.
"""

import math

import torch

from holdfast.attacks.parts.ascent import gradient
from holdfast.attacks.parts.losses import margin_loss
from holdfast.attacks.parts.starts import unit_noise
from holdfast.core.batch import Batch
from holdfast.core.constraints import Constraint
from holdfast.core.draws import Draws
from holdfast.core.gradients import levelled
from holdfast.core.model import Model
from holdfast.core.types import Inputs

FIRST, LIMIT = 4, 64
"""numbers of draws of a gradient: the first one, and the largest one"""
STABLE = 0.9
"""share of the gradient (by absolute value) in which the signs of the halves must agree; for pure noise it is 0.71"""
_STEPS = 20  # fewest steps for which the budget must suffice, which limits the number of draws
_MOMENTUM = 0.5


def stable_ascent(
    model: Model, batch: Batch, constraint: Constraint, passes: int, noise: float, rng: Draws
) -> tuple[Inputs, int]:
    """Maximise the expected margin loss of a randomised model inside a constraint, and return the last points and the
    largest number of draws of a gradient.

    `noise` is the length of the noise that is added to the inputs of a deterministic model, in multiples of eps. At
    most `passes` forward and backward passes are made for each example. Step sizes follow a cosine from eps / 2 to 0.
    """
    x = constraint.sample(batch, model.bounds, rng.at("start"))
    draws, spent, direction, step = min(FIRST, max(2, passes // (2 * _STEPS))), 0, torch.zeros_like(x), 0
    while spent + 2 * draws <= passes:
        halves = [
            _mean_gradient(
                model, batch.at(x), constraint, draws // 2, noise, rng.at("step", step, "half", half)
            )
            for half in range(2)
        ]
        spent, step = spent + 2 * draws, step + 1
        direction = _MOMENTUM * direction + levelled(halves[0] + halves[1])
        size = constraint.eps * (1 + math.cos(math.pi * min(spent / passes, 1.0))) / 4
        moved = x + size * constraint.steepest(direction, x, model.bounds)
        x = constraint.project(moved, batch.x, model.bounds)
        if _agreement(*halves) < STABLE and 2 * draws <= min(LIMIT, passes // (2 * _STEPS)):
            draws *= 2
    return x, draws


def _mean_gradient(
    model: Model, batch: Batch, constraint: Constraint, draws: int, noise: float, rng: Draws
) -> Inputs:
    total = torch.zeros_like(batch.x)
    for draw in range(draws):
        x = batch.x
        if noise:
            x = model.bounds.clamp(
                x + noise * constraint.eps * unit_noise(batch, constraint, rng.at(draw)).to(x)
            )
        total += gradient(model, batch.at(x), margin_loss)[0]
    return total / draws


def _agreement(first: Inputs, second: Inputs) -> float:
    """Share of two gradients, by absolute value, in which they have the same sign; the mean over the examples."""
    size = (first + second).abs().flatten(1)
    same = (first.sign() == second.sign()).flatten(1)
    return float(((size * same).sum(1) / size.sum(1).clamp_min(1e-30)).mean())
