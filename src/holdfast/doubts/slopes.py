"""A probe that tests whether gradients are nonzero, and whether they predict the effect of a small step."""

import torch
from torch import Tensor

from holdfast.attacks.parts.ascent import gradient
from holdfast.attacks.parts.losses import cross_entropy, margin_loss
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.logit_scale import scale
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Inputs, Logits, Mask, PerExample
from holdfast.doubts.protocol import Probe

REACH = 0.05
"""length of the step in multiples of eps: less than half of one step of PGD-20"""
_NEAREST = 1e-3  # share of the magnitude of the input: a point close to the clean one if eps is 0
_RESOLVED = 1e-4  # a predicted change below this share of the logits is within float32 rounding errors


def gradient_properties(model: Model, batch: Batch, threat: ThreatModel, rng: Draws) -> dict[str, Tensor]:
    """Return for each example whether the gradient of the margin is zero, and how well it predicts the effect of a
    small step.

    `dead`: the gradient is zero or not finite at both points. `ratio` (n, 2): measured change along the gradient,
    divided by the predicted one; NaN if the prediction is too small. `flat`: the gradient of the cross-entropy is dead
    at the clean input and that of the margin is not. Cost: 5 forward and 3 backward passes.
    """
    points = (batch.x, threat.constraint.sample(batch, model.bounds, rng.at("point")))
    dead, ratios = torch.ones_like(batch.y, dtype=torch.bool), []
    for x in points:
        grad, logits = gradient(model, batch.at(x), margin_loss, raw=True)
        dead &= _is_dead(grad)
        ratios.append(_ratio(model, batch.at(x), threat, grad.nan_to_num(0.0, 0.0, 0.0), logits))
    flat = _is_dead(gradient(model, batch, cross_entropy, raw=True)[0]) & ~dead
    return {"dead": dead, "flat": flat, "ratio": torch.stack(ratios, dim=1)}


def _is_dead(grad: Inputs) -> Mask:
    """Whether a gradient is zero everywhere, or not finite somewhere."""
    values = grad.flatten(1)
    return (values == 0).all(1) | ~values.isfinite().all(1)


def _ratio(model: Model, batch: Batch, threat: ThreatModel, grad: Inputs, logits: Logits) -> PerExample:
    """Measured to predicted change of the margin along the steepest small step inside the bounds."""
    size = REACH * threat.constraint.eps
    step = size * threat.constraint.steepest(grad, batch.x, model.bounds)
    # the prediction is for the step that remains inside the bounds
    moved = model.bounds.clamp(batch.x + step)
    predicted = ((moved - batch.x) * grad).flatten(1).sum(1)
    with torch.no_grad():
        measured = margin_loss(model(moved, batch.ids), batch) - margin_loss(logits, batch)
    resolved = predicted > _RESOLVED * scale(logits)
    return torch.where(resolved, measured / predicted, torch.nan)


GRADIENTS = Probe(
    "gradients", "gradients", gradient_properties, breaks=False, applies=lambda threat: True, order=1
)
