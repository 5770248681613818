"""Distances between parameter sets, summed up tensor by tensor. None of them is distance for an attack."""

import torch
from torch import Tensor

from holdfast.rotation.members import Members


def l1(some: Members, others: Members) -> Tensor:
    """Mean absolute difference between the numbers of each set and each other one, (n, m), float64."""
    total = torch.zeros(len(some), len(others), dtype=torch.float64)
    for name, value in some.tensors.items():
        total += torch.cdist(value.flatten(1), others.tensors[name].flatten(1), p=1).double().cpu()
    return total / some.parameters


def apart(members: Members) -> float:
    """How far the runs of a collection lie apart: the mean L1 distance between their means.

    In a collection of a single run, how far each set lies from its nearest.
    """
    bases = members.bases()
    if len(bases) > 1:
        between = l1(bases, bases)
        return float(between.sum() / (between.numel() - len(bases)))
    within = l1(members, members).fill_diagonal_(torch.inf)
    return float(within.min(1).values.mean())


def nearest(some: Members, others: Members) -> tuple[Tensor, Tensor]:
    """For each set the L1 distance to the nearest other one (n), and that one's place (n)."""
    found = l1(some, others).min(1)
    return found.values, found.indices
