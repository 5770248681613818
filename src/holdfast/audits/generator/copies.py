"""Copies among generated samples, and the part of the audit for tables."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from holdfast.audits.finding import Finding, Table
from holdfast.audits.generator.sensitivity import Context, share_and_range
from holdfast.core.catalogue import TABLE_METRICS
from holdfast.core.draws import Draws
from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Columns
from holdfast.core.types import Mask, PerExample
from holdfast.io.data.mixed_tables import MixedTables
from holdfast.reports.words import percent
from holdfast.runs.store.columns import Form, flag, whole
from holdfast.statistics import repeats, synthetic_tables
from holdfast.statistics.intervals import bonferroni, proportion

FORMS = {
    "distance": Form(rows=(1, 2**40), low=0),
    "nearest": whole("n"),
    "copy": flag("n"),
    "unseen": Form(("held_out",), rows=(2, 2**24), low=0),
    "unseen.copy": flag("held_out"),
    "repeats": Form((1,), low=0),
}
"""Forms of the columns of `measured_copies`."""


@dataclass(frozen=True)
class Copies:
    """How many samples are copies of training examples, or nearly."""

    distance: PerExample
    """distance of each sample to its nearest training example (n)"""
    nearest: Tensor
    """row of the nearest training example of each sample, or of the first one that it equals (n)"""
    is_copy: Mask
    """which samples equal a training example (n)"""
    unseen: PerExample
    """distance of each held-out example to its nearest training example (m)"""
    is_repeat: Mask
    """which held-out examples equal a training example (m)"""
    expected: float
    """number of samples that are expected to equal a training example by chance, or an upper bound"""

    @property
    def rate(self) -> Estimate:
        """Share of the samples that are copies."""
        return proportion(self.is_copy)

    @property
    def held_out(self) -> Estimate:
        """Share of the held-out examples that equal a training example."""
        return proportion(self.is_repeat)

    @property
    def threshold(self) -> float:
        """Distance below which a sample that is no copy is a near copy."""
        return repeats.copy_threshold(self.unseen)

    @property
    def near(self) -> Estimate:
        """Share of the samples that are near copies."""
        return proportion((self.distance < self.threshold) & ~self.is_copy)

    @property
    def near_held_out(self) -> Estimate:
        """Share of the other half of the held-out examples that would be near copies; about 1 %."""
        return proportion(((self.unseen < self.threshold) & ~self.is_repeat)[1::2])

    @property
    def repeating(self) -> bool:
        """Whether rows repeat by nature: a held-out example equals a training example, or samples are expected to."""
        return bool(self.is_repeat.any()) or self.expected > repeats.LEVEL

    @property
    def p(self) -> float:
        """p-value that no larger share of samples than of held-out examples equals a training example."""
        k, other = int(self.is_copy.sum()), int(self.is_repeat.sum())
        return repeats.excess(k, len(self.is_copy), other, len(self.is_repeat))

    @property
    def copied(self) -> bool:
        """Whether samples are copies that do not repeat a training example by nature."""
        return bool(self.is_copy.any()) and (not self.repeating or self.p <= repeats.LEVEL)

    @property
    def nearly_copied(self) -> bool:
        """Whether more samples than held-out examples are near copies."""
        return self.near.low > self.near_held_out.high


def copies(samples: Tensor, training: Tensor, held_out: Tensor) -> Copies:
    """Compare samples (n, *features) with training examples (m, *features), by their bytes and by Euclidean distance.
    The threshold is set on every second held-out example, and checked on the others.
    """
    return copies_of(measured_copies((samples, training, held_out)))


def measured_copies(
    sets: tuple[Tensor, Tensor, Tensor], rows: tuple[Tensor, Tensor, Tensor] | None = None
) -> Columns:
    """Return the columns from which the copies are computed, of samples, training examples and held-out examples.

    `rows` are the same examples with the values that are compared byte for byte; those of a table are not scaled.
    """
    samples, training, held_out = (each.cpu() for each in sets)
    distance, nearest = repeats.nearest_example(samples, training)
    own, known, unseen = rows or _of_one_precision(samples, training, held_out)
    equal, repeat = repeats.equal_rows(own, known), repeats.equal_rows(unseen, known) >= 0
    is_copy = equal >= 0
    # the search through all pairs of rows takes seconds, and decides only about copies
    expected = repeats.expected_repeats(len(own), known, unseen) if bool(is_copy.any()) else 0.0
    return {
        "distance": torch.where(is_copy, 0.0, distance),
        "nearest": torch.where(is_copy, equal, nearest),
        "copy": is_copy,
        "unseen": repeats.nearest_example(held_out, training)[0],
        "unseen.copy": repeat,
        "repeats": torch.tensor([expected], dtype=torch.float64),
    }


def copies_of(columns: Columns) -> Copies:
    """Return the copies from the columns of `measured_copies`."""
    return Copies(
        columns["distance"],
        columns["nearest"],
        columns["copy"].bool(),
        columns["unseen"],
        columns["unseen.copy"].bool(),
        float(columns["repeats"]),
    )


def _of_one_precision(samples: Tensor, training: Tensor, held_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The examples as float32 if the samples have no more digits, because a generator may compute with float32."""
    kind = torch.float32 if torch.equal(samples.float().to(samples.dtype), samples) else samples.dtype
    return samples.to(kind), training.to(kind), held_out.to(kind)


