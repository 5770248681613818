"""Reports in Markdown, for a pull request or the summary of a CI job: the verdict, followed by tables.

Sections that only a page shows in full are folded.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TextIO

from holdfast.core.names import line
from holdfast.reports import tree
from holdfast.reports.words import VERDICTS, capitalized, sentences

# `@` and `#` are included, because they would mention users and issues on GitHub
_SPECIAL = re.compile(r"([\\`*_\[\]<>|~$@&#])")


def render(report: tree.Report, file: TextIO) -> None:
    """Write a report as GitHub-flavoured Markdown, in which text from users is escaped."""
    file.write(document(report))


def document(report: tree.Report) -> str:
    """Return a report as GitHub-flavoured Markdown, in which text from users is escaped."""
    begin = f"{' '.join(report.badge)}: " if report.badge else ""
    lines = [f"**{escaped(report.caution)}**", ""] if report.caution else []
    lines += [f"## {escaped(capitalized(f'{begin}{report.about}'))}", "", escaped(report.headline), ""]
    lines += _blocks(block for block in report.lead if tree.shown_in("text", block.depth))
    for section in report.sections:
        lines += _section(section)
    return "\n".join(lines)


def _section(section: tree.Section) -> Iterator[str]:
    inner = [*_blocks(section.blocks)]
    if not inner:
        return
    # a gallery is long
    folded = section.depth == "page" or any(isinstance(block, tree.Gallery) for block in section.blocks)
    title = escaped(capitalized(section.title))
    yield from ([f"<details><summary>{title}</summary>"] if folded else [f"### {title}"])
    yield ""
    if section.lead:
        yield from (escaped(sentences(section.lead)), "")
    yield from inner
    if folded:
        yield from ("</details>", "")


def _blocks(blocks: Iterable[tree.Block]) -> Iterator[str]:
    for block in blocks:
        yield from _block(block)


def _block(block: tree.Block) -> Iterator[str]:
    match block:
        case tree.Paragraph(text):
            yield from (escaped(sentences(text)), "")
        case tree.Items(texts):
            yield from (*(f"- {escaped(sentences(text))}" for text in texts), "")
        case tree.Facts(pairs):
            yield from (*(f"- **{escaped(name)}**: {escaped(value)}" for name, value in pairs), "")
        case tree.Table():
            rows = ([escaped(tree.text_of(cell)) for cell in row] for row in block.rows)
            yield from markdown_table([*map(escaped, block.headings)], rows, block.texts)
        case tree.Chart() if block.file:
            yield from (f"![{escaped(block.alternative)}]({block.file})", "")
        case tree.Code(lines) if not block.label:  # the numbers of a figure are too many
            yield from (*map(code, lines), "")
        case tree.Changed(parts):
            yield "".join(
                escaped(text) if clean is None or not text.strip() else f"**{escaped(text)}**"
                for text, clean in parts
            )
            yield ""
        case tree.Gates(gates):
            headings = ("gate", "measured", "interval", "verdict", "reason")
            rows = (
                [
                    *map(escaped, (gate.text, gate.measured, gate.interval)),
                    " ".join(VERDICTS[gate.verdict]),
                    escaped(gate.reason),
                ]
                for gate in gates
            )
            yield from markdown_table(headings, rows, {4})
        case tree.Doubts(raised):
            for doubt in raised:
                state = "open" if doubt.accepted is None else "accepted"
                way = doubt.advice if doubt.accepted is None else f"Accepted because: {doubt.accepted}"
                text = sentences(doubt.title, doubt.message, way)
                yield f"- ▲ **{escaped(doubt.name)}** ({state}): {escaped(text)}"
            if not raised:
                yield "No doubt is raised."
            yield ""
        case tree.Group():
            yield from _group(block)
        case tree.Gallery(entries):
            for entry in entries:
                yield from _group(entry)


def _group(group: tree.Group) -> Iterator[str]:
    inner = [*_blocks(group.blocks)]
    if not inner:
        return
    if group.folded:
        yield from (f"<details><summary>{escaped(group.title)}</summary>", "", *inner, "</details>", "")
    else:
        yield from (f"**{escaped(group.title)}**", "", *inner)


def escaped(text: str) -> str:
    """Return a text on one line, in which the special characters of Markdown are escaped."""
    return _SPECIAL.sub(r"\\\1", line(text))


def markdown_table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], texts: Iterable[int] = ()
) -> list[str]:
    """Return the lines of a Markdown table. The first column and those with `texts` are aligned left, and the others
    right.
    """
    left = {0, *texts}
    rule = ["---" if place in left else "---:" for place in range(len(headings))]
    return [*("| " + " | ".join(cells) + " |" for cells in (headings, rule, *rows)), ""]


def code(text: str) -> str:
    """Return a text as Markdown code, enclosed in enough backticks even if the text contains some."""
    shown_text = line(text)
    longest = max((len(run) for run in re.findall(r"`+", shown_text)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {shown_text} {fence}" if longest else f"{fence}{shown_text}{fence}"
