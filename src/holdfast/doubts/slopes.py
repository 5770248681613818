"""Whether there is a gradient, and whether it predicts what a small step does."""

import torch
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Inputs, Logits, Mask, PerExample
from holdfast.ops.ascent import gradient
from holdfast.ops.logits import scale
from holdfast.ops.losses import cross_entropy, margin_loss

REACH = 0.05
"""Length of the step in multiples of eps: less than half of one step of PGD-20."""
_NEAREST = 1e-3  # of the input's own scale: a point beside the clean one where eps is 0
_RESOLVED = 1e-4  # a predicted change below this share of the logits drowns in float32 rounding


def gradients(model: Model, batch: Batch, threat: ThreatModel, rng: Draws) -> dict[str, Tensor]:
    """At the clean and at a random point: is the margin's gradient `dead`, and the `ratio` of measured to predicted
    change along it (NaN where the prediction is too small to be measured). `flat`: the cross-entropy's gradient is zero
    at the clean input though the margin's is not.

    Costs 5 forwards and 3 backwards.
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
    """Zero everywhere, or not a number somewhere."""
    wide = grad.flatten(1)
    return (wide == 0).all(1) | ~wide.isfinite().all(1)


def _ratio(model: Model, batch: Batch, threat: ThreatModel, grad: Inputs, logits: Logits) -> PerExample:
    """Measured over predicted change of the margin along the steepest small step that stays inside the box."""
    size = REACH * threat.constraint.eps
    step = size * threat.constraint.steepest(grad, batch.x, model.bounds)
    moved = model.bounds.clamp(batch.x + step)
    predicted = ((moved - batch.x) * grad).flatten(1).sum(1)
    with torch.no_grad():
        measured = margin_loss(model(moved, batch.ids), batch) - margin_loss(logits, batch)
    seen = predicted > _RESOLVED * scale(logits)
    return torch.where(seen, measured / predicted, torch.nan)
