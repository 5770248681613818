"""Distances to the nearest training example, by which copies of training examples are found."""

import torch
from torch import Tensor

from holdfast.core.types import PerExample

PERCENTILE = 0.01
"""share of unseen examples that are nearer to a training example than the distance below which a sample is a copy"""
_ROWS = 500  # points whose distances to all training examples are in memory at once


def nearest_example(points: Tensor, training: Tensor) -> tuple[PerExample, Tensor]:
    """Return the Euclidean distance of each point (n, *features) to its nearest training example (m, *features), and
    the row of that example.
    """
    flat, found = training.flatten(1), []
    for rows in torch.split(points.flatten(1), _ROWS):
        index = torch.cdist(rows, flat).argmin(1)
        # computed again, because the errors of matrix products are as large as the distance of a copy
        found.append((torch.linalg.vector_norm(rows - flat[index], dim=1), index))
    return torch.cat([d for d, _ in found]), torch.cat([i for _, i in found])


def copy_threshold(unseen: PerExample) -> float:
    """Return the distance below which a sample is a copy, from the distances of unseen examples (n) to their nearest
    training example. It is set on every second of them, so that its rate can be checked on the others.
    """
    return float(torch.quantile(unseen[::2].double(), PERCENTILE))
