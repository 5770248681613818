"""Attacks on a model with a detector: what they aim at, on which examples, and what came of them together."""

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
"""The stages of the passes on a detector; the first is that of who knows of none."""

SOFTNESS = 0.2
"""Over what share of the median margin the gradient goes from network to detector; see `Aim.softness`.

Along a sharp edge, steps jump between making the network wrong and calming the detector.
"""


def on_detector(plan: Plan, *, rejects: bool) -> Plan:
    """The plan with the passes on a detector where the model has one, and without attacks on one where it has none."""
    if not rejects:
        return replace(plan, adaptive=tuple(member for member in plan.adaptive if member.against is None))
    seen = plan.attacked and plan.threat.goal is None and plan.threat.gives("gradients")
    return replace(plan, detection=seen)


def aim_of(against: Against, clean: Columns) -> Aim:
    """How an attack takes the detector, given what that says of the clean inputs."""
    if not against.weight:
        return Aim(beyond=torch.inf)
    scores, width = clean["score"], median_width(clean["class_margin"])
    beyond = 0.0 if against.rejecting is None else threshold(scores, against.rejecting)
    return Aim(against.weight * balance(scores, width), beyond, SOFTNESS * width)


def undetected(aim: Aim, by_stage: Mapping[str, Columns]) -> Mask:
    """Which examples no pass yet has brought to be wrong and below the threshold of `aim`.

    Who knows of no detector is asked for all that the network alone has right.
    """
    if aim.beyond == torch.inf:
        return by_stage["clean"]["class_margin"] > 0
    return lowest(by_stage) > aim.beyond


def lowest(by_stage: Mapping[str, Columns]) -> PerExample:
    """The lowest score of an input that the network alone has wrong, of the clean one and of all passes; else inf."""
    clean = by_stage["clean"]
    least = torch.where(clean["class_margin"] > 0, torch.inf, clean["score"])
    for name, columns in by_stage.items():
        if name in PASSES:
            least = torch.minimum(least, columns["score"])
    return least
