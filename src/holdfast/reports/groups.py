"""The accuracy of each group of examples in the reports of a run."""

from collections.abc import Mapping
from typing import Any

from holdfast.core.evidence import Evidence
from holdfast.metrics.columns import Absent
from holdfast.metrics.shares import FEWEST_IN_GROUP, per_group
from holdfast.reports.curves import estimate_to_json
from holdfast.reports.numbers import count_text, percent
from holdfast.reports.words import TextTable, interval

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


def table(results: Mapping[str, Any], noun: str) -> TextTable:
    """Return the table of the groups: clean and robust accuracy of each with its interval, and whether it is clear."""
    by = f" by {results['column']}" if results["column"] else ""
    small = any(row["unclear"] for row in results["rows"])
    rule = f"; a group of fewer than {FEWEST_IN_GROUP} {noun} is unclear, and no gate on worst_group passes with it"
    return TextTable(
        f"groups: clean and robust accuracy{by}; the intervals of all groups hold together{rule if small else ''}",
        ["group", noun, "clean", "robust", "interval"],
        [
            [
                row["name"],
                count_text(row["n"]),
                percent(row["clean_accuracy"]["value"]),
                percent(row["robust_accuracy"]["value"]),
                interval("robust_accuracy", row["robust_accuracy"]) + (", unclear" if row["unclear"] else ""),
            ]
            for row in results["rows"]
        ],
    )
