"""The attack inside training: a few steps up a loss, the end of the path kept, no example spared."""

from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Inputs
from holdfast.ops.ascent import ascend
from holdfast.ops.losses import Loss, cross_entropy


def worst(
    model: Model,
    batch: Batch,
    threat: ThreatModel,
    rng: Draws,
    *,
    steps: int,
    reach: float,
    loss: Loss = cross_entropy,
) -> Inputs:
    """Where `steps` steps up the loss end that are `reach` times eps long together, from a random start.

    Cost: as many forwards and backwards.
    """
    constraint = threat.constraint
    start = constraint.sample(batch, model.bounds, rng.at("start"))
    size = reach * constraint.eps / steps
    return ascend(model, batch, start, loss, constraint, steps=steps, step_size=size, keep="last")[0]