NEIGHBOURS = 5
"""number of neighbours of precision, recall, density and coverage, as in Naeem et al."""
_GROUPS = (
    10  # of the jackknife; ten are enough for an interval, and each costs one computation of the measure
)
_ROWS = 1000  # rows of a matrix of distances that are in memory at once
_Z = 1.959964  # quantile of the normal distribution for an interval of 95 %


@dataclass(frozen=True)
class Quality:
    """Measures of one set of samples against a reference set, each with an interval of 95 %."""

    frechet: Estimate
    """Fréchet distance of two normal distributions with the means and covariances of the features; 0 is best"""
    kid: Estimate
    """squared maximum mean discrepancy with a cubic kernel, without bias, so that it may be negative; 0 is best"""
    precision: Estimate
    """share of the samples that are near a reference example"""
    recall: Estimate
    """share of the reference examples that are near a sample"""
    density: Estimate
    """mean number of neighbourhoods of reference examples in which a sample is, divided by the number of neighbours"""
    coverage: Estimate
    """share of the reference examples in whose neighbourhood a sample is"""


VALUES = 1 + _GROUPS
"""number of values of a measure: that of all samples, and those without each of ten groups of them"""
MEASURES = 6
"""number of fields of `Quality`"""


def quality(samples: Tensor, reference: Tensor) -> Quality:
    """Return all measures of the features of samples (n, d) against those of reference examples (m, d).

    The intervals are from a jackknife over ten groups of the samples; the reference is fixed.
    """
    return quality_of(measured_values(samples, reference), len(samples))


def measured_values(samples: Tensor, reference: Tensor) -> Tensor:
    """Return the values of all measures (`MEASURES`, `VALUES`), from which their intervals are computed."""
    measures: list[Callable[[Tensor], float]] = [
        _Frechet(samples, reference),
        _Kernel(samples, reference),
        *_Neighbours(samples, reference).measures().values(),
    ]
    return torch.tensor([_values(measure, len(samples)) for measure in measures], dtype=torch.float64)


def quality_of(values: Tensor, n: int) -> Quality:
    """Return all measures of `n` samples from their values."""
    frechet, kid, precision, recall, density, coverage = values.tolist()
    shares = (_jackknifed(each, n, 0.0, 1.0) for each in (precision, recall, coverage))
    return Quality(
        _jackknifed(frechet, n),
        _jackknifed(kid, n),
        next(shares),
        next(shares),
        _jackknifed(density, n, 0.0),
        next(shares),
    )


