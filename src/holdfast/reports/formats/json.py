"""Reports as strict JSON."""

from typing import TextIO

from holdfast.reports.tree import Report
from holdfast.reports.words import json_text


def render(report: Report, file: TextIO) -> None:
    """Write the content of a report as strict JSON, without NaN and infinities, with a newline at the end."""
    file.write(json_text(report.content))
