"""Tests whether the logits of an input change: in a second call, in another order, in a smaller batch, and later."""

import torch
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.ops.logits import change


def steadiness(model: Model, batch: Batch, threat: ThreatModel, rng: Draws) -> dict[str, Tensor]:
    """Relative change of each example's logits: `repeat`, `order`, `batch`, and `history` with the same torch seed.

    Cost: 6 forward passes. The random state of torch is restored.
    """
    backwards = torch.arange(len(batch) - 1, -1, -1, device=batch.ids.device)
    halves = batch.split(max(1, len(batch) // 2))
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        first = model(batch.x, batch.ids)
        second = model(batch.x, batch.ids)
        turned = model(batch.x[backwards], batch.ids[backwards])[backwards]
        parts = torch.cat([model(part.x, part.ids) for part in halves])
        torch.manual_seed(0)
        later = model(batch.x, batch.ids)
    return {
        "repeat": change(first, second),
        "order": change(first, turned),
        "batch": change(first, parts),
        "history": change(first, later),
    }
