"""Reports as CSV: a row for each example of a run, or the tables of another result."""

from typing import TextIO

from holdfast.reports.table import csv_text, write_rows
from holdfast.reports.tree import Report, text_of


def render(report: Report, file: TextIO) -> None:
    """Write a row for each example, or, for a result without examples, its tables one after another."""
    if report.examples is not None:
        write_rows(report.content, report.examples, file)
        return
    for section in report.sections:
        for table in section.tables():
            rows = ([text_of(cell) for cell in row] for row in table.rows)
            file.write(csv_text([[table.title or section.title], table.headings, *rows, []]))
