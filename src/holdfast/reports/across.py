"""Report of the transfer across data sets: the success of perturbations that were computed on one data set, on the
inputs of the others.

It is an entry of the summary and a table. The control is the success of the same perturbations with their values in
random order.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Evidence
from holdfast.core.remedies import Placeholder, Remedy
from holdfast.metrics.columns import Absent
from holdfast.reports.curves import estimate_to_json
from holdfast.reports.numbers import count_text, percent
from holdfast.reports.transfer import METRIC, distinct_names, heat
from holdfast.reports.tree import Cell, Paragraph, Section, Table
from holdfast.reports.words import interval
from holdfast.statistics.intervals import proportion

Json = dict[str, Any]


def across(evidence: Evidence) -> Json | None:
    """Return the results of the transfer between data sets for the summary of a run, or None if the transfer was not
    measured.
    """
    try:
        rows = across_rows(evidence)
    except Absent:
        return None
    names = distinct_names(sets(evidence))
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


def section(results: Mapping[str, Any], noun: str) -> Section:
    """Return the section of the transfer across data sets: the source data set, and success rates with those of the
    controls.
    """
    lead = (
        f"share of {count_text(results['n'])} {noun} of each data set whose prediction changes; control: the same "
        "perturbations in random order"
    )
    rows = [
        (
            row["computed_on"],
            *(
                Cell(
                    percent(share["value"]),
                    (interval(METRIC, share), f"control {percent(control['value'])}"),
                    heat=heat(share),
                    framed=row["computed_on"] == name,
                )
                for name, share, control in zip(results["data"], row["shares"], row["controls"], strict=True)
            ),
        )
        for row in results["rows"]
    ]
    note = (
        f"A seeded sample of the {noun} if there are more, paired at random. A stronger colour means that a larger "
        "share of predictions changes. Cells with a frame are perturbations applied to the data set on which they were "
        "computed. Labels are not used, so the other data may have other classes. The control keeps every norm. Only "
        "the difference from it is transfer."
    )
    table = Table(("computed on", *(f"applied to {name}" for name in results["data"])), rows)
    return Section("Transfer across data", (table, Paragraph(note, "page")), lead, "across", "Across data")


@dataclass(frozen=True)
class AcrossRow:
    """Success rates, on the inputs of each data set, of perturbations that were computed on one data set, and of their
    random controls.
    """

    made_on: str
    turned: tuple[Estimate, ...]
    """for each data set, the share of its inputs whose prediction changes from that of the clean input"""
    control: tuple[Estimate, ...]
    """the same shares for the perturbations with their coordinates in random order"""


def sets(evidence: Evidence) -> tuple[str, ...]:
    """Return the names of the data sets of a run: the evaluated one, followed by those that were added for the transfer
    between data sets.
    """
    return tuple(str(card.get("name", "data")) for card in (evidence.data, *evidence.others))


def across_rows(evidence: Evidence) -> tuple[AcrossRow, ...]:
    """Return the success rates of the transfer between data sets, with one row for each data set on which perturbations
    were computed.

    Raises `Absent` if no other data set was given or time ran out.
    """
    if "turned" not in evidence.across:
        raise Absent(
            "transfer across data sets was not measured",
            Remedy("across", Placeholder("DATA", "[DATA]"), reason="with inputs of the same shape"),
        )
    shares = {
        name: [[proportion(mask) for mask in row] for row in evidence.across[name].permute(1, 2, 0)]
        for name in ("turned", "control")
    }
    return tuple(
        AcrossRow(name, tuple(shares["turned"][k]), tuple(shares["control"][k]))
        for k, name in enumerate(sets(evidence))
    )
