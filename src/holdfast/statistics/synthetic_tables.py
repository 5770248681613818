"""Synthetic tables: their similarity to the tables that they imitate, and attacks on the training rows."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from holdfast.core.draws import Draws
from holdfast.core.estimate import Estimate
from holdfast.core.types import Mask
from holdfast.statistics.intervals import wilson

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


TOLERANCE = 0.05
"""relative error up to which a number counts as inferred, as in Anonymeter"""
CONDITIONS = 5
"""number of columns of a predicate, if the table has so many"""
_CANDIDATES = 20  # predicates that are tried for a row; many do not isolate it
_AT_ONCE = 100  # predicates or targets that are compared with all rows at once
_ROUNDING = 1e-6  # of a distance, below which two are equal


@dataclass(frozen=True)
class Rows:
    """Three tables with the same columns, each (n, columns) with numbers, and positions of categories."""

    samples: Tensor
    """the synthetic rows"""
    training: Tensor
    control: Tensor
    """rows that the generator was not trained on"""
    numeric: Mask
    """which columns are numbers (columns)"""


@dataclass(frozen=True)
class Attacked:
    """Which attempts of an attack were successful."""

    main: Mask
    """on training rows (n)"""
    baseline: Mask
    """of guesses without the synthetic table, on training rows (n)"""
    control: Mask
    """on control rows (n)"""


def risk(attacked: Attacked, confidence: float = 0.95) -> Estimate:
    """Return by how much an attack is more successful on training rows than on control rows, as a share of what is not
    inferred on the latter: (main - control) / (1 - control). It is 0 if it is negative.

    Rates and errors are those of Wilson's interval, and errors are propagated to first order, as in the paper.
    """
    (main, main_error), (control, control_error) = (
        _rate(each, confidence) for each in (attacked.main, attacked.control)
    )
    rest = 1 - control
    value = (main - control) / rest
    error = math.hypot(main_error / rest, control_error * (1 - main) / rest**2)
    low, middle, high = (min(max(end, 0.0), 1.0) for end in (value - error, value, value + error))
    return Estimate(middle, low, high, len(attacked.main))


def _rate(successes: Mask, confidence: float) -> tuple[float, float]:
    """Centre and half width of Wilson's interval."""
    low, high = wilson(int(successes.sum()), len(successes), confidence)
    return (low + high) / 2, (high - low) / 2


@dataclass(frozen=True)
class _Predicates:
    """Conjunctions of conditions on columns (n, conditions): at least (1), at most (-1), or equal to (0) a value."""

    columns: Tensor
    sides: Tensor
    values: Tensor

    def single_out(self, rows: Tensor) -> Mask:
        """Return which predicates are true for exactly one row, which no earlier predicate isolates (n)."""
        parts = zip(
            *(torch.split(each, _AT_ONCE) for each in (self.columns, self.sides, self.values)), strict=True
        )
        matches = [_matches(rows, *part) for part in parts]
        isolated = [torch.where(each.sum(0) == 1, each.int().argmax(0), -1) for each in matches]
        return _first_of_each(torch.cat(isolated))

    def take(self, chosen: Tensor) -> "_Predicates":
        return _Predicates(self.columns[chosen], self.sides[chosen], self.values[chosen])

    def joined(self, other: "_Predicates") -> "_Predicates":
        pairs = ((self.columns, other.columns), (self.sides, other.sides), (self.values, other.values))
        return _Predicates(*map(torch.cat, pairs))


def _first_of_each(rows: Tensor) -> Mask:
    """Which entries (n) are the first with their value; entries below 0 are none."""
    order = torch.argsort(rows, stable=True)
    first = torch.ones(len(rows), dtype=torch.bool)
    first[order[1:]] = rows[order[1:]] != rows[order[:-1]]
    return first & (rows >= 0)


def _matches(rows: Tensor, columns: Tensor, sides: Tensor, values: Tensor) -> Mask:
    """Which rows satisfy which predicates (rows, n)."""
    result = torch.ones(len(rows), len(columns), dtype=torch.bool)
    for column, side, value in zip(columns.T, sides.T, values.T, strict=True):
        difference = rows[:, column] - value
        result &= torch.where(side == 0, difference == 0, difference * side >= 0)
    return result


def singling_out(rows: Rows, n: int, rng: Draws) -> Attacked:
    """Return which of at most `n` predicates are true for exactly one row, which no earlier one isolates.

    A predicate is made from a row of the synthetic table, of which it isolates one row, with random columns; numbers
    are compared towards the nearer end.
    """
    size = min(len(rows.training), len(rows.control))
    training, control = (
        _sampled(each, size, rng.at(name))
        for name, each in (("training", rows.training), ("control", rows.control))
    )
    predicates = _isolating(rows, n, rng.at("predicates"))
    guesses = _guessed(rows, max(len(predicates.columns), 1), rng.at("baseline"))
    return Attacked(
        predicates.single_out(training), guesses.single_out(training), predicates.single_out(control)
    )


