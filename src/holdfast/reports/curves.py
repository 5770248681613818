"""Curves, and accuracy by class and by group, in the summary of a run as JSON whose size is limited for any number of
examples and classes, and as tables.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import ones_like

from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Evidence
from holdfast.core.types import Mask
from holdfast.metrics.columns import Absent
from holdfast.metrics.curves import Curve, accuracy_against_eps, accuracy_against_queries
from holdfast.metrics.shares import FEWEST_IN_GROUP, per_class, per_group
from holdfast.reports.attacks import bar
from holdfast.reports.json_schemas import EstimateJson
from holdfast.reports.numbers import count_text, percent, strict
from holdfast.reports.tree import Section, Table
from holdfast.reports.words import interval

Json = dict[str, Any]

MOST_CLASSES = 1000
"""Largest number of classes in the summary. If there are more, those of lowest robust accuracy are included."""


def judged(evidence: Evidence) -> Mask:
    """Return the mask of the examples that metrics count: all or, for a targeted threat model, those that are neither
    labelled nor predicted as the target class when clean.
    """
    return evidence["eligible"].bool() if "eligible" in evidence else ones_like(evidence["correct"].bool())


def robust_examples(evidence: Evidence) -> Mask:
    """Return the mask of the robust examples: correct and unbroken or, for a targeted threat model, only unbroken."""
    unbroken = ~evidence["success"].bool()
    return unbroken if evidence.threat.goal is not None else unbroken & evidence["correct"].bool()


def estimate_to_json(value: Estimate) -> EstimateJson:
    """Return the value, the confidence interval and the sample size of an estimate as JSON for the summary of a run."""
    return {"value": strict(value.value), "low": strict(value.low), "high": strict(value.high), "n": value.n}


def accuracy_curves(evidence: Evidence) -> dict[str, list[Json]]:
    """Return robust accuracy as a function of eps and as a function of queries, as JSON for the summary, with at most a
    hundred steps each.

    A curve is empty if the attacks for it were not run.
    """
    return {
        "eps": _points(accuracy_against_eps, evidence, "eps"),
        "queries": _points(accuracy_against_queries, evidence, "queries"),
    }


def _points(curve: Callable[[Evidence], Curve], evidence: Evidence, axis: str) -> list[Json]:
    if not len(evidence):
        return []
    try:
        points = curve(evidence)
    except Absent:
        return []
    return [{axis: strict(x), **estimate_to_json(y)} for x, y in zip(points.x, points.y, strict=True)]


def per_class_to_json(evidence: Evidence, names: tuple[str, ...]) -> list[Json]:
    """Return the clean and robust accuracy of each class as JSON for the summary. Of more than a thousand classes, the
    worst are included.
    """
    if evidence.threat.goal is not None or not len(evidence):
        return []
    rows = [row for row in per_class(evidence) if row.robust_accuracy is not None]
    worst = sorted(rows, key=lambda row: row.robust_accuracy.value if row.robust_accuracy else 0.0)
    return [
        {
            "class": row.label,
            "name": class_name(row.label, names),
            "n": row.n,
            "clean_accuracy": estimate_to_json(row.clean_accuracy),
            "robust_accuracy": estimate_to_json(row.robust_accuracy),
        }
        for row in sorted(worst[:MOST_CLASSES], key=lambda row: row.label)
        if row.robust_accuracy is not None
    ]


def class_name(label: int, names: tuple[str, ...]) -> str:
    """Return the name of a class, or its number as text if the class has no name."""
    return names[label] if 0 <= label < len(names) else str(label)


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


def groups_section(results: Mapping[str, Any], noun: str) -> Section:
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
