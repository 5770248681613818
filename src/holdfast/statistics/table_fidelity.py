"""Similarity of two tables with the same columns, from 0 to 1, as defined by the library SDMetrics: that of each
column, and that of each pair of columns.

A pair of numbers is compared by Pearson's correlation. A pair with a category is compared by the shares of all pairs of
values, for which numbers are divided into ten intervals of equal width.
"""

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from holdfast.core.types import Mask

_INTERVALS = 10
_COUNTED = 1_000_000  # counts that are in memory at once; larger integers are numbered first


def column_shapes(samples: Tensor, reference: Tensor, numeric: Mask) -> Tensor:
    """Return the similarity of each column of `samples` (n, columns) and `reference` (m, columns): 1 minus the
    statistic of Kolmogorov and Smirnov for numbers, and 1 minus the total variation distance for categories.
    """
    pairs = zip(samples.T, reference.T, numeric.tolist(), strict=True)
    return torch.stack([_complement_of_ks(a, b) if number else _overlap(a, b) for a, b, number in pairs])


def _complement_of_ks(a: Tensor, b: Tensor) -> Tensor:
    values = torch.cat((a, b))
    first, second = (
        torch.searchsorted(each.sort().values, values, right=True).double() / len(each) for each in (a, b)
    )
    return 1 - (first - second).abs().max()


def _overlap(a: Tensor, b: Tensor) -> Tensor:
    """1 minus the total variation distance of integers from 0 on."""
    size = int(max(a.max(), b.max())) + 1
    if size > _COUNTED:
        numbered: Tensor = torch.unique(torch.cat((a, b)), return_inverse=True)[1]
        a, b, size = numbered[: len(a)], numbered[len(a) :], int(numbered.max()) + 1
    first, second = (torch.bincount(each.long(), minlength=size).double() / len(each) for each in (a, b))
    return 1 - (first - second).abs().sum() / 2


def pair_trends(samples: Tensor, reference: Tensor, numeric: Mask) -> Tensor:
    """Return the similarity of each pair of columns, in the order of `pairs_of`. It is NaN for two numbers of which one
    is constant.
    """
    correlations = [_correlations(each, numeric) for each in (samples, reference)]
    similar = 1 - (correlations[0] - correlations[1]).abs() / 2
    first, second = _categories(samples, reference, numeric)
    size = int(max(first.max(), second.max())) + 1
    return torch.stack(
        [
            similar[i, j]
            if bool(numeric[i] & numeric[j])
            else _overlap(first[:, i] * size + first[:, j], second[:, i] * size + second[:, j])
            for i, j in pairs_of(len(numeric))
        ]
    )


def pairs_of(columns: int) -> Sequence[tuple[int, int]]:
    """Return all pairs of different columns."""
    return list(combinations(range(columns), 2))


def _correlations(rows: Tensor, numeric: Mask) -> Tensor:
    """Pearson's correlations of the columns that are numbers; NaN for others, and for constant columns."""
    scaled = (rows - rows.mean(0)).masked_fill(~numeric, torch.nan)
    length = torch.linalg.vector_norm(scaled, dim=0)
    scaled = scaled / torch.where(length > 1e-12 * rows.abs().max(0).values, length, torch.nan)
    return (scaled.T @ scaled).clamp(-1, 1)


def _categories(samples: Tensor, reference: Tensor, numeric: Mask) -> tuple[Tensor, Tensor]:
    """Both tables with numbers replaced by their intervals, which divide the range of the reference."""
    low, high = reference.min(0).values, reference.max(0).values
    width = torch.where(high > low, high - low, 1.0)
    first, second = (
        torch.where(
            numeric, ((each - low) / width * _INTERVALS).floor().clamp(0, _INTERVALS - 1), each
        ).long()
        for each in (samples, reference)
    )
    return first, second
