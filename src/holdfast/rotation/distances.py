"""Distances between parameter sets, summed over their tensors. They do not predict whether an attack on one set
transfers to another.
"""

import torch
from torch import Tensor

from holdfast.rotation.parameter_sets import Members


def l1(sets: Members, other_sets: Members) -> Tensor:
    """Return the mean absolute difference of the parameters for each pair of a set of `sets` and a set of `other_sets`,
    (n, m), float64.
    """
    total = torch.zeros(len(sets), len(other_sets), dtype=torch.float64)
    for name, value in sets.tensors.items():
        total += torch.cdist(value.flatten(1), other_sets.tensors[name].flatten(1), p=1).double().cpu()
    return total / sets.parameters


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


def nearest_sets(sets: Members, other_sets: Members) -> tuple[Tensor, Tensor]:
    """Return the L1 distance of each parameter set of `sets` to the nearest set of `other_sets` (n), and the index of
    that nearest set (n).
    """
    nearest = l1(sets, other_sets).min(1)
    return nearest.values, nearest.indices
