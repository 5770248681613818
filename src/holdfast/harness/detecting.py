"""How attacks treat the detector of a model that rejects."""

import torch

from holdfast.core.evidence import Columns
from holdfast.core.guard import Aim
from holdfast.harness.stage import Against
from holdfast.ops.detection import balance, median_width, threshold

SOFTNESS = 0.2
"""Width of the transition of the gradient from network to detector, as a share of the median margin; see
`Aim.softness`.

With a sharp transition, steps alternate between the two goals."""


def aim_of(against: Against, clean: Columns) -> Aim:
    """How an attack treats the detector, computed from the detector's scores of the clean inputs."""
    if not against.weight:
        return Aim(beyond=torch.inf)
    scores, width = clean["score"], median_width(clean["class_margin"])
    beyond = 0.0 if against.rejecting is None else threshold(scores, against.rejecting)
    return Aim(against.weight * balance(scores, width), beyond, SOFTNESS * width)
