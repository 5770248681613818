"""Reports as CSV: a row for each example of a run, or the tables of another result."""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TextIO

from holdfast.core.errors import UsageError
from holdfast.core.evidence import Columns, Evidence
from holdfast.core.names import line
from holdfast.reports.curves import robust_examples
from holdfast.reports.tree import Report, text_of

CHUNK = 10_000
"""Number of rows that are formatted at a time, which limits memory."""

_DISTANCES = ("distance_linf", "distance_l2", "distance_l1", "distance_l0", "distance")
_SOURCES = {
    "id": "id",
    "y": "y",
    "clean_prediction": "prediction",
    "robust": "success",
    "broken_by": "broken_by",
    "adversarial_prediction": "adversarial_prediction",
    **{name: name for name in _DISTANCES},
    "queries": "queries",
    "certification": "certified",
    **{
        name: name
        for name in (
            "certified",
            "certified_by",
            "certified_bound",
            "certified_radius",
            "abstained",
            "contradicted",
            "attacked",
        )
    },
}


_NAMED = {"class": "y", "clean_class": "clean_prediction", "adversarial_class": "adversarial_prediction"}
"""Columns with the names of classes, if known, and the columns with their numbers."""


_FORMULA = "=+-@\t\r"
"""characters with which a spreadsheet begins a formula"""


def render(report: Report, file: TextIO) -> None:
    """Write a row for each example, or, for a result without examples, its tables one after another."""
    if report.examples is not None:
        write_rows(report.content, report.examples, file)
        return
    for section in report.sections:
        for table in section.tables():
            rows = ([text_of(cell) for cell in row] for row in table.rows)
            file.write(csv_text([[table.title or section.title], table.headings, *rows, []]))


def headings(columns: Columns, *, with_names: bool = False) -> list[str]:
    """Return the headings of the CSV report of a run. With `with_names`, they include columns with names of classes."""
    measured = [heading for heading, source in _SOURCES.items() if source in columns]
    return [
        *measured,
        *(heading for heading, numbers in _NAMED.items() if with_names and numbers in measured),
    ]


def write_rows(summary: Mapping[str, Any], columns: Columns, file: TextIO) -> None:
    """Write the CSV report of a run, with one row for each example. Booleans are `true` and `false`, and `broken_by` is
    empty for unbroken examples.
    """
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(headings(columns, with_names=bool(summary["data"].get("classes"))))
    for start in range(0, len(columns["id"]), CHUNK):
        writer.writerows(_rows(summary, columns, slice(start, start + CHUNK)))


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    """Return rows as CSV. A text that a spreadsheet would interpret as a formula begins with an apostrophe."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    for row in rows:
        cells = (line(cell) if isinstance(cell, str) else cell for cell in row)
        writer.writerow([f"'{c}" if isinstance(c, str) and c[:1] in _FORMULA and c else c for c in cells])
    return file.getvalue()


def frame(evidence: Evidence) -> Any:
    """Return the results of each example as a `pandas.DataFrame`, with one row for each example, indexed by its id.

    `broken_by` is the name of the attack or pass, `certified_by` that of the method, `robust` is added, and `digest` is
    in hex. Raises `UsageError` if
    pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise UsageError(
            f"to_pandas() needs pandas, which is not installed ({error}): pip install pandas"
        ) from error
    names = [*(record.name for record in evidence.attacks), *(record.name for record in evidence.passes)]
    columns: dict[str, Any] = {
        name: values.numpy() for name, values in evidence.columns.items() if values.dim() == 1
    }
    if "digest" in evidence:
        columns["digest"] = [bytes(row).hex() for row in evidence["digest"].tolist()]
    if "broken_by" in evidence:
        columns["broken_by"] = [
            names[place] if 0 <= place < len(names) else None for place in evidence["broken_by"].tolist()
        ]
    if "certified_by" in evidence:
        methods = [record.name for record in evidence.proofs]
        columns["certified_by"] = [
            methods[place] if place >= 0 else None for place in evidence["certified_by"].tolist()
        ]
    if "success" in evidence:
        columns["robust"] = robust_examples(evidence).numpy()
    return pd.DataFrame(columns).set_index("id")


def _rows(summary: Mapping[str, Any], columns: Columns, rows: slice) -> Iterator[tuple[Any, ...]]:
    stages = [line(record["stage"]) for record in (*summary["attacks"], *summary["passes"])]
    names = [line(str(name)) for name in summary["data"].get("classes") or ()]
    results = summary["certification"]
    methods = [line(row["name"]) for row in results["rows"] if row["stage"]] if results else []
    columns_of_rows: list[list[Any]] = []
    for heading in headings(columns, with_names=bool(names)):
        if heading == "robust":
            robust_rows = ~columns["success"][rows].bool()
            if summary["threat"]["goal"] is None:
                robust_rows &= columns["correct"][rows].bool()
            columns_of_rows.append(["true" if robust else "false" for robust in robust_rows.tolist()])
        elif heading == "certification":
            columns_of_rows.append(_outcomes(columns, rows))
        elif heading in ("certified", "abstained", "contradicted", "attacked"):
            columns_of_rows.append(
                ["true" if value else "false" for value in columns[heading][rows].tolist()]
            )
        elif heading == "certified_by":
            places = columns["certified_by"][rows].tolist()
            columns_of_rows.append([methods[place] if place >= 0 else "" for place in places])
        elif heading == "broken_by":
            places = columns["broken_by"][rows].tolist()
            columns_of_rows.append([stages[place] if 0 <= place < len(stages) else "" for place in places])
        elif heading in _NAMED:
            numbers = columns[_SOURCES[_NAMED[heading]]][rows].tolist()
            columns_of_rows.append([names[number] if 0 <= number < len(names) else "" for number in numbers])
        else:
            columns_of_rows.append(columns[_SOURCES[heading]][rows].tolist())
    return zip(*columns_of_rows, strict=True)


def _outcomes(columns: Columns, rows: slice) -> list[str]:
    """Whether each example is certified, broken or unknown, as text."""
    broken = columns["success"][rows].bool() | ~columns["correct"][rows].bool()
    pairs = zip(columns["certified"][rows].tolist(), broken.tolist(), strict=True)
    return ["certified" if certified else "broken" if wrong else "unknown" for certified, wrong in pairs]
