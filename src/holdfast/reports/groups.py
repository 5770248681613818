"""The accuracy of each group of examples in the reports of a run."""

from collections.abc import Mapping, Sequence
from typing import Any

from holdfast.core.evidence import Evidence
from holdfast.metrics.columns import Absent
from holdfast.metrics.shares import FEWEST_IN_GROUP, per_group
from holdfast.reports.attacks import bar
from holdfast.reports.curves import estimate_to_json
from holdfast.reports.numbers import count_text, percent
from holdfast.reports.tree import Section, Table
from holdfast.reports.words import interval

Json = dict[str, Any]


def groups(evidence: Evidence) -> Json | None:
    """Return the clean and robust accuracy of each group for the summary of a run, or None if the run has no groups or
    no robust accuracy.
    """
    try:
        rows = per_group(evidence)
    except Absent:
        return None
    names = evidence.data["groups"]["names"]
    return {
        "column": evidence.data["groups"]["column"],
        "rows": [
            {
                "name": names[row.place],
                "n": row.robust_accuracy.n,
                "clean_accuracy": estimate_to_json(row.clean_accuracy),
                "robust_accuracy": estimate_to_json(row.robust_accuracy),
                "unclear": row.unclear,
            }
            for row in rows
        ],
    }


def section(results: Mapping[str, Any], noun: str) -> Section:
    """Return the section of the groups: clean and robust accuracy of each, and whether it is clear."""
    by = f" by {results['column']}" if results["column"] else ""
    small = any(row["unclear"] for row in results["rows"])
    rule = f"; a group of fewer than {FEWEST_IN_GROUP} {noun} is unclear, and no gate on worst_group passes with it"
    lead = f"clean and robust accuracy{by}; the intervals of all groups hold together{rule if small else ''}"
    return Section("Groups", (accuracy_table("group", noun, results["rows"]),), lead, "groups", "Groups")


def accuracy_table(name: str, noun: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table of classes or groups: the number of examples, and clean and robust accuracy, of each."""
    cells = [
        (
            row["name"],
            count_text(row["n"]),
            percent(row["clean_accuracy"]["value"]),
            bar(row["robust_accuracy"]),
            interval("robust_accuracy", row["robust_accuracy"]) + (", unclear" if row.get("unclear") else ""),
        )
        for row in rows
    ]
    return Table((name, noun, "clean", "robust", "interval"), cells, extra=frozenset({1, 4}))
