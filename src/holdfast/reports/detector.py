"""Report of the detector of a model: at each false positive rate, the detection rate for attackers that do not know the
detector and that know it, and the robust accuracy with rejection.

It is a table of metrics of the summary.
"""

from collections.abc import Mapping
from typing import Any, Final

from holdfast.metrics.names import PERCENTS, at_percent
from holdfast.reports.numbers import count_text, percent
from holdfast.reports.words import TextTable

COLUMNS: Final = (
    ("oblivious_detection_rate", "detected if unknown"),
    ("detection_rate", "detected if known"),
    ("accepted_right", "robust with rejection"),
)
"""metrics at a false positive rate, with the headings of their columns"""


def detector(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the rows of the table: for each false positive rate in percent, the estimates of the metrics, or None for
    those that were not measured. None if the model has no detector, or none that was evaluated.
    """
    metrics = summary["metrics"]
    rows = [
        {"percent": rate, "estimates": [metrics.get(at_percent(name, rate)) for name, _ in COLUMNS]}
        for rate in PERCENTS
    ]
    # robust accuracy is measured whenever there are enough clean inputs, also if no attack succeeded
    measured = [row for row in rows if row["estimates"][-1] is not None]
    return {"n": summary["n"], "rows": rows, "complete": len(measured) == len(rows)} if measured else None


def table(results: Mapping[str, Any], noun: str) -> TextTable:
    """Return the table of the detector."""
    title = f"detector: {count_text(results['n'])} {noun} under attacks that do and do not know it"
    return TextTable(
        title if results["complete"] else f"{title}; 0.1 % needs 999 or more",
        ["false positives", *(heading for _, heading in COLUMNS)],
        [
            [f"{row['percent']} %", *("–" if e is None else percent(e["value"]) for e in row["estimates"])]
            for row in results["rows"]
        ],
    )
