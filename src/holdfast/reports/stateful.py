"""Report of the black-box attacks on a model with a guard: how many examples they break with the guard and without,
after how many queries, and after how many queries one is rejected.

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
    "informed": "informed Square, which knows the query detector",
}
"""Attacks by the prefix of their columns in the table of the evidence."""
_WORST = "the best of these for each example"  # rejected: each of the attacks had a rejected query


def stateful_results(table: Table) -> Json | None:
    """Return the results of the black-box attacks on a guard for the summary; None if no example was attacked."""
    if not len(table):
        return None
    names = [name for name in _ATTACKERS if f"{name}_with_broken" in table.columns]
    columns = {
        column: torch.stack([table.columns[f"{name}_{column}"] for name in names])
        for column in ("without_broken", "with_broken", "with_rejected")
    }
    rows = [
        _row(_ATTACKERS[name], {column: values[k] for column, values in columns.items()})
        for k, name in enumerate(names)
    ]
    worst = {
        "without_broken": _first(columns["without_broken"]),
        "with_broken": _first(columns["with_broken"]),
        "with_rejected": torch.where(
            (columns["with_rejected"] > 0).all(0), columns["with_rejected"].amax(0), 0
        ),
    }
    return {"n": len(table), "rows": [*rows, _row(_WORST, worst)]}


def _row(attacker: str, columns: Mapping[str, Tensor]) -> Json:
    return {
        "attacker": attacker,
        **_arm(columns["without_broken"], "without"),
        **_arm(columns["with_broken"], "with"),
        **_noticed(columns["with_rejected"]),
    }


def _first(broken_at: Tensor) -> Tensor:
    """The least number of queries of all attacks (attacks, n) that broke an example, 0 if none did."""
    never = torch.iinfo(broken_at.dtype).max
    least = torch.where(broken_at > 0, broken_at, never).amin(0)
    return torch.where(least == never, 0, least)


def _arm(broken_at: Tensor, arm: str) -> Json:
    """The share of broken examples, and the median number of queries until they were."""
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
                percent(row["broken_with"]["value"]),
                _count(row["queries_with"]),
                percent(row["rejected"]["value"]),
                _count(row["rejected_after"]),
            ]
            for row in results["rows"]
        ],
    )


def _count(value: int | None) -> str:
    return "–" if value is None else count_text(value)
