"""Report of the black-box attacks on a model with a guard: how many examples they break with the guard and without,
after how many queries, after how many queries one is rejected, and how many they break without the guard if clients
receive less.

It is an entry of the summary and a section. The section of the detector of a model is made from metrics.
"""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from holdfast.core.evidence import Table as StoredTable
from holdfast.metrics.names import PERCENTS, at_percent
from holdfast.reports.curves import estimate_to_json
from holdfast.reports.numbers import count_text, percent
from holdfast.reports.tree import Cell, Paragraph, Section, Table
from holdfast.reports.words import interval
from holdfast.statistics.intervals import proportion

Json = dict[str, Any]

_ATTACKERS = {
    "plain": "Square, which does not know the guard",
    "adaptive": "OARS, which adapts to rejected queries",
    "patterns": "coarse patterns with a linear fit, which adapt to rejected queries",
    "population": "coarse patterns with a genetic search, which adapt to rejected queries",
    "labels": "RayS, which needs labels only",
    "informed": "informed Square, which knows the query detector",
}
"""Attacks by the prefix of their columns in the table of the evidence."""
BUDGET = 100
"""number of queries of the smaller budget that is reported"""
_WORST = "the best of these for each example"  # rejected: each of the attacks had a rejected query


def stateful_results(table: StoredTable) -> Json | None:
    """Return the results of the black-box attacks on a guard for the summary; None if no example was attacked."""
    if not len(table):
        return None
    names = [name for name in _ATTACKERS if f"{name}_with_broken" in table.columns]
    of_attacks = [_columns(table, name) for name in names]
    worst = {
        column: _first(torch.stack([columns[column] for columns in of_attacks if column in columns]))
        for column in {column: None for columns in of_attacks for column in columns}
    }
    rejected = torch.stack([columns["with_rejected"] for columns in of_attacks])
    worst["with_rejected"] = torch.where((rejected > 0).all(0), rejected.amax(0), 0)
    rows = [_row(_ATTACKERS[name], columns) for name, columns in zip(names, of_attacks, strict=True)]
    return {"n": len(table), "rows": [*rows, _row(_WORST, worst)]}


def _columns(table: StoredTable, attack: str) -> dict[str, Tensor]:
    """The columns of an attack, by their names without its prefix."""
    return {
        column.removeprefix(f"{attack}_"): values
        for column, values in table.columns.items()
        if column.startswith(f"{attack}_")
    }


def _row(attacker: str, columns: Mapping[str, Tensor]) -> Json:
    return {
        "attacker": attacker,
        **_arm(columns["without_broken"], "without"),
        **_arm(columns["with_broken"], "with"),
        **_noticed(columns["with_rejected"]),
        **_arm(columns.get("rounded_broken"), "rounded"),
        **_arm(columns.get("labelled_broken"), "labelled"),
        "broken_in_budget": estimate_to_json(proportion(_within(columns["without_broken"]))),
        "broken_in_budget_with": estimate_to_json(proportion(_within(columns["with_broken"]))),
    }


def _within(broken_at: Tensor) -> Tensor:
    return (broken_at > 0) & (broken_at <= BUDGET)


def _first(broken_at: Tensor) -> Tensor:
    """The least number of queries of all attacks (attacks, n) that broke an example, 0 if none did."""
    never = torch.iinfo(broken_at.dtype).max
    least = torch.where(broken_at > 0, broken_at, never).amin(0)
    return torch.where(least == never, 0, least)


def _arm(broken_at: Tensor | None, arm: str) -> Json:
    """The share of broken examples, and the median number of queries until they were; None for no measurement."""
    if broken_at is None:
        return {f"broken_{arm}": None, f"queries_{arm}": None}
    return {
        f"broken_{arm}": estimate_to_json(proportion(broken_at > 0)),
        f"queries_{arm}": _median(broken_at),
    }


def _noticed(rejected_at: Tensor) -> Json:
    return {
        "rejected": estimate_to_json(proportion(rejected_at > 0)),
        "rejected_after": _median(rejected_at),
    }


