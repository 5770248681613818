"""The report's transfer matrix, which shows how adversarial examples transfer between models, as an entry of the
summary and as a table.
"""

from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

from holdfast.core.evidence import Evidence
from holdfast.metrics.columns import Absent
from holdfast.metrics.transfer import matrix, model_names
from holdfast.reports.curves import estimate_to_json
from holdfast.reports.numbers import count_text, percent
from holdfast.reports.words import interval

Json = dict[str, Any]

METRIC = "transfer_success"


def transfer(evidence: Evidence, confidence: float) -> Json | None:
    """Return the results of the transfer between models for the summary of a run, or None if the transfer was not
    measured.
    """
    try:
        rows = matrix(evidence, confidence)
    except Absent:
        return None
    names = told_apart(model_names(evidence))
    return {
        "models": list(names),
        "n": len(evidence.transfer["id"]),
        "rows": [
            {
                "computed_on": row.maker if row.of is None else names[row.of],
                "source": row.of,
                "shares": [None if share is None else estimate_to_json(share) for share in row.shares],
            }
            for row in rows
        ],
    }


def title(found: Mapping[str, Any], noun: str) -> str:
    """Return the title of the transfer matrix, a table of the transfer of adversarial examples between models."""
    share = (
        f"on {count_text(found['n'])} {noun}: share of those that a model classifies correctly and that the examples "
        "break"
    )
    return f"transfer: in a pass outside the suite, {share}"


def headings(found: Mapping[str, Any]) -> list[str]:
    """Return the column headings of the transfer matrix, a table of the transfer of adversarial examples between
    models.
    """
    return ["computed on", *(f"on {name}" for name in found["models"])]


def cells(found: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yield the rows of the transfer matrix as text: the model on which the examples were computed, and their success
    rate on each model.
    """
    for row in found["rows"]:
        yield [row["computed_on"], *("–" if share is None else shown(share) for share in row["shares"])]


def shown(share: Mapping[str, Any]) -> str:
    """Return the success rate of a transfer between models with its confidence interval as text."""
    return f"{percent(share['value'])} ({interval(METRIC, share)})"


def told_apart(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of models or data sets without folders. Names that would then be equal are numbered."""
    last = [PurePath(name).name or name for name in names]
    return tuple(
        f"{name} {last[: place + 1].count(name)}" if last.count(name) > 1 else name
        for place, name in enumerate(last)
    )
