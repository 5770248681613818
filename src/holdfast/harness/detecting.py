"""Attacks on a model with a detector: their loss, their examples and their combined results."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from holdfast.core.evidence import Columns
from holdfast.core.guard import Aim
from holdfast.core.names import slug
from holdfast.core.types import Mask, PerExample
from holdfast.harness.plan import DETECTION, Against, Plan
from holdfast.ops.detection import balance, median_width, threshold

PASSES = tuple(slug(member.name) for member in DETECTION)
"""The stages of the passes on a detector; the first ignores the detector."""

SOFTNESS = 0.2
"""Width of the transition of the gradient from network to detector, as a share of the median margin; see
`Aim.softness`.

With a sharp transition, steps alternate between the two goals."""


def on_detector(plan: Plan, *, rejects: bool) -> Plan:
    """The plan with the passes on a detector if the model has one, and without attacks on detectors otherwise."""
    if not rejects:
        return replace(plan, adaptive=tuple(member for member in plan.adaptive if member.against is None))
    seen = plan.attacked and plan.threat.goal is None and plan.threat.gives("gradients")
    return replace(plan, detection=seen)


def aim_of(against: Against, clean: Columns) -> Aim:
    """How an attack treats the detector, computed from the detector's scores of the clean inputs."""
    if not against.weight:
        return Aim(beyond=torch.inf)
    scores, width = clean["score"], median_width(clean["class_margin"])
    beyond = 0.0 if against.rejecting is None else threshold(scores, against.rejecting)
    return Aim(against.weight * balance(scores, width), beyond, SOFTNESS * width)


def undetected(aim: Aim, by_stage: Mapping[str, Columns]) -> Mask:
    """Examples that no earlier pass has made both misclassified and below the threshold of `aim`.

    For the pass that ignores the detector: all examples that the network classifies correctly.
    """
    if aim.beyond == torch.inf:
        return by_stage["clean"]["class_margin"] > 0
    return lowest(by_stage) > aim.beyond


def lowest(by_stage: Mapping[str, Columns]) -> PerExample:
    """The lowest score of a misclassified input of each example, over the clean input and all passes; inf if none."""
    clean = by_stage["clean"]
    least = torch.where(clean["class_margin"] > 0, torch.inf, clean["score"])
    for name, columns in by_stage.items():
        if name in PASSES:
            least = torch.minimum(least, columns["score"])
    return least
