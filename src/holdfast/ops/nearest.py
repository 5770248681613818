"""Choice of target classes: those whose linearised boundaries are nearest to the clean input.

Melamed, Yehudai, Shamir, "MALT powers up adversarial attacks", NeurIPS 2024, arXiv:2407.02240. Differs from the paper:
slopes are measured by a step of length one in the constraint's own norm.
"""

import torch
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.constraints import Constraint
from holdfast.core.model import Model
from holdfast.ops.gradients import input_gradient
from holdfast.ops.losses import likeliest

_CANDIDATES = 9  # number of likeliest wrong classes that are compared; all of them if there are ten classes


def nearest_classes(model: Model, batch: Batch, constraint: Constraint, k: int) -> Tensor:
    """Return the (up to) k wrong classes nearest to `batch.x` by their linearised boundaries, nearest first, (n, k).

    Cost: a forward, and a backward for each of nine classes at most.
    """
    x = batch.x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(x, batch.ids)
        rivals = likeliest(logits.detach(), batch.y, _CANDIDATES)
        gaps = logits.gather(1, batch.y[:, None]) - logits.gather(1, rivals)
    distances = []
    for gap in gaps.unbind(1):
        grad = input_gradient(gap, x, again=True)
        slope = (grad * constraint.steepest(grad, batch.x, model.bounds)).flatten(1).sum(1)
        distances.append(gap.detach() / slope.clamp_min(1e-12))
    order = torch.stack(distances, dim=1).nan_to_num(torch.inf).argsort(dim=1, stable=True)
    return rivals.gather(1, order[:, :k])