def _isolating(rows: Rows, n: int, rng: Draws) -> _Predicates:
    """At most `n` predicates, of which each isolates another row of the synthetic table."""
    order = rng.at("rows").bits(torch.arange(len(rows.samples))).argsort()[:n]
    found = _of_rows(rows, order[:0], rng)
    for turn in range(_CANDIDATES):
        if not len(order):
            break
        candidates = _of_rows(rows, order, rng.at(turn))
        isolates = candidates.single_out(rows.samples)
        found, order = found.joined(candidates.take(isolates)), order[~isolates]
    return found


def _sampled(rows: Tensor, n: int, rng: Draws) -> Tensor:
    return rows[rng.bits(torch.arange(len(rows))).argsort()[:n]]


def _columns_of(rows: Rows, n: int, rng: Draws) -> Tensor:
    width = len(rows.numeric)
    return rng.uniform(torch.arange(n), width).argsort(1)[:, : min(CONDITIONS, width)]


def _of_rows(rows: Rows, chosen: Tensor, rng: Draws) -> _Predicates:
    """A predicate for each of some rows of the synthetic table."""
    columns = _columns_of(rows, len(chosen), rng)
    values = rows.samples[chosen].gather(1, columns)
    above = values > rows.samples.median(0).values[columns]
    return _Predicates(columns, torch.where(rows.numeric[columns], 2 * above.int() - 1, 0), values)


def _guessed(rows: Rows, n: int, rng: Draws) -> _Predicates:
    """Predicates with random columns, directions and values inside the range of the synthetic table."""
    columns = _columns_of(rows, n, rng.at("columns"))
    shape = (columns.shape[1],)
    low, high = rows.samples.min(0).values[columns], rows.samples.max(0).values[columns]
    share = rng.at("values").uniform(torch.arange(n), *shape, dtype=torch.float64)
    numeric = rows.numeric[columns]
    values = torch.where(numeric, low + share * (high - low), (low + share * (high - low + 1)).floor())
    return _Predicates(
        columns, torch.where(numeric, rng.at("sides").signs(torch.arange(n), *shape), 0), values
    )


def linkability(rows: Rows, n: int, rng: Draws) -> Attacked:
    """Return for which of at most `n` targets the nearest synthetic rows by one half of the columns, and by the other
    half, have a row in common.
    """
    order = rng.at("columns").uniform(torch.arange(len(rows.numeric))).argsort()
    halves = order.tensor_split(2)

    def linked(targets: Tensor) -> Mask:
        parts = []
        for distances in _distances(targets, rows):
            nearest = [_nearest(sum(distances[c] for c in half.tolist())) for half in halves]
            parts.append((nearest[0] & nearest[1]).any(1))
        return torch.cat(parts)

    training, control = _targets(rows, n, rng)
    pairs = rng.at("baseline").integers(torch.arange(len(training)), len(rows.samples), 2)
    return Attacked(linked(training), pairs[:, 0] == pairs[:, 1], linked(control))


def _nearest(distance: "Tensor | int") -> Mask:
    """Which synthetic rows are nearest to each target (n, rows)."""
    assert isinstance(distance, Tensor), "each half has a column"
    return distance <= distance.min(1, keepdim=True).values + _ROUNDING


def _targets(rows: Rows, n: int, rng: Draws) -> tuple[Tensor, Tensor]:
    size = min(n, len(rows.training), len(rows.control))
    return _sampled(rows.training, size, rng.at("training")), _sampled(rows.control, size, rng.at("control"))


def inference(rows: Rows, n: int, rng: Draws) -> list[Attacked]:
    """Return for each column for which of at most `n` targets its value is that of the synthetic row that is nearest by
    all other columns. Numbers may differ by 5 %.
    """
    width = len(rows.numeric)

    def inferred(targets: Tensor) -> Mask:
        """Return for which targets each column is inferred (n, columns)."""
        nearest = []
        for distances in _distances(targets, rows):
            total = torch.stack(distances).sum(0)
            nearest.append(torch.stack([(total - each).argmin(1) for each in distances], 1))
        index = torch.cat(nearest)
        return _equal(rows.samples[index, torch.arange(width)], targets, rows.numeric)

    training, control = _targets(rows, n, rng)
    guessed = rng.at("baseline").integers(torch.arange(len(training)), len(rows.samples))
    baseline = _equal(rows.samples[guessed], training, rows.numeric)
    main, other = inferred(training), inferred(control)
    return [Attacked(main[:, c], baseline[:, c], other[:, c]) for c in range(width)]


def _equal(guesses: Tensor, values: Tensor, numeric: Mask) -> Mask:
    return (guesses - values).abs() <= torch.where(numeric, TOLERANCE, 0.0) * values.abs()


def _distances(targets: Tensor, rows: Rows) -> Iterator[list[Tensor]]:
    """Yield for some targets at a time the distance of each column to all synthetic rows (n, rows): the difference of
    numbers in units of the range of the synthetic table, and 1 for different categories.
    """
    samples = rows.samples
    width = (samples.max(0).values - samples.min(0).values).clamp_min(1e-12)
    scale = torch.where(rows.numeric, width, 1.0)
    columns = (samples / scale).float().T.contiguous()
    for some in torch.split((targets / scale).float(), _AT_ONCE):
        yield [
            (some[:, c, None] - column).abs()
            if bool(rows.numeric[c])
            else (some[:, c, None] != column).float()
            for c, column in enumerate(columns)
        ]
