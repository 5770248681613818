"""Report of the black-box attacks on a model with a guard: how many examples they break with the guard and without,
after how many queries, after how many queries one is rejected, and how many they break without the guard if clients
receive less.

It is an entry of the summary and a table.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from holdfast.core.evidence import Table
from holdfast.reports.curves import estimate_to_json
from holdfast.reports.numbers import count_text, percent
from holdfast.reports.words import TextTable
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


def stateful_results(table: Table) -> Json | None:
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


def _columns(table: Table, attack: str) -> dict[str, Tensor]:
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


def table(results: Mapping[str, Any], noun: str) -> TextTable:
    """Return the table of black-box attacks on a guard."""
    return TextTable(
        f"queries: black-box attacks on {count_text(results['n'])} {noun} with the guard and without it",
        [
            "attack",
            "broken without",
            "median queries",
            "2 digits",
            "labels",
            f"{BUDGET} queries",
            "broken with",
            "median queries",
            "rejected",
            "after queries",
        ],
        [
            [
                row["attacker"],
                percent(row["broken_without"]["value"]),
                _count(row["queries_without"]),
                _with_count(row, "rounded"),
                _with_count(row, "labelled"),
                percent(row["broken_in_budget"]["value"]),
                percent(row["broken_with"]["value"]),
                _count(row["queries_with"]),
                percent(row["rejected"]["value"]),
                _count(row["rejected_after"]),
            ]
            for row in results["rows"]
        ],
    )


def _with_count(row: Mapping[str, Any], arm: str) -> str:
    """The share of broken examples and, in brackets, the median number of queries."""
    broken, queries = row[f"broken_{arm}"], row[f"queries_{arm}"]
    if broken is None:
        return "–"
    return percent(broken["value"]) + ("" if queries is None else f" ({count_text(queries)})")


def _count(value: int | None) -> str:
    return "–" if value is None else count_text(value)
