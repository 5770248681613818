"""Optimisation of the slopes of ReLUs, and of Lagrange multipliers for assumed signs, in backward substitutions.

Alpha-CROWN: Xu et al., "Fast and Complete: Enabling Complete Verification with Rapid and Massively Parallel Incomplete
Verifiers", ICLR 2021, arXiv:2011.13824. Beta-CROWN: Wang et al., "Beta-CROWN: Efficient Bound Propagation with
Per-neuron Split Constraints for Neural Network Robustness Verification", NeurIPS 2021, arXiv:2103.06624. Differs: the
bounds of values in between are optimised one layer after another, each value for itself, and only those whose sign is
not known, instead of all together for the final bound.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.certifiers.bounds.crown import NO_CHOICES, Choices, one_hot, substitute
from holdfast.certifiers.bounds.graph import Relaxation
from holdfast.certifiers.bounds.operations import Lines, ReLU

_RATE, _DECAY = 0.25, 0.93
"""step size of Adam for slopes, and its factor after each step"""
_ELEMENTS = 2**21
"""largest number of coefficients of one value that are optimised at once"""


@dataclass(frozen=True)
class Optimised:
    """Result of an optimisation."""

    lower: Tensor
    """lower bounds (n, k) of the linear functions, reduced by the rounding error"""
    choices: Choices
    """the choices with which they were computed"""


def optimised(
    relaxation: Relaxation,
    index: int,
    coefficients: Tensor,
    *,
    steps: int,
    start: Choices = NO_CHOICES,
    signs: Mapping[int, Tensor] | None = None,
    until_positive: bool = True,
) -> Optimised:
    """Return lower bounds of linear functions of a value, with slopes that are optimised by Adam.

    `coefficients` are (n, k, *shape). `signs` (n, *shape), by the index of a ReLU, are 1 for inputs that are assumed to
    be nonnegative, -1 for nonpositive ones and 0 otherwise; their multipliers are optimised too. With `until_positive`,
    functions with a positive bound are not optimised further.
    """
    slopes = {i: _initial(relaxation, i, coefficients, start) for i in _free(relaxation, index)}
    multipliers = {
        i: start.multipliers[i].abs().clone() if i in start.multipliers else _zeros(sign, coefficients)
        for i, sign in (signs or {}).items()
    }
    parameters = [*slopes.values(), *multipliers.values()]
    if not parameters or not steps:
        return Optimised(substitute(relaxation, index, coefficients, start).lower, start)
    for parameter in parameters:
        parameter.requires_grad_()
    groups = [
        {"params": list(slopes.values()), "lr": _RATE},
        {"params": list(multipliers.values()), "lr": _RATE / 2},
    ]
    optimiser = torch.optim.Adam([group for group in groups if group["params"]], maximize=True)
    best = torch.full(
        coefficients.shape[:2], -torch.inf, dtype=coefficients.dtype, device=coefficients.device
    )
    kept = [parameter.detach().clone() for parameter in parameters]
    for step in range(steps + 1):
        with torch.enable_grad():
            choices = Choices(slopes, {i: multipliers[i] * (signs or {})[i][:, None] for i in multipliers})
            lower = substitute(relaxation, index, coefficients, choices, rounded=False).lower
            better = lower.detach() > best
            best = torch.where(better, lower.detach(), best)
            for known, parameter in zip(kept, parameters, strict=True):
                mask = better.reshape(*better.shape, *(1,) * (parameter.dim() - 2))
                known.copy_(torch.where(mask, parameter.detach(), known))
            open_rows = best <= 0 if until_positive else torch.ones_like(better)
            if step == steps or not open_rows.any():
                break
            optimiser.zero_grad(set_to_none=True)
            torch.autograd.backward((lower * open_rows).sum())
        optimiser.step()
        with torch.no_grad():
            for parameter in slopes.values():
                parameter.clamp_(0, 1)
            for parameter in multipliers.values():
                parameter.clamp_(min=0)
        for group in optimiser.param_groups:
            group["lr"] *= _DECAY
    final = dict(zip(slopes, kept, strict=False))
    chosen = {
        i: known * (signs or {})[i][:, None]
        for i, known in zip(multipliers, kept[len(slopes) :], strict=True)
    }
    choices = Choices(final, chosen)
    with torch.no_grad():
        return Optimised(substitute(relaxation, index, coefficients, choices).lower, choices)


def _free(relaxation: Relaxation, index: int) -> list[int]:
    """ReLUs before a value that have an input of unknown sign."""
    graph = relaxation.graph
    free, ancestors = [], graph.ancestors(index)
    for i in graph.nonlinear:
        if i in ancestors and isinstance(graph.node(i).operation, ReLU):
            low, high = relaxation.bound(graph.node(i).inputs[0])
            if bool(((low < 0) & (high > 0)).any()):
                free.append(i)
    return free


def _initial(relaxation: Relaxation, index: int, coefficients: Tensor, start: Choices) -> Tensor:
    n, k = coefficients.shape[:2]
    if index in start.slopes:
        return start.slopes[index].detach().clone()
    lines = relaxation.lines_of(index)
    assert isinstance(lines, Lines)
    return lines.lower_slope[:, None].expand(n, k, *lines.lower_slope.shape[1:]).detach().clone()


def _zeros(sign: Tensor, coefficients: Tensor) -> Tensor:
    return torch.zeros(
        len(sign), coefficients.shape[1], *sign.shape[1:], dtype=coefficients.dtype, device=sign.device
    )


def sharpen(relaxation: Relaxation, steps: int, deadline: float = math.inf) -> bool:
    """Tighten the bounds of all values that are inputs of ReLUs and whose sign is not known, layer by layer, until the
    deadline, a value of `time.perf_counter()`. Return whether it was not reached.
    """
    return all(
        _sharpen(relaxation, index, steps, deadline)
        for index in relaxation.graph.bounded
        if index and not relaxation.graph.ancestors(index).isdisjoint(relaxation.graph.nonlinear)
    )


def _sharpen(relaxation: Relaxation, index: int, steps: int, deadline: float) -> bool:
    low, high = relaxation.bound(index)
    unknown = ((low < 0) & (high > 0)).flatten(1)
    most = int(unknown.sum(1).max())
    if not most:
        return True
    chosen = unknown.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
    shape = relaxation.graph.shape_of(index)
    n, below, above = len(low), low.flatten(1).clone(), high.flatten(1).clone()
    at_once = max(
        1, _ELEMENTS // (2 * n * max(relaxation.graph.shape_of(i).numel() for i in range(index + 1)))
    )
    in_time = True
    for start in range(0, most, at_once):
        in_time = time.perf_counter() < deadline
        if not in_time:
            break
        rows = chosen[:, start : start + at_once]
        signs = torch.ones(len(rows), 2 * rows.shape[1], dtype=low.dtype, device=low.device)
        signs[:, rows.shape[1] :] = -1.0
        functions = one_hot(rows.repeat(1, 2), signs, shape)
        lower = optimised(relaxation, index, functions, steps=steps).lower
        half = rows.shape[1]
        below.scatter_(1, rows, torch.maximum(below.gather(1, rows), lower[:, :half]))
        above.scatter_(1, rows, torch.minimum(above.gather(1, rows), -lower[:, half:]))
    relaxation.replace_bounds(index, below.view_as(low), above.view_as(high))
    return in_time
