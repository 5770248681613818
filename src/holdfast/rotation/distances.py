"""Distances between parameter sets, summed over their tensors. They do not predict whether an attack on one set
transfers to another.
"""

import torch
from torch import Tensor

from holdfast.rotation.members import Members


def l1(some: Members, others: Members) -> Tensor:
    """Return the mean absolute difference of the parameters for each pair of a set of `some` and a set of `others`, (n,
    m), float64.
    """
    total = torch.zeros(len(some), len(others), dtype=torch.float64)
    for name, value in some.tensors.items():
        total += torch.cdist(value.flatten(1), others.tensors[name].flatten(1), p=1).double().cpu()
    return total / some.parameters


def apart(members: Members) -> float:
    """Return how different the training runs of a collection are: the mean L1 distance between the mean parameter sets
    of its runs.

    For a collection from a single run, return the mean L1 distance of each set to its nearest other set.
    """
    bases = members.bases()
    if len(bases) > 1:
        between = l1(bases, bases)
        return float(between.sum() / (between.numel() - len(bases)))
    within = l1(members, members).fill_diagonal_(torch.inf)
    return float(within.min(1).values.mean())


def nearest_sets(some: Members, others: Members) -> tuple[Tensor, Tensor]:
    """Return the L1 distance of each parameter set of `some` to the nearest set of `others` (n), and the index of that
    nearest set (n).
    """
    nearest = l1(some, others).min(1)
    return nearest.values, nearest.indices
