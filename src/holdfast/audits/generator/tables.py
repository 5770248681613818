"""The part of the audit for tables: attacks on the training rows by the synthetic table, and its similarity to them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from holdfast.audits.finding import Finding, Table
from holdfast.audits.generator.copies import jackknife
from holdfast.audits.generator.parts import Context, share_and_range
from holdfast.core.catalogue import TABLE_METRICS
from holdfast.core.draws import Draws
from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Columns
from holdfast.core.types import Mask
from holdfast.io.data.mixed_tables import MixedTables
from holdfast.reports.numbers import percent
from holdfast.runs.store.columns import Form, flag
from holdfast.statistics import synthetic_tables
from holdfast.statistics.intervals import bonferroni

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
