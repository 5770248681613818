"""Search for inputs of a box that lead to a target, by projected gradient descent on the functions of the target.

Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018, arXiv:1706.06083. Differs: the
loss is the largest of the functions for one half of the starts, and the sum of their positive parts for the other.
"""

import math
import time

import torch
from torch import Tensor

from holdfast.certifiers.vnnlib.problems import Problem, UnsafeSet
from holdfast.certifiers.vnnlib.subject import JoinedNetworks, Witness
from holdfast.core.draws import Draws

_ELEMENTS = 2**22
"""largest number of values of the inputs that are changed at once"""


def falsified(
    subject: JoinedNetworks, problem: Problem, rng: Draws, *, starts: int, steps: int, deadline: float
) -> Witness | None:
    """Return an input of the box that leads to a target, or None if `starts` descents for each target lead to none.

    `deadline` is a value of `time.perf_counter()`. The first start is the middle of the box, the others are random.
    """
    graph = subject.graph.to(torch.float32)
    at_once = max(1, _ELEMENTS // (starts * graph.shape.numel()))
    for first in range(0, len(problem.targets), at_once):
        targets = problem.targets[first : first + at_once]
        ids = torch.arange(first, first + len(targets)).repeat_interleave(starts)
        noise = rng.at("start").uniform(
            ids * starts + torch.arange(starts).repeat(len(targets)), len(problem.low)
        )
        noise[::starts] = 0.5
        low, high = problem.low.float(), problem.high.float()
        width = high - low
        x = low + width * noise
        for step in range(steps + 1):
            x.requires_grad_()
            values = graph(x.reshape(len(x), *graph.shape))
            losses = []
            for j, target in enumerate(targets):
                mine = values[j * starts : (j + 1) * starts]
                witness = _checked(
                    subject, problem, target, x.detach()[j * starts : (j + 1) * starts], mine.detach()
                )
                if witness is not None:
                    return witness
                losses.append(_loss(target, mine))
            if step == steps or time.perf_counter() >= deadline:
                break
            (slope,) = torch.autograd.grad(torch.stack(losses).sum(), x)
            size = 0.25 * (1 + math.cos(math.pi * step / steps)) / 2 + 0.002
            x = torch.minimum(torch.maximum(x.detach() - size * width * slope.sign(), low), high)
        if time.perf_counter() >= deadline:
            return None
    return None


def _loss(target: UnsafeSet, values: Tensor) -> Tensor:
    functions = values @ target.rows.t().to(values) + target.constants.to(values)
    if not functions.shape[1]:
        return values.sum() * 0
    half = len(values) // 2
    return functions[half:].amax(1).sum() + functions[:half].clamp(min=0).sum()


def _checked(
    subject: JoinedNetworks, problem: Problem, target: UnsafeSet, x: Tensor, values: Tensor
) -> Witness | None:
    """A confirmed witness among inputs whose values with 32 bits lead to the target, or nearly."""
    functions = values.double() @ target.rows.t() + target.constants
    near = (functions <= 1e-5 * (1 + functions.abs())).all(1)
    return subject.confirmed(x[near], problem, target) if near.any() else None