def frechet_distance(samples: Tensor, reference: Tensor) -> float:
    """Return the Fréchet distance between the normal distributions with the means and covariances of two sets of
    features (n, d) and (m, d).
    """
    return _Frechet(samples, reference)(torch.arange(len(samples)))


def kernel_distance(samples: Tensor, reference: Tensor) -> float:
    """Return the unbiased estimate of the squared maximum mean discrepancy between two sets of features (n, d) and
    (m, d), with the kernel (u · v / d + 1)³.
    """
    return _Kernel(samples, reference)(torch.arange(len(samples)))


class _Frechet:
    """The Fréchet distance of some rows of the samples to the reference."""

    def __init__(self, samples: Tensor, reference: Tensor) -> None:
        self.samples, fixed = samples.double(), reference.double()
        self.mean, covariance = fixed.mean(0), _covariance(fixed)
        self.trace = covariance.trace()
        values, vectors = torch.linalg.eigh(covariance)
        self.root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T

    def __call__(self, rows: Tensor) -> float:
        chosen = self.samples[rows]
        covariance = _covariance(chosen)
        # the trace of (A B)^(1/2) equals that of (B^(1/2) A B^(1/2))^(1/2), which is symmetric
        both = torch.linalg.eigvalsh(self.root @ covariance @ self.root).clamp_min(0).sqrt().sum()
        means = (chosen.mean(0) - self.mean).square().sum()
        return float(means + covariance.trace() + self.trace - 2 * both)


def _covariance(features: Tensor) -> Tensor:
    centred = features - features.mean(0)
    return centred.T @ centred / (len(features) - 1)


class _Kernel:
    """The kernel distance of some rows of the samples to the reference, from sums of the kernel that are computed
    once.
    """

    def __init__(self, samples: Tensor, reference: Tensor) -> None:
        a, b = samples.double(), reference.double()
        m = len(b)
        self.within = torch.cat([_kernel(rows, a) for rows in torch.split(a, _ROWS)])
        self.across = torch.cat([_kernel(rows, b).mean(1) for rows in torch.split(a, _ROWS)])
        diagonal = float(((b * b).sum(1) / b.shape[1] + 1).pow(3).sum())
        total = float(sum(_kernel(rows, b).sum() for rows in torch.split(b, _ROWS)))
        self.reference = (total - diagonal) / (m * (m - 1))

    def __call__(self, rows: Tensor) -> float:
        n, block = len(rows), self.within[rows][:, rows]
        within = (block.sum() - block.diagonal().sum()) / (n * (n - 1))
        return float(within + self.reference - 2 * self.across[rows].mean())


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    values: Tensor = (a @ b.T / a.shape[1] + 1) ** 3
    return values


class _Neighbours:
    """Which samples are in the neighbourhood of which reference examples, and the reverse. The neighbourhood of a point
    reaches to its fifth nearest neighbour of the same set.
    """

    def __init__(self, samples: Tensor, reference: Tensor) -> None:
        self.n = len(samples)
        radius, sample_radius = _radius(reference), _radius(samples)
        inside, near_sample = [], []
        for rows in torch.split(torch.arange(len(samples)), _ROWS):
            distance = torch.cdist(samples[rows], reference)
            inside.append(distance <= radius)
            near_sample.append(distance <= sample_radius[rows, None])
        self.inside, self.near_sample = torch.cat(inside), torch.cat(near_sample)

    def measures(self) -> dict[str, Callable[[Tensor], float]]:
        """Functions of the rows of samples by the name of the measure, in the order of `Quality`."""
        return {
            "precision": lambda rows: _share(self.inside[rows].any(1)),
            "recall": lambda rows: _share(self.near_sample[rows].any(0)),
            "density": lambda rows: float(self.inside[rows].sum(1).double().mean() / NEIGHBOURS),
            "coverage": lambda rows: _share(self.inside[rows].any(0)),
        }


