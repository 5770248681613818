"""The result of an explanation: a sentence, and figures with their numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from holdfast.reports import tree
from holdfast.reports.formats.csv import csv_text
from holdfast.reports.formats.html import fragment
from holdfast.reports.numbers import strict, value_text
from holdfast.reports.terminal import as_lines
from holdfast.reports.write import rendered, write

Json = dict[str, Any]
Cell = str | int | float | None


@dataclass(frozen=True)
class Bar:
    """A bar of a chart: its label, its length as a fraction of the longest bar, and its value as text."""

    label: str
    share: float
    text: str


@dataclass(frozen=True)
class Figure:
    """A figure of an explanation, with the numbers that it shows."""

    name: str
    """name of the figure, which is unique in the explanation and does not depend on its numbers"""
    title: str
    """the finding, as a sentence"""
    alternative: str
    """description of the figure for readers who do not see it"""
    headings: tuple[str, ...]
    """names of the columns of `rows`"""
    rows: tuple[tuple[Cell, ...], ...]
    """the numbers of the figure"""
    pictures: tuple[tree.Picture, ...] = ()
    bars: tuple[Bar, ...] = ()
    tabular: bool = False
    """whether the rows are shown as a table, and not only as CSV"""
    note: str = ""
    """how the figure is read, and what limits it"""
    reason: str = ""
    """why the prediction changes or the model fails, as a sentence, if the figure shows it"""
    columns: int = 0
    """number of pictures in a row; 0 for as many as fit"""

    @property
    def csv(self) -> str:
        """The numbers of the figure as CSV."""
        rows = ([float(f"{c:.6g}") if isinstance(c, float) else c for c in row] for row in self.rows)
        return csv_text([self.headings, *rows])

    def to_json(self) -> Json:
        """Return the figure as strict JSON, without its pictures."""
        return {
            "name": self.name,
            "title": self.title,
            "alternative": self.alternative,
            "headings": list(self.headings),
            "rows": [[strict(cell) for cell in row] for row in self.rows],
            "note": self.note,
        }


@dataclass(frozen=True, repr=False)
class Explained:
    """An explanation of one example, or of a model."""

    title: str
    """what is explained, as in `example 17 of mnist`"""
    sentence: str
    """the main finding"""
    figures: tuple[Figure, ...]
    advice: tuple[str, ...] = ()
    """what the user can do about the finding, one sentence each"""
    notes: tuple[str, ...] = ()
    """what was not applicable or not measured, with the reason, and what limits the explanation"""
    facts: tuple[tuple[str, str], ...] = ()
    """model, data, threat and seed, as names and values"""

    def __getitem__(self, name: str) -> Figure:
        """Return a figure by its name. Raises `KeyError` if there is none with this name."""
        for figure in self.figures:
            if figure.name == name:
                return figure
        raise KeyError(f"there is no figure {name!r}; this explanation has {', '.join(self.names)}")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the figures in their order."""
        return tuple(figure.name for figure in self.figures)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the prediction changes or the model fails: the reasons that figures show."""
        return tuple(figure.reason for figure in self.figures if figure.reason)

    @cached_property
    def report(self) -> tree.Report:
        """The explanation as a report."""
        lead = [
            tree.Group(title, (tree.Items(texts),))
            for title, texts in (("Why", self.reasons), ("What you can do", self.advice))
            if texts
        ]
        sections = [_section(figure) for figure in self.figures]
        sections += [tree.Section("Notes", (tree.Items(self.notes),))] if self.notes else []
        sections += [tree.Section("Explained", (tree.Facts(self.facts),), depth="page")] if self.facts else []
        content = {
            "title": self.title,
            "sentence": self.sentence,
            "reasons": list(self.reasons),
            "advice": list(self.advice),
            "notes": list(self.notes),
            "facts": dict(self.facts),
            "figures": [figure.to_json() for figure in self.figures],
        }
        headline = f"{self.title}: {self.sentence}"
        return tree.Report("explain", self.title, headline, content, sections, title=self.sentence, lead=lead)

    def fragment(self, *, level: int = 2) -> str:
        """Return the explanation as HTML without a page around it, which needs the style sheet of reports.

        `level` is the level of its first heading.
        """
        return fragment(self.report, level=level)

    def page(self) -> str:
        """Return the explanation as a self-contained HTML page without scripts."""
        return rendered(self.report, ".html")

    def to_json(self) -> str:
        """Return the explanation as strict JSON, without its pictures."""
        return rendered(self.report, ".json")

    def text(self) -> str:
        """Return the findings as text for a terminal, one line for each figure, and the result in the last one."""
        lines = [f"- {figure.title}" for figure in self.figures]
        for heading, texts in (
            ("Why:", self.reasons),
            ("What you can do:", self.advice),
            ("Notes:", self.notes),
        ):
            lines += ["", heading, *(f"- {text}" for text in texts)] if texts else []
        return as_lines([*lines, *([""] if lines else []), self.report.headline])

    def write(self, path: str | Path) -> Path:
        """Write the explanation in the format of the file suffix, such as `.html`. Return the path."""
        return write(self.report, Path(path))

    def _repr_html_(self) -> str:
        return self.fragment()

    def __repr__(self) -> str:
        return f"<Explained: {self.title}: {self.sentence}>"


def bars(labels: Sequence[str], values: Sequence[float], texts: Sequence[str]) -> tuple[Bar, ...]:
    """Return bars whose longest one has the length 1. Values are at least 0."""
    most = max([*values, 0.0]) or 1.0
    return tuple(
        Bar(label, value / most, text) for label, value, text in zip(labels, values, texts, strict=True)
    )


def _section(figure: Figure) -> tree.Section:
    blocks: list[tree.Block] = []
    if figure.pictures:
        blocks.append(tree.Pictures(figure.pictures, figure.alternative, figure.columns))
    if figure.bars:
        bars = [(bar.label, tree.Cell(bar.text, bar=(bar.share,) * 3)) for bar in figure.bars]
        blocks.append(tree.Table(("name", "value"), bars, figure.alternative))
    if figure.tabular:
        rows: list[tree.Row] = [[value_text(value) for value in row] for row in figure.rows]
        blocks.append(tree.Table(figure.headings, rows, figure.alternative))
    if figure.note:
        blocks.append(tree.Paragraph(figure.note))
    numbers = tree.Code(figure.csv.splitlines(), f"Numbers of the figure {figure.name} as CSV")
    described = (tree.Paragraph(figure.alternative), numbers)
    hidden = f" of the figure {figure.name}"
    blocks.append(tree.Group("Description and numbers", described, folded=True, hidden=hidden, depth="page"))
    return tree.Section(figure.title, blocks, depth="page")
