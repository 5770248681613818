"""Gradient ascent on a loss inside a constraint, used by FGSM, BIM, PGD, momentum PGD and adversarial training."""

import math
from collections.abc import Callable
from typing import Literal

import torch

from holdfast.attacks.parts.best import Best
from holdfast.attacks.parts.losses import Loss, margin, margin_loss
from holdfast.core.batch import Batch
from holdfast.core.constraints import Constraint
from holdfast.core.gradients import input_gradient, levelled
from holdfast.core.model import Model
from holdfast.core.types import Inputs, Labels, Logits, PerExample

Schedule = Callable[[int, int], float]
"""function `schedule(step, steps)` that returns the factor of the step size"""


def flat(step: int, steps: int) -> float:
    """Return the factor of the step size in a constant schedule, which is 1 in every step."""
    return 1.0


def cosine(step: int, steps: int) -> float:
    """Return the factor of the step size in a cosine schedule, which falls from 2 to 0. The total length of all steps
    is about that of a constant schedule.
    """
    return 1.0 + math.cos(math.pi * step / steps)


def gradient(model: Model, batch: Batch, loss: Loss, *, raw: bool = False) -> tuple[Inputs, Logits]:
    """Return the gradient of the summed loss with respect to the inputs of the batch, and the logits, from one forward
    and one backward pass.

    The gradient is zero where the model cuts the graph, for example with a comparison or a rounding to integers. NaN
    and infinity are replaced by zero, except with `raw`.
    """
    x = batch.x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(x, batch.ids)
        if not logits.requires_grad:
            return torch.zeros_like(x), logits
        return input_gradient(loss(logits, batch), x, raw=raw), logits.detach()


def ascend(
    model: Model,
    batch: Batch,
    start: Inputs,
    loss: Loss,
    constraint: Constraint,
    *,
    steps: int,
    step_size: float,
    schedule: Schedule = flat,
    momentum: float = 0.0,
    drop: bool = True,
    keep: Literal["best", "last"] = "best",
    aim: Labels | None = None,
) -> tuple[Inputs, PerExample]:
    """Maximise a loss by gradient ascent inside a constraint from the points `start`, and return for each example the
    point of lowest margin on its path and this margin.

    The margin of each point comes from the forward pass of its gradient, that of the last point from an additional
    forward pass. With `drop`, broken examples are dropped from the path. `keep="last"` returns the end of the path,
    drops no example and makes no additional forward pass (the margin is then that of the last point but one); it is
    used for training and for transfer. `aim` is the class that the loss targets; any misclassification counts as
    success. Cost: `steps` forwards and backwards, and one forward with `keep="best"`.
    """
    best, remaining, x = Best(batch), batch, start.detach()
    direction = torch.zeros_like(x) if momentum else None
    for step in range(steps):
        grad, logits = gradient(model, remaining.at(x) if aim is None else remaining.at(x).towards(aim), loss)
        margins = margin(logits, remaining)
        if keep == "best":
            best.offer(remaining, x, margins)
            surviving = margins > 0
            if drop and not surviving.all():
                if not surviving.any():
                    return best.x, best.margin
                remaining, x, grad = remaining.take(surviving), x[surviving], grad[surviving]
                direction = None if direction is None else direction[surviving]
                aim = None if aim is None else aim[surviving]
        if direction is not None:
            direction = momentum * direction + levelled(grad)
            grad = direction
        climb = constraint.steepest(grad, x, model.bounds)
        stepped = torch.add(x, climb, alpha=step_size * schedule(step, steps))
        x = constraint.project(stepped, remaining.x, model.bounds)
    if keep == "last":
        return x, margins
    with torch.no_grad():
        best.offer(remaining, x, margin(model(x, remaining.ids), remaining))
    return best.x, best.margin


def descend(
    model: Model,
    batch: Batch,
    start: Inputs,
    constraint: Constraint,
    *,
    steps: int,
    reach: float,
    aim: Labels | None = None,
) -> tuple[Inputs, PerExample]:
    """Minimise the margin by gradient steps from the points `start`, and return the points of lowest margin and these
    margins. The path is `reach` times eps long, with step sizes along a cosine.
    """
    size = reach * constraint.eps / steps
    return ascend(
        model, batch, start, margin_loss, constraint, steps=steps, step_size=size, schedule=cosine, aim=aim
    )
