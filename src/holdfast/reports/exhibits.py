"""Results for the bundled models with masked gradients (`holdfast demo --gallery`), as a table and as JSON."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from holdfast.reports.numbers import percent
from holdfast.reports.terminal import as_string, grid

COLUMNS = {
    "masked model": "name",
    "naive": "naive_robust_accuracy",
    "twin": "twin_robust_accuracy",
    "adaptive": "adaptive_robust_accuracy",
}


def exhibit_table(measured: Sequence[Mapping[str, Any]], *, colour: bool, width: int | None = None) -> str:
    """Return a text table with the robust accuracies of the bundled models with masked gradients, and the doubts that
    were raised for each.
    """
    first = measured[0]
    title = f"robust accuracy of {first['n']} digits under linf:{first['eps']:g}"
    table = grid(title, (*COLUMNS, "doubts raised by the naive evaluation"))
    table.columns[-1].justify, table.columns[-1].no_wrap = "left", False
    for item in measured:
        name, *shares = (item[key] for key in COLUMNS.values())
        table.add_row(name, *map(percent, shares), ", ".join(item["doubts"]))
    return as_string(table, colour=colour, width=width)


def exhibits_to_json(measured: Sequence[Mapping[str, Any]]) -> str:
    """Return the results for the bundled models with masked gradients as JSON text, with one entry for each model."""
    return json.dumps({"gallery": list(measured)}, indent=2) + "\n"
