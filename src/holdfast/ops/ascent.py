"""Climbing a loss inside a constraint: the one loop under FGSM, BIM, PGD, momentum PGD and adversarial training."""

import math
from collections.abc import Callable
from typing import Literal

import torch

from holdfast.core.batch import Batch
from holdfast.core.constraints import Constraint
from holdfast.core.model import Model
from holdfast.core.types import Inputs, Labels, Logits, PerExample
from holdfast.ops.best import Best
from holdfast.ops.gradients import input_gradient, levelled
from holdfast.ops.losses import Loss, margin, margin_loss

Schedule = Callable[[int, int], float]
"""`schedule(step, steps)`: what the step size is multiplied with."""


def flat(step: int, steps: int) -> float:
    """The same step size throughout."""
    return 1.0


def cosine(step: int, steps: int) -> float:
    """From two down to zero, so that the path is as long as with `flat`."""
    return 1.0 + math.cos(math.pi * step / steps)


def gradient(model: Model, batch: Batch, loss: Loss, *, raw: bool = False) -> tuple[Inputs, Logits]:
    """Gradient of the summed loss with respect to `batch.x`, and the logits there: one forward, one backward.

    Zero where the model cuts the graph, as a comparison or a rounding to integers does, and in place of NaN and
    infinity, which only `raw` leaves in it.
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
    """Climb `loss` from `start`; returns the point of lowest margin on each path and that margin.

    Every point is judged by the logits of its own gradient pass, the last one by one more forward; with `drop`, an
    example leaves once it is broken. `keep="last"` returns the end of the path, drops nobody and spends no extra
    forward (the margin is then that of the last point judged): for training and for examples made to transfer.
    `aim` is a class that the loss goes for while any misclassification wins.
    Cost: `steps` forwards and backwards, and one forward with `keep="best"`.
    """
    best, left, x = Best(batch), batch, start.detach()
    direction = torch.zeros_like(x) if momentum else None
    for step in range(steps):
        grad, logits = gradient(model, left.at(x) if aim is None else left.at(x).towards(aim), loss)
        height = margin(logits, left)
        if keep == "best":
            best.offer(left, x, height)
            standing = height > 0
            if drop and not standing.all():
                if not standing.any():
                    return best.x, best.margin
                left, x, grad = left.take(standing), x[standing], grad[standing]
                direction = None if direction is None else direction[standing]
                aim = None if aim is None else aim[standing]
        if direction is not None:
            direction = momentum * direction + levelled(grad)
            grad = direction
        climb = constraint.steepest(grad, x, model.bounds)
        moved = torch.add(x, climb, alpha=step_size * schedule(step, steps))
        x = constraint.project(moved, left.x, model.bounds)
    if keep == "last":
        return x, height
    with torch.no_grad():
        best.offer(left, x, margin(model(x, left.ids), left))
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
    """Descend the margin from `start` on a path of `reach` times eps, its steps along a cosine; else as `ascend`."""
    size = reach * constraint.eps / steps
    return ascend(
        model, batch, start, margin_loss, constraint, steps=steps, step_size=size, schedule=cosine, aim=aim
    )
