"""The report's transfer matrix, which shows how adversarial examples transfer between models, as an entry of the
summary and as a table.
"""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from holdfast.core.evidence import Evidence
from holdfast.metrics.columns import Absent
from holdfast.metrics.transfer import accuracies, matrix, model_names
from holdfast.reports.curves import estimate_to_json
from holdfast.reports.numbers import count_text, number, percent
from holdfast.reports.tree import Cell, Paragraph, Section, Table
from holdfast.reports.words import interval

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
    accuracy = [shown(own, "clean_accuracy") for own in results["accuracy"]]
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


def shown(share: Mapping[str, Any], metric: str = METRIC) -> Cell:
    """Return a share, such as the success rate of examples, with its interval."""
    return Cell(percent(share["value"]), (interval(metric, share),))


def distinct_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of models or data sets without folders. Names that would then be equal are numbered."""
    short_names = [PurePath(name).name or name for name in names]
    return tuple(
        f"{name} {short_names[: place + 1].count(name)}" if short_names.count(name) > 1 else name
        for place, name in enumerate(short_names)
    )