def _share(mask: Tensor) -> float:
    return float(mask.double().mean())


def _radius(points: Tensor) -> Tensor:
    """The distance of each point to its fifth nearest neighbour; the nearest is the point itself."""
    k = min(NEIGHBOURS + 1, len(points))
    parts = [torch.cdist(rows, points).kthvalue(k, dim=1).values for rows in torch.split(points, _ROWS)]
    return torch.cat(parts)


def jackknife(
    measure: Callable[[Tensor], float], n: int, least: float = -math.inf, most: float = math.inf
) -> Estimate:
    """Return the measure, a function of rows, on all `n` rows, with an interval of 95 % inside [least, most] from its
    values without each of ten groups of rows.
    """
    return _jackknifed(_values(measure, n), n, least, most)


def _values(measure: Callable[[Tensor], float], n: int) -> list[float]:
    everything = torch.arange(n)
    without = [measure(everything[everything % _GROUPS != group]) for group in range(_GROUPS)]
    return [measure(everything), *without]


def _jackknifed(
    values: Sequence[float], n: int, least: float = -math.inf, most: float = math.inf
) -> Estimate:
    value, *without = values
    mean = sum(without) / _GROUPS
    variance = (_GROUPS - 1) / _GROUPS * sum((each - mean) ** 2 for each in without)
    half = _Z * math.sqrt(variance)
    return Estimate(value, max(value - half, least), min(value + half, most), n)


def label_entropy(counts: Tensor) -> float:
    """Return the entropy of predicted classes, from the number of examples of each, divided by the logarithm of the
    number of classes: 1 if all are equally frequent, and 0 if there is only one.
    """
    shares, classes = counts.double() / int(counts.sum()), len(counts)
    return abs(float(torch.xlogy(shares, shares).sum())) / math.log(classes) if classes > 1 else 0.0


_ATTEMPTS = 1000
"""attempts of each attack; more make its interval narrower"""
_FEWEST = 50
"""attempts of singling out below which its risk is not stated"""
_SHOWN = 10
"""pairs of columns in the report"""
_TITLES = {"singling_out": "singling out", "linkability": "linking", "inference": "inference"}
_KINDS = ("main", "baseline", "control")
Similarity = Callable[[Tensor, Tensor, Mask], Tensor]
"""function of two tables, and of which columns are numbers"""
_RISKS = (
    "The risks are those of simple attacks with the synthetic table alone. An attacker with further data, or with the "
    "generator, may find out more."
)


