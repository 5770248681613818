"""Whether the same input gives the same logits: in a second call, in another order, in a smaller batch, later on."""

import torch
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.ops.logits import change


def steadiness(model: Model, batch: Batch, threat: ThreatModel, rng: Draws) -> dict[str, Tensor]:
    """Relative change of each example's logits: `repeat`, `order`, `batch`, and `history` under the same torch seed.

    Costs 6 forwards. Torch's own random state is left as it was.
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
