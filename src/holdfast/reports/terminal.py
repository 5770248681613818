"""Reports as text for a terminal. The functions return strings and print nothing."""

import io
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from holdfast.core.names import line
from holdfast.reports import tree
from holdfast.reports.words import STATE_SIGNS, VERDICTS, sentences, uncapitalized

if TYPE_CHECKING:
    from rich.table import Table as Grid
    from rich.text import Text

_STYLES = {"pass": "bold green", "fail": "bold red", "unclear": "bold yellow", "no gate": "bold"}
_FULL_WIDTH = 78
"""width below which tables leave out their extra columns, in characters"""
_LONGEST = 160
"""number of characters of a row of words that fits on a line where lines are not wrapped"""


def verdict(report: tree.Report, *, colour: bool) -> str:
    """Return the verdict with its reason, a line for each gate, and the raised doubts, as text for a terminal."""
    from rich.text import Text

    lines = Text()
    if report.badge:
        sign, word = report.badge
        begin, space = (sign, " ") if report.verdict_first else (f"{sign} {word}", "  ")
        lines.append(begin, style=_STYLES[report.tone])
        lines.append(space)
    lines.append(f"{line(report.headline)}\n")
    for gate in (gate for block in report.blocks(tree.Gates) for gate in block.gates):
        lines.append(f"  {VERDICTS[gate.verdict][0]} ", style=_STYLES[gate.verdict])
        lines.append(
            f"{gate.verdict}: requires {line(gate.text)}, measured {gate.measured}; {line(gate.reason)}\n"
        )
    for doubt in (doubt for block in report.blocks(tree.Doubts) for doubt in block.raised):
        lines.append("  ▲ ", style="yellow")
        text = line(sentences(doubt.message or doubt.title))
        state = "open" if doubt.accepted is None else "accepted"
        because = "" if doubt.accepted is None else f" Accepted because: {line(doubt.accepted)}"
        lines.append(f"doubt {line(doubt.name)} {state}: {text}{because}\n")
    return as_string(lines, colour=colour, width=None)


def body(report: tree.Report, *, colour: bool, width: int | None = None, brief: bool = False) -> str:
    """Return the sections of a report as text for a terminal, without its verdict. If `width` is None, lines are not
    wrapped. With `brief`, folded parts are left out, such as less important metrics; the other formats contain them.
    """
    page = _Page(colour=colour, width=width, brief=brief)
    begin = [as_lines([report.caution])] if report.caution else []
    parts = (part for section in report.sections for part in page.section(section))
    lead = (part for block in report.lead for part in page.block(block, ""))
    return "\n\n".join([*begin, *parts, *lead])


class _Page:
    """The blocks of one report at one width."""

    def __init__(self, *, colour: bool, width: int | None, brief: bool) -> None:
        self.colour, self.width, self.brief = colour, width, brief

    def section(self, section: tree.Section) -> Iterator[str]:
        if not tree.shown_in("text", section.depth):
            return
        title = f"{uncapitalized(section.title)}: {section.lead}" if section.lead else section.title
        first = True
        for block in section.blocks:
            for text in self.block(block, title):
                heading = first and isinstance(block, tree.Items | tree.Facts | tree.Paragraph)
                yield f"{line(section.title)}:\n{text}" if heading else text
                first = False

    def block(self, block: tree.Block, title: str) -> Iterator[str]:
        """Yield a block as text. `title` is that of its section, for a table without one."""
        if not tree.shown_in("text", block.depth):
            return
        match block:
            case tree.Paragraph(text):
                yield as_string(cell(text), colour=self.colour, width=self.width).rstrip()
            case tree.Items(texts):
                yield as_lines(f"- {text}" for text in texts)
            case tree.Facts(pairs):
                yield as_lines(f"- {name}: {value}" for name, value in pairs)
            case tree.Code(lines):
                yield as_lines(lines)
            case tree.Table() if self.too_wide(block):
                yield as_lines(_stacked(block))
            case tree.Table():
                yield as_string(self.grid(block, title), colour=self.colour, width=self.width).rstrip()
            case tree.Doubts() if block.signs:
                yield _signs(block)
            case tree.Group(inner, blocks) if not (self.brief and block.folded):
                heading = f"{line(inner)}:\n" if blocks and not isinstance(blocks[0], tree.Table) else ""
                for each in blocks:
                    for text in self.block(each, inner):
                        yield f"{heading}{text}"
                        heading = ""

    def too_wide(self, table: tree.Table) -> bool:
        """Whether a table of words has rows that do not fit on a line."""
        words = {*range(1, len(table.headings))} <= table.texts
        longest = max((sum(len(tree.text_of(cell)) for cell in row) for row in table.rows), default=0)
        return words and longest > (self.width or _LONGEST)

    def grid(self, table: tree.Table, title: str) -> "Grid":
        """A table of the report as a terminal table."""
        narrow = self.width is not None and self.width < _FULL_WIDTH
        places = [k for k in range(len(table.headings)) if not (narrow and k in table.extra)]
        shown = grid(table.title or title, [table.headings[k] for k in places])
        for column, place in zip(shown.columns, places, strict=True):
            if place in table.texts:
                column.justify, column.no_wrap = "left", False
        for row in table.rows:
            shown.add_row(*(cell(tree.text_of(row[k])) for k in places))
        return shown


def _stacked(table: tree.Table) -> Iterator[str]:
    """The rows of a table with a line for each cell."""
    for name, *cells in table.rows:
        yield tree.text_of(name)
        for heading, cell in zip(table.headings[1:], cells, strict=True):
            yield f"- {heading}: {tree.text_of(cell)}"


def _signs(doubts: tree.Doubts) -> str:
    """The names of the doubts, each with the sign of its state, and a legend."""
    names = "  ".join(f"{STATE_SIGNS[state]} {line(name)}" for name, state in doubts.signs)
    states = {state for _, state in doubts.signs}
    legend = ", ".join(f"{sign} {state}" for state, sign in STATE_SIGNS.items() if state in states)
    return f"doubts ({legend})  {names}\n"


def grid(title: str, headings: Sequence[str]) -> "Grid":
    """Return an empty terminal table with headings. The first column is aligned left, and the others are
    aligned right.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as Grid

    table = Grid(title=cell(title), title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for place, heading in enumerate(headings):
        table.add_column(cell(heading), justify="right" if place else "left", no_wrap=place > 0)
    return table


def cell(text: str) -> "Text":
    """Return a text as a cell of a terminal table, without markup and control characters."""
    from rich.text import Text

    return Text(line(text))


def as_lines(texts: Iterable[str]) -> str:
    """Return texts for a terminal, each on one line and without control characters and commands of CI systems."""
    return "\n".join(map(line, texts))


def as_string(renderable: Any, *, colour: bool, width: int | None) -> str:
    """Return the text that a terminal would show for a table, in lines of `width` characters, or without wrapping if
    `width` is None.
    """
    from rich.console import Console

    file = io.StringIO()
    console = Console(
        file=file,
        force_terminal=colour,
        no_color=not colour,
        color_system="standard" if colour else None,
        width=width or 10_000,  # wider than any table
        legacy_windows=False,
        highlight=False,
    )
    console.print(renderable, soft_wrap=width is None, end="")
    # rich fills lines with spaces
    return "\n".join(line.rstrip() for line in file.getvalue().split("\n"))
