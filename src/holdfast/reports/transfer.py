"""Reports of transfer, as entries of the summary and as sections: of adversarial examples between models, and of
perturbations that were computed on one data set, on the inputs of others.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from holdfast.core.errors import Placeholder, Remedy
from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Evidence
from holdfast.metrics.comparisons import accuracies, matrix, model_names
from holdfast.metrics.shares import Absent
from holdfast.reports.curves import estimate_to_json
from holdfast.reports.tree import Cell, Paragraph, Section, Table
from holdfast.reports.words import count_text, estimate_cell, interval, number, percent
from holdfast.statistics.intervals import proportion

Json = dict[str, Any]

METRIC = "transfer_success"


def transfer(evidence: Evidence) -> Json | None:
    """Return the results of the transfer between models for the summary of a run, or None if the transfer was not
    measured.
    """
    try:
        rows = matrix(evidence)
    except Absent:
        return None
    names = distinct_names(model_names(evidence))
    return {
        "models": list(names),
        "n": len(evidence.transfer["id"]),
        "accuracy": [estimate_to_json(share) for share in accuracies(evidence)],
        "rows": [
            {
                "computed_on": row.maker if row.of is None else names[row.of],
                "source": row.of,
                "shares": [None if share is None else estimate_to_json(share) for share in row.shares],
            }
            for row in rows
        ],
    }


def section(results: Mapping[str, Any], noun: str) -> Section:
    """Return the transfer matrix: the model on which examples were computed, and their success rate on each model."""
    lead = (
        f"in a pass outside the suite, on {count_text(results['n'])} {noun}: share of those that a model classifies "
        "correctly and that the examples break; the first line is the accuracy on clean inputs"
    )
    accuracy = [estimate_cell("clean_accuracy", own) for own in results["accuracy"]]
    rows = [
        (
            row["computed_on"],
            *(
                Cell("–", ("none correct",))
                if share is None
                else _broken(share, framed=row["source"] == place)
                for place, share in enumerate(row["shares"])
            ),
        )
        for row in results["rows"]
    ]
    headings = ("computed on", *(f"on {name}" for name in results["models"]))
    note = (
        "A stronger colour means a larger share. Cells with a frame are examples computed on the model itself. Every "
        "example takes all steps, also after it is adversarial."
    )
    table = Table(headings, [("– (accuracy)", *accuracy), *rows])
    return Section("Transfer", (table, Paragraph(note, "page")), lead, "transfer", "Transfer")


def _broken(share: Mapping[str, Any], *, framed: bool) -> Cell:
    of = f"{interval(METRIC, share)} of {count_text(share['n'])}"
    return Cell(percent(share["value"]), (of,), heat=heat(share), framed=framed)


def heat(share: Mapping[str, Any]) -> int:
    """Return the strength of the background of a share."""
    return round(10 * number(share["value"]))


def distinct_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of models or data sets without folders. Names that would then be equal are numbered."""
    short_names = [PurePath(name).name or name for name in names]
    return tuple(
        f"{name} {short_names[: place + 1].count(name)}" if short_names.count(name) > 1 else name
        for place, name in enumerate(short_names)
    )


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


def across_section(results: Mapping[str, Any], noun: str) -> Section:
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
