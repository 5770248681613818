"""Rows that equal a known row: how many are expected among new rows, and whether there are more than among others.

New rows of images, or of columns with many values, equal no known row. Rows of columns with few values do: they repeat
by nature.
"""

import math
from collections import Counter

import torch
from torch import Tensor

from holdfast.core.batch import fingerprints_of

LEVEL = 0.02
"""Largest probability with which new rows are taken for copies, and smallest expected number of repeats from which
rows count as repeating by nature."""
_COMPARED = 20_000  # rows of which all pairs are compared


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
    has less.
    """
    every = math.comb(len(rows), 2)
    repeats = [sum(map(_pairs, column.unique(return_counts=True)[1].tolist())) for column in rows.T]
    halves, varieties = (list[int](), list[int]()), [0.0, 0.0]
    for place in sorted(range(len(repeats)), key=repeats.__getitem__):
        side = int(varieties[1] < varieties[0])
        halves[side].append(place)
        varieties[side] += math.log(every / (repeats[place] + 1)) if repeats[place] < every else 0.0
    return [rows[:, half] for half in halves]
