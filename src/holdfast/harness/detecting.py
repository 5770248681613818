"""How attacks on a model that rejects inputs treat its detector: they ignore it, or evade it at a given threshold."""

import torch

from holdfast.core.evidence import Columns
from holdfast.core.guard import Aim
from holdfast.harness.stage import Against
from holdfast.ops.detection import balance, median_width, threshold

SOFTNESS = 0.2
"""Width of the transition of the gradient from network to detector, as a fraction of the median margin.

See `Aim.softness`. With a sharp transition, the steps of an attack alternate between the two goals.
"""


def aim_of(against: Against, clean: Columns) -> Aim:
    """Return the weight and the threshold with which an attack evades the detector of a model, computed from the
    detector's scores for clean inputs.
    """
    if not against.weight:
        return Aim(beyond=torch.inf)
    scores, width = clean["score"], median_width(clean["class_margin"])
    beyond = 0.0 if against.rejecting is None else threshold(scores, against.rejecting)
    return Aim(against.weight * balance(scores, width), beyond, SOFTNESS * width)
