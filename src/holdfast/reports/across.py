"""The transfer across data sets, as an entry of the summary and as a table."""

from collections.abc import Iterator, Mapping
from typing import Any

from holdfast.core.evidence import Evidence
from holdfast.metrics.across import across_rows as carried
from holdfast.metrics.across import sets
from holdfast.metrics.columns import Absent
from holdfast.reports.curves import estimate_to_json
from holdfast.reports.numbers import count_text, percent
from holdfast.reports.transfer import shown, told_apart

Json = dict[str, Any]


def across(evidence: Evidence, confidence: float) -> Json | None:
    """Return the names of the data sets and the results of the transfer between them, or None if it
    was not measured.
    """
    try:
        rows = carried(evidence, confidence)
    except Absent:
        return None
    names = told_apart(sets(evidence))
    return {
        "data": list(names),
        "n": len(evidence.across["turned"]),
        "rows": [
            {
                "computed_on": name,
                "shares": [estimate_to_json(share) for share in row.turned],
                "controls": [estimate_to_json(share) for share in row.control],
            }
            for name, row in zip(names, rows, strict=True)
        ],
    }


def title(found: Mapping[str, Any], noun: str) -> str:
    """Return the title of the table of the transfer across data sets."""
    return (
        f"across data: share of {count_text(found['n'])} {noun} of each data set whose prediction changes; control: "
        "the same perturbations in random order"
    )


def headings(found: Mapping[str, Any]) -> list[str]:
    """Return the column headings of the table of the transfer across data sets."""
    return ["computed on", *(f"applied to {name}" for name in found["data"])]


def cells(found: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yield each row of the table as text: the source data set, then fractions with intervals, and those of the
    controls.
    """
    for row in found["rows"]:
        pairs = zip(row["shares"], row["controls"], strict=True)
        yield [
            row["computed_on"],
            *(f"{shown(share)}, control {percent(control['value'])}" for share, control in pairs),
        ]
