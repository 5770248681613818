"""Rows that equal or nearly equal a known row, what a sample or a privacy budget does not cover, and synthetic tables:
their similarity to the tables that they imitate, and attacks on their training rows.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from holdfast.core.batch import fingerprints_of
from holdfast.core.draws import Draws
from holdfast.core.estimate import Estimate
from holdfast.core.types import Labels, Mask, PerExample
from holdfast.statistics.intervals import wilson

_LISTED = 10


def absent_classes(y: Labels, classes: int | None) -> tuple[int, ...]:
    """Return the classes, out of `classes`, that are the label of no example."""
    return tuple(sorted({*range(classes or 0)} - {*torch.unique(y).tolist()}))


def listed_classes(labels: Sequence[int], names: Sequence[str] = ()) -> str:
    """Return the names, or else the numbers, of classes for a message."""
    shown = ", ".join(names[k] if k < len(names) else str(k) for k in labels[:_LISTED])
    return shown + (f" and {len(labels) - _LISTED} more" if len(labels) > _LISTED else "")


def classes_of(model: Mapping[str, Any]) -> int | None:
    """Return the number of outputs of the model of an assessment, from its evidence; None if it is unknown."""
    found: int | None = model.get("outputs")
    return found


_LARGEST_EXPONENT = 700.0  # beyond which exp is infinite in float64


@dataclass(frozen=True)
class RowBudget:
    """A privacy budget, which is for adding or removing one row of the training data."""

    epsilon: float
    delta: float
    equal_rows: int
    """largest number of rows with equal inputs"""

    @property
    def group_epsilon(self) -> float:
        """Epsilon for adding or removing all rows of the largest group of equal ones, up to which it can be."""
        return self.equal_rows * self.epsilon

    @property
    def group_delta(self) -> float:
        """Delta that belongs to `group_epsilon`; 1 if the budget guarantees nothing for these rows.

        For k rows it is delta * (1 + e^epsilon + ... + e^((k - 1) epsilon)), at most k e^((k - 1) epsilon) delta.
        """
        if (self.equal_rows - 1) * self.epsilon > _LARGEST_EXPONENT:
            return 1.0
        return min(1.0, self.delta * sum(math.exp(k * self.epsilon) for k in range(self.equal_rows)))

    def entry(self) -> dict[str, float | int]:
        """Return the numbers by name."""
        return {**vars(self), "group_epsilon": self.group_epsilon, "group_delta": self.group_delta}

    def sentence(self) -> str:
        """Return what the budget means for rows and for persons, without a full stop."""
        budget = (
            f"epsilon = {self.epsilon:g} and delta = {self.delta:g} are for each row of the training data"
        )
        if self.equal_rows == 1:
            return (
                f"{budget}, and no two rows are equal. For a person with k rows, epsilon is up to k times as large, "
                "and delta grows with it"
            )
        nothing = ", so that the budget guarantees nothing for such a person" if self.group_delta == 1 else ""
        return (
            f"{budget}, and not for each person. The largest number of equal rows is {self.equal_rows:,}: for a person "
            f"with these rows, epsilon is up to {self.group_epsilon:g} and delta up to {self.group_delta:.2g}{nothing}"
        )


def row_budget(epsilon: float, delta: float, fingerprints: Sequence[bytes]) -> RowBudget:
    """Return the budget of a training on rows with the `fingerprints` of their inputs."""
    return RowBudget(epsilon, delta, max(Counter(fingerprints).values(), default=1))


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