def _median(first: Tensor) -> int | None:
    """The median of the numbers of queries that are not 0, which stands for never; None if there is none."""
    reached = first[first > 0]
    return int(torch.median(reached)) if len(reached) else None


def query_section(results: Mapping[str, Any], noun: str) -> Section:
    """Return the section of black-box attacks on a guard, with the guard and with other answers."""
    attacked = [
        (
            row["attacker"],
            _share(row["broken_without"], row["queries_without"]),
            _share(row["broken_with"], row["queries_with"]),
            _share(row["rejected"], row["rejected_after"]),
        )
        for row in results["rows"]
    ]
    answered = [
        (
            row["attacker"],
            *(
                _share(row[f"broken_{arm}"], row[f"queries_{arm}"])
                for arm in ("without", "rounded", "labelled")
            ),
            percent(row["broken_in_budget"]["value"]),
        )
        for row in results["rows"]
    ]
    title = f"queries: black-box attacks on {count_text(results['n'])} {noun} with the guard and without it"
    headings = ("attack", "broken without", "broken with", "rejected")
    answers = ("attack", "all scores", "2 digits", "labels", f"{BUDGET} queries")
    note = (
        "A query detector compares a query with earlier ones, so it is not part of the robust accuracy. It does not "
        "detect attacks with few queries, on many inputs, or with transferred examples. The answer to a rejected query "
        "contains no scores. Every query comes from a new client. The last row has for each of the "
        f"{noun} the attack that needs the fewest queries."
    )
    blocks = (
        Table(headings, attacked, title),
        Table(answers, answered, "queries: the same attacks without the guard, if clients receive less"),
        Paragraph(note, "page"),
    )
    lead = "black-box attacks with the guard and without it, with the median number of queries"
    return Section("Queries", blocks, lead, "query-detector", "Queries")


def _share(broken: Mapping[str, Any] | None, queries: int | None) -> Cell | str:
    """A share with its interval and the median number of queries."""
    if broken is None:
        return "–"
    median = () if queries is None else (f"median {count_text(queries)} queries",)
    return Cell(percent(broken["value"]), (interval("attack_success_rate", broken), *median))


_COLUMNS: Final = (
    ("oblivious_detection_rate", "detected if unknown"),
    ("detection_rate", "detected if known"),
    ("accepted_right", "robust with rejection"),
)
"""metrics of a detector at a false positive rate, with the headings of their columns"""


def detector_section(summary: Mapping[str, Any]) -> Section | None:
    """Return the section of the detector of a model: at each false positive rate, the detection rate for attackers that
    do not know the detector and that know it, and the robust accuracy with rejection. None if none was evaluated.
    """
    metrics, noun = summary["metrics"], summary["noun"]
    rows = [(rate, [metrics.get(at_percent(name, rate)) for name, _ in _COLUMNS]) for rate in PERCENTS]
    # robust accuracy is measured whenever there are enough clean inputs, also if no attack succeeded
    measured = [estimates[-1] is not None for _, estimates in rows]
    if not any(measured):
        return None
    cells = [
        (
            f"{rate} %",
            *(
                "–" if e is None else Cell(percent(e["value"]), (interval("attack_success_rate", e),))
                for e in estimates
            ),
        )
        for rate, estimates in rows
    ]
    lead = f"{count_text(summary['n'])} {noun} under attacks that do and do not know it"
    table = Table(("false positives", *(heading for _, heading in _COLUMNS)), cells)
    note = (
        f"Each row is a threshold at which the detector rejects this share of the clean {noun}. Detected: of the "
        f"attacked {noun} that the network misclassifies, the share that the detector rejects; it is unknown or known "
        f"to the attacker. Robust with rejection: share of the {noun} that are accepted and right when clean, and of "
        "which no attacked version is accepted and wrong. Attacks that know the detector follow the gradient of "
        "network and detector together. Of all attacked versions of an input, the one with the lowest score counts."
    )
    few = "" if all(measured) else "; 0.1 % needs 999 or more"
    return Section("Detector", (table, Paragraph(note, "page")), f"{lead}{few}", "detector", "Detector")
