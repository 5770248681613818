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
from holdfast.reports.numbers import count_text, percent
from holdfast.reports.words import TextTable, interval

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


def table(results: Mapping[str, Any], noun: str) -> TextTable:
    """Return the transfer matrix: the model on which examples were computed, and their success rate on each model."""
    share = (
        f"on {count_text(results['n'])} {noun}: share of those that a model classifies correctly and that the examples "
        "break; the first line is the accuracy on clean inputs"
    )
    return TextTable(
        f"transfer: in a pass outside the suite, {share}",
        ["computed on", *(f"on {name}" for name in results["models"])],
        [
            ["– (accuracy)", *(shown(own, "clean_accuracy") for own in results["accuracy"])],
            *(
                [row["computed_on"], *("–" if share is None else shown(share) for share in row["shares"])]
                for row in results["rows"]
            ),
        ],
    )


def shown(share: Mapping[str, Any], metric: str = METRIC) -> str:
    """Return a share of the transfer matrix, such as the success rate of examples, with its interval as text."""
    return f"{percent(share['value'])} ({interval(metric, share)})"


def distinct_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of models or data sets without folders. Names that would then be equal are numbered."""
    short_names = [PurePath(name).name or name for name in names]
    return tuple(
        f"{name} {short_names[: place + 1].count(name)}" if short_names.count(name) > 1 else name
        for place, name in enumerate(short_names)
    )
