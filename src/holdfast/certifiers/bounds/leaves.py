"""Exact solution of a subproblem in which all signs of inputs of ReLUs are known, by a linear program.

There the network is linear, so that the smallest value of the claim is the optimum of a linear program. Its dual
solution gives Lagrange multipliers, with which backward substitution proves the bound: the solver need not be trusted.
Bunel et al., JMLR 2020, arXiv:1909.06588.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linprog
from torch import Tensor

from holdfast.certifiers.bounds.crown import Choices, substitute
from holdfast.certifiers.bounds.relaxation import Relaxation

_PENALTY = 1e3
"""cost of the violation of an assumed sign, in units of the largest coefficient of the claim: signs that contradict
each other give a positive optimum, and multipliers that prove it"""


class SolvedLeaf(NamedTuple):
    """Result of the linear program."""

    bound: float
    """proved lower bound of the largest function of the claim; minus infinity if the solver failed"""
    point: Tensor
    """input (1, *shape) of the region at which the largest function is smallest, up to rounding"""


def solved_leaf(
    relaxation: Relaxation, signs: Mapping[int, Tensor], rows: Tensor, constants: Tensor
) -> SolvedLeaf:
    """Return the bound of a claim with the functions `rows` (k, outputs) and `constants` (k) for one subproblem.

    `relaxation` has one example, whose region is a box, and bounds that are cut at zero where a sign is assumed;
    `signs` are the assumed signs (1, *shape) by the index of the ReLU.
    """
    graph, region = relaxation.graph, relaxation.region
    claim, claim_constants = _linear(relaxation, graph.output, rows[None])
    assumed, places = [], []
    for index, sign in signs.items():
        flat = sign.flatten().to(rows)
        chosen = flat.nonzero()[:, 0]
        if not len(chosen):
            continue
        functions = torch.zeros(1, len(chosen), len(flat), dtype=rows.dtype, device=rows.device)
        functions[0, torch.arange(len(chosen)), chosen] = flat[chosen]
        node = graph.node(index).inputs[0]
        assumed.append(_linear(relaxation, node, functions.view(1, len(chosen), *sign.shape[1:])))
        places.append((index, chosen))
    middle = (region.low + region.high) / 2
    solution = _program(
        np.concatenate((claim, *(each for each, _ in assumed))),
        np.concatenate((claim_constants + constants.double().cpu().numpy(), *(each for _, each in assumed))),
        len(rows),
        region.low.double().flatten().cpu().numpy(),
        region.high.double().flatten().cpu().numpy(),
    )
    if solution is None:
        return SolvedLeaf(-np.inf, middle)
    x, weights, multipliers = solution
    point = torch.as_tensor(x).to(region.low).view_as(region.low)
    weight = torch.as_tensor(weights).to(rows)
    chosen_multipliers, start = {}, 0
    for index, chosen in places:
        values = torch.zeros(signs[index].numel(), dtype=rows.dtype, device=rows.device)
        part = torch.as_tensor(multipliers[start : start + len(chosen)]).to(rows)
        values[chosen] = part * signs[index].flatten().to(rows)[chosen]
        chosen_multipliers[index] = values.view(1, 1, *signs[index].shape[1:])
        start += len(chosen)
    lower = substitute(
        relaxation, graph.output, (weight @ rows)[None, None], Choices({}, chosen_multipliers)
    ).lower
    bound = float(lower.double()) + float(weight.double() @ constants.double())
    # the sum of the constants is rounded, and so is that of the functions with their weights
    slack = 8 * len(rows) * torch.finfo(rows.dtype).eps
    largest = float(weight.double() @ constants.double().abs()) + (
        _largest_sum(relaxation, rows) if len(rows) > 1 else 0.0
    )
    return SolvedLeaf(bound - slack * largest, point)


def _largest_sum(relaxation: Relaxation, rows: Tensor) -> float:
    """A bound of the sum of the magnitudes of the terms of every function."""
    low, high = relaxation.bound(relaxation.graph.output)
    return float((torch.maximum(low.abs(), high.abs()) @ rows.abs().t()).amax())


def _linear(
    relaxation: Relaxation, index: int, functions: Tensor
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Coefficients (k, d) and constants (k) in terms of the input of functions of a value."""
    result = substitute(relaxation, index, functions, rounded=False)
    a = result.coefficients.flatten(2)[0].double()
    region = relaxation.region
    lowest = torch.where(a > 0, a * region.low.double().flatten(), a * region.high.double().flatten()).sum(1)
    return a.cpu().numpy(), (result.lower[0].double() - lowest).cpu().numpy()


def _program(
    functions: NDArray[np.float64],
    constants: NDArray[np.float64],
    k: int,
    low: NDArray[np.float64],
    high: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]] | None:
    """Minimise the largest of the first `k` functions where the others are at least zero.

    Returns the input, the weights of the first functions, which are nonnegative with sum 1, and the multipliers of the
    others; None if the solver failed.
    """
    m, d = len(functions) - k, functions.shape[1]
    # variables: input, largest function, violation of each of the other functions
    cost = np.concatenate(
        (np.zeros(d), [1.0], np.full(m, _PENALTY * max(1.0, float(np.abs(functions[:k]).max()))))
    )
    matrix = np.zeros((k + m, d + 1 + m))
    matrix[:k, :d], matrix[:k, d] = functions[:k], -1.0
    matrix[k:, :d], matrix[k:, d + 1 :] = -functions[k:], -np.eye(m)
    bounds = [*zip(low, high, strict=True), (None, None), *[(0.0, None)] * m]
    right = np.concatenate((-constants[:k], constants[k:]))
    solved = linprog(cost, A_ub=matrix, b_ub=right, bounds=bounds, method="highs")
    if solved.status != 0:
        return None
    duals = np.maximum(-solved.ineqlin.marginals, 0.0)
    total = duals[:k].sum()
    if not total > 0:
        return None
    return np.clip(solved.x[:d], low, high), duals[:k] / total, duals[k:] / total