@dataclass(frozen=True)
class TablePart:
    """Measures the risks and the fidelity of a synthetic table."""

    names: tuple[str, ...]
    """names of the columns"""
    tables: MixedTables | None = None
    """the training rows, the synthetic rows and the held-out rows, which are measured"""

    name = "tables"
    title = "risks of the rows of a table"
    metrics = TABLE_METRICS

    def missing(self, context: Context) -> str:
        """Return that nothing is missing."""
        return ""

    def measure(self, context: Context) -> Columns:
        """Return the successes of each attack, and the similarities of columns and of pairs of columns."""
        assert self.tables is not None
        rows, rng = _rows(self.tables), context.rng
        attacks = {
            "singling_out": synthetic_tables.singling_out(rows, _ATTEMPTS, rng.at("singling-out")),
            "linkability": synthetic_tables.linkability(rows, _ATTEMPTS, rng.at("linkability")),
            **{
                f"inference.{column}": attacked
                for column, attacked in zip(
                    self.names, synthetic_tables.inference(rows, _ATTEMPTS, rng.at("inference")), strict=True
                )
            },
        }
        successes = {
            f"{name}.{kind}": getattr(attacked, kind) for name, attacked in attacks.items() for kind in _KINDS
        }
        return {"id": torch.arange(_ATTEMPTS), **successes, **_fidelity(rows, rng.at("fidelity"))}

    @property
    def _attacks(self) -> list[str]:
        return ["singling_out", "linkability", *(f"inference.{name}" for name in self.names)]

    def forms(self) -> Mapping[str, Form]:
        """Return the forms of the successes, and of the similarities."""
        successes = dict[str, Form]()
        for name in self._attacks:
            rows = (0 if name == "singling_out" else 1, _ATTEMPTS)
            successes |= {f"{name}.{kind}": replace(flag(name), rows=rows) for kind in _KINDS}
        n = len(self.names)
        return {
            **successes,
            **{name: Form((4,), low=0) for name in ("column_shapes", "pair_trends")},
            **{f"{name}.held_out": Form((1,), nan=True) for name in ("column_shapes", "pair_trends")},
            "shapes": Form((n,), rows=(1, 2**40)),
            "trends": Form((n * (n - 1) // 2,), nan=True),
        }

    def images(self, columns: Columns, context: Context) -> Mapping[str, Tensor]:
        """Return nothing, because rows are no images."""
        return {}

    def concluded(self, columns: Columns) -> Finding:
        """Return the risks with their intervals, and the fidelity beside that of held-out rows."""
        attacks = {
            n: synthetic_tables.Attacked(*(columns[f"{n}.{kind}"].bool() for kind in _KINDS))
            for n in self._attacks
        }
        if len(attacks["singling_out"].main) < _FEWEST:
            attacks.pop("singling_out")
        confidence = bonferroni(0.95, len(attacks))
        risks = {name: synthetic_tables.risk(attacked, confidence) for name, attacked in attacks.items()}
        shown = [name for name, estimate in risks.items() if estimate.low > 0]
        inferred = {name: value for name, value in risks.items() if name.startswith("inference.")}
        column, worst = max(inferred.items(), key=lambda item: item[1].value)
        metrics = {f"{name}_risk": value for name, value in risks.items() if name not in inferred}
        fidelity = {name: _estimate(columns[name]) for name in ("column_shapes", "pair_trends")}
        floor = {name: float(columns[f"{name}.held_out"][0]) for name in fidelity}
        return Finding(
            "flagged" if shown else "not flagged",
            _headline(risks, shown),
            reasons=_reasons(risks, shown),
            facts={
                "risks": {name: value.value for name, value in risks.items()},
                "column_shapes": fidelity["column_shapes"].value,
                "pair_trends": fidelity["pair_trends"].value,
                "floor": floor,
                "worst_inference": column.removeprefix("inference."),
            },
            metrics={**metrics, "inference_risk": worst, **fidelity},
            tables=[
                _table_of_risks(attacks, risks, confidence),
                _table_of_fidelity(fidelity, floor),
                self._worst_columns(columns),
            ],
            limits=[_RISKS],
        )

    def _worst_columns(self, columns: Columns) -> Table:
        """The columns and pairs of columns that differ most."""
        names = self.names
        trends, pairs = columns["trends"], synthetic_tables.pairs_of(len(names))
        entries = [(name, float(value)) for name, value in zip(names, columns["shapes"], strict=True)]
        entries += [
            (f"{names[i]}, {names[j]}", float(value))
            for (i, j), value in zip(pairs, trends, strict=True)
            if not value.isnan()
        ]
        worst = sorted(entries, key=lambda entry: entry[1])[:_SHOWN]
        return Table(
            "Least similar columns and pairs of columns",
            ("columns", "similarity"),
            [(name, f"{value:.3f}") for name, value in worst],
            "From 0 to 1, between the synthetic rows and the training rows.",
        )


def _rows(tables: MixedTables) -> synthetic_tables.Rows:
    training, samples, control = tables.rows
    return synthetic_tables.Rows(samples, training, control, tables.numeric)


def _fidelity(rows: synthetic_tables.Rows, rng: Draws) -> Columns:
    """Both similarities with an interval, and those of as many held-out rows, each compared with the training rows."""
    n = min(len(rows.samples), len(rows.control))
    sets = {
        name: each[rng.at(name).bits(torch.arange(len(each))).argsort()[:n]]
        for name, each in (("samples", rows.samples), ("held_out", rows.control))
    }
    found: dict[str, Tensor] = {}
    for name, measure in (
        ("column_shapes", synthetic_tables.column_shapes),
        ("pair_trends", synthetic_tables.pair_trends),
    ):
        estimate = jackknife(partial(_mean, measure, sets["samples"], rows), n, 0.0, 1.0)
        found[name] = torch.tensor([estimate.value, estimate.low, estimate.high, n], dtype=torch.float64)
        floor = measure(sets["held_out"], rows.training, rows.numeric).nanmean()
        found[f"{name}.held_out"] = floor.double()[None]
    return {
        **found,
        "shapes": synthetic_tables.column_shapes(sets["samples"], rows.training, rows.numeric),
        "trends": synthetic_tables.pair_trends(sets["samples"], rows.training, rows.numeric),
    }


def _mean(measure: Similarity, samples: Tensor, rows: synthetic_tables.Rows, chosen: Tensor) -> float:
    return float(measure(samples[chosen], rows.training, rows.numeric).nanmean())


def _estimate(stored: Tensor) -> Estimate:
    value, low, high, n = stored.tolist()
    return Estimate(value, low, high, int(n))


def _named(name: str) -> str:
    kind, _, column = name.partition(".")
    return f"{_TITLES[kind]} of {column}" if column else _TITLES[kind]


def _interval(estimate: Estimate) -> str:
    return ", ".join(share_and_range(estimate))


def _headline(risks: Mapping[str, Estimate], shown: list[str]) -> str:
    if not shown:
        return "no attack on the rows is more successful on training rows than on held-out rows"
    worst = max(shown, key=lambda name: risks[name].value)
    return f"the largest risk of training rows is that of {_named(worst)} ({_interval(risks[worst])})"


def _reasons(risks: Mapping[str, Estimate], shown: list[str]) -> list[str]:
    inferred = [name for name in shown if name.startswith("inference.")]
    reasons = [
        f"{_named(name)} is more successful on training rows than on held-out rows (risk {_interval(risks[name])})"
        for name in shown
        if name not in inferred
    ]
    if inferred:
        columns = ", ".join(name.removeprefix("inference.") for name in inferred)
        reasons.append(
            f"these columns are inferred more often for training rows than for held-out rows: {columns}"
        )
    return reasons


def _table_of_risks(
    attacks: Mapping[str, synthetic_tables.Attacked], risks: Mapping[str, Estimate], confidence: float
) -> Table:
    rows: list[tuple[str | float | int, ...]] = [
        (
            _named(name),
            *(percent(float(getattr(attacked, kind).double().mean())) for kind in _KINDS),
            *share_and_range(risks[name]),
            len(attacked.main),
        )
        for name, attacked in attacks.items()
    ]
    return Table(
        "Risks of the training rows",
        ("attack", "training rows", "guesses", "held-out rows", "risk", "interval", "attempts"),
        rows,
        "The share of successful attempts on training rows, of guesses without the synthetic table, and on held-out "
        "rows. The risk is (training - held-out) / (1 - held-out). An attack that is not better than guesses measures "
        f"nothing. All intervals hold together with 95 % (each with {percent(confidence, 2)}).",
    )


def _table_of_fidelity(fidelity: Mapping[str, Estimate], floor: Mapping[str, float]) -> Table:
    titles = {"column_shapes": "columns", "pair_trends": "pairs of columns"}
    return Table(
        "Similarity to the training rows",
        ("of", "synthetic rows", "interval", "held-out rows"),
        [
            (titles[name], f"{value.value:.3f}", f"{value.low:.3f} to {value.high:.3f}", f"{floor[name]:.3f}")
            for name, value in fidelity.items()
        ],
        f"From 0 to 1, as the mean over columns and pairs of columns, for {fidelity['column_shapes'].n:,} rows each. "
        "The column held-out rows is what a perfect generator would reach.",
    )
