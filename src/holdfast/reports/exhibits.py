"""The report of the bundled models with masked gradients (`holdfast demo --gallery`)."""

from collections.abc import Mapping, Sequence
from typing import Any

from holdfast.reports.numbers import percent
from holdfast.reports.tree import Report, Section, Table

_COLUMNS = {
    "masked model": "name",
    "naive": "naive_robust_accuracy",
    "twin": "twin_robust_accuracy",
    "adaptive": "adaptive_robust_accuracy",
}


def exhibits_report(measured: Sequence[Mapping[str, Any]]) -> Report:
    """Return the report with the robust accuracies of the bundled models with masked gradients, and the doubts that
    were raised for each.
    """
    first = measured[0]
    title = f"robust accuracy of {first['n']} digits under linf:{first['eps']:g}"
    rows = []
    for item in measured:
        name, *shares = (item[key] for key in _COLUMNS.values())
        rows.append((name, *map(percent, shares), ", ".join(item["doubts"])))
    headings = (*_COLUMNS, "doubts raised by the naive evaluation")
    return Report(
        verb="demo",
        about="models with masked gradients",
        headline="naive: PGD-40 on the cross-entropy; twin: the same network without the defence, under suite standard",
        content={"gallery": list(measured)},
        sections=(Section(title, (Table(headings, rows, texts=frozenset({4})),)),),
    )
