"""Rows that equal or nearly equal a known row: how many are expected among new rows, and distances to the
nearest one.
"""

import math
from collections import Counter

import torch
from torch import Tensor

from holdfast.core.batch import fingerprints_of
from holdfast.core.types import Mask, PerExample

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


LEVEL = 0.02
"""Largest probability with which new rows are taken for copies, and smallest expected number of repeats from which
rows count as repeating by nature."""
_COMPARED = 20_000  # rows of which all pairs are compared
_RELATED = 1_000  # rows of which columns are compared with each other
_VARIED, _DETERMINED = 0.5, 0.8
"""share of different values from which a column is compared with others, and correlation from which it determines one:
independent columns have 0 ± 0.02 with 1,000 rows, and functions of one column nearly 1"""


def equal_rows(rows: Tensor, known: Tensor) -> Tensor:
    """Return for each of the rows (n, *features) the first of the known rows (m, *features) with the same bytes, or -1
    (n).
    """
    first = dict[bytes, int]()
    for place, mark in enumerate(fingerprints_of(known)):
        first.setdefault(mark, place)
    return torch.tensor([first.get(mark, -1) for mark in fingerprints_of(rows)], dtype=torch.int64)


def expected_repeats(n: int, known: Tensor, unseen: Tensor) -> float:
    """Return how many of `n` new rows are expected to equal one of the known rows (m, *features) by chance, or an upper
    bound.

    It is estimated from the pairs of known and unseen rows that are equal in one half of their values, and in the
    other half. If one half never repeats, the halves are taken as independent. Otherwise the rarer half is the bound.
    Columns that are functions of each other, as a price with and without a tax, are in the same half.
    """
    rows = torch.cat((known, unseen)).flatten(1)
    distinct = rows[[*{mark: place for place, mark in enumerate(fingerprints_of(rows))}.values()]]
    some = distinct[torch.linspace(0, len(distinct) - 1, min(len(distinct), _COMPARED)).long()]
    if len(some) < 2:
        return float(n)
    pairs, halves = (
        math.comb(len(some), 2),
        _halves_of_columns(some) if known.dim() == 2 else some.chunk(2, 1),
    )
    repeats = [sum(map(_pairs, Counter(fingerprints_of(half)).values())) for half in halves]
    chances = [min(1.0, (number + 1) / pairs) for number in repeats]
    chance = min(chances) if min(repeats) else math.prod(chances)
    return min(1.0, len(known) * chance) * n


def excess(k: int, n: int, other_k: int, other_n: int) -> float:
    """Return the p-value of Fisher's exact test that `k` of `n` is no larger a share than `other_k` of `other_n`."""
    from scipy.stats import hypergeom

    return float(hypergeom.sf(k - 1, n + other_n, k + other_k, n))


def _pairs(count: int) -> int:
    return math.comb(count, 2)


def _halves_of_columns(rows: Tensor) -> list[Tensor]:
    """The columns in two parts of about the same variety: in the order of their variety, each is added to the part that
    has less, or to that of a column of which it is a function.
    """
    every = math.comb(len(rows), 2)
    repeats = [sum(map(_pairs, column.unique(return_counts=True)[1].tolist())) for column in rows.T]
    halves, varieties = (list[int](), list[int]()), [0.0, 0.0]
    order = sorted(range(len(repeats)), key=repeats.__getitem__)
    same = _functions(rows[:, order])
    for k, place in enumerate(order):
        first = next((order[j] for j in range(k) if same[j, k] or same[k, j]), None)
        if first is not None:
            halves[int(first in halves[1])].append(place)
            continue
        side = int(varieties[1] < varieties[0])
        halves[side].append(place)
        varieties[side] += math.log(every / (repeats[place] + 1)) if repeats[place] < every else 0.0
    return [rows[:, half] for half in halves]


def _functions(rows: Tensor) -> Mask:
    """Whether each column (row of the result) determines each other column (columns, columns), by the rank correlation
    of Chatterjee, "A new coefficient of correlation", JASA 2021, arXiv:1909.10140: in the order of the one, neighbours
    have close ranks of the other. Columns with equal values in more than a few rows are left out, because these repeat.
    """
    some = rows[torch.linspace(0, len(rows) - 1, min(len(rows), _RELATED)).long()]
    n, d = some.shape
    ranks = some.argsort(dim=0, stable=True).argsort(dim=0, stable=True)
    varied = torch.tensor([len(column.unique()) > _VARIED * n for column in some.T])
    result = torch.zeros(d, d, dtype=torch.bool)
    for place in varied.nonzero()[:, 0].tolist():
        steps = ranks[some[:, place].argsort(stable=True)].diff(dim=0).abs().sum(0)
        result[place] = varied & (1 - 3 * steps / (n * n - 1) > _DETERMINED)
    return result
