"""The report of a run as text for a terminal. The functions return strings and print nothing."""

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from holdfast.core.names import line
from holdfast.reports import certification, rotation
from holdfast.reports.attacks import (
    SMALLEST,
    STANDING,
    by_distance,
    fits_text,
    passes_line,
    risks,
    row,
    title,
)
from holdfast.reports.numbers import count_text, percent
from holdfast.reports.summary import measured_tables
from holdfast.reports.words import (
    VERDICTS,
    TextTable,
    condition_text,
    interval,
    label,
    only_trained,
    query_budget,
    sentences,
    shown,
    shown_metrics,
    shown_of_gate,
    verdict_of,
)

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

_STYLES = {"pass": "bold green", "fail": "bold red", "unclear": "bold yellow", "no gate": "bold"}
_FULL_WIDTH = 78
"""Width that the full table of attacks needs, in characters."""
FIRST = frozenset(
    (
        "clean_accuracy",
        "rejection_rate",
        "detection_auroc",
        "detection_rate_at_5_percent",
        "oblivious_detection_rate_at_5_percent",
        "robust_accuracy",
        "certified_accuracy",
        "suite_robust_accuracy",
        "robustness_score",
        "worst_class",
        "worst_group",
        "attack_success_rate",
        "targeted_success_rate",
        "trigger_success_rate",
        "transfer_success",
        "robust_margin",
        "adversarial_radius",
        "corruption_error_rate",
        "worst_corruption",
        "mce",
        "regression",
        "clean_accuracy_drop",
    )
)
"""Names of the metrics that a terminal shows by default."""
STATE_SIGNS = {"raised": "▲", "clear": "✓", "answered": "◆", "not measured": "○", "not applicable": "–"}
"""Sign for each state of a doubt."""


def verdict(summary: Mapping[str, Any], *, colour: bool) -> str:
    """Return the verdict of a run with its reason, a line for each gate, and the raised doubts, as text
    for a terminal.
    """
    from rich.text import Text

    lines = Text()
    sign, verdict_text = verdict_of(summary)
    # the headline of a training without a gate starts with its verdict
    shown_verdict, space = (sign, " ") if only_trained(summary) else (f"{sign} {verdict_text}", "  ")
    lines.append(shown_verdict, style=_STYLES[summary["verdict"]])
    lines.append(f"{space}{line(summary['headline'])}\n")
    for gate in summary["gates"]:
        lines.append(f"  {VERDICTS[gate['verdict']][0]} ", style=_STYLES[gate["verdict"]])
        value = shown_of_gate(gate)
        lines.append(
            f"{gate['verdict']}: requires {line(condition_text(gate))}, measured {value}; {line(gate['message'])}\n"
        )
    for doubt in summary["doubts"]:
        if doubt["state"] == "raised":
            reason = summary["accepted_doubts"].get(doubt["name"])
            lines.append("  ▲ ", style="yellow")
            text = line(sentences(doubt["message"] or doubt["title"]))
            lines.append(f"doubt {line(doubt['name'])} {'accepted' if reason else 'open'}: {text}")
            lines.append(f" Accepted because: {line(reason)}\n" if reason else "\n")
    return as_string(lines, colour=colour, width=None)


def tables(summary: Mapping[str, Any], *, colour: bool, width: int | None = None, brief: bool = False) -> str:
    """Return the tables of attacks, metrics and doubts of a run as text for a terminal. If `width` is None, lines are
    not wrapped.

    With `brief`, less important metrics are omitted; the other reports contain all metrics.
    """
    parts = [
        attack_table(summary, narrow=width is not None and width < _FULL_WIDTH),
        metric_table(summary, brief=brief),
        *matrices(summary),
    ]
    texts = [as_string(part, colour=colour, width=width) for part in parts if part.row_count]
    budget = query_budget(summary["threat"])
    allowed = f"the threat model allows {budget}" if budget else ""
    # these lines are about the table of attacks, which is the first one
    for line_text in (allowed, risks(summary), fits_text(summary), passes_line(summary, brief=True)):
        if line_text:
            texts[0] = f"{texts[0].rstrip()}\n\n{as_string(cell(line_text), colour=colour, width=width)}\n\n"
    return _certified(summary, colour=colour, width=width) + "\n".join(texts) + _doubts(summary["doubts"])


def _certified(summary: Mapping[str, Any], *, colour: bool, width: int | None) -> str:
    """The table of a certification with the sentences about it; empty without one."""
    proof = certification.certification_table(summary)
    if proof is None:
        return ""
    lines = [cell(text) for text in certification.certification_lines(summary)]
    return "".join(
        f"{as_string(part, colour=colour, width=width).rstrip()}\n\n" for part in (filled(proof), *lines)
    )


def _doubts(doubts: Sequence[Mapping[str, Any]]) -> str:
    """The names of the doubts, each with the sign of its state, and a legend."""
    if not doubts:
        return ""
    names = "  ".join(f"{STATE_SIGNS[doubt['state']]} {line(doubt['name'])}" for doubt in doubts)
    states = {doubt["state"] for doubt in doubts}
    legend = ", ".join(f"{sign} {state}" for state, sign in STATE_SIGNS.items() if state in states)
    return f"\ndoubts ({legend})  {names}\n"


def attack_table(summary: Mapping[str, Any], *, narrow: bool = False) -> "Table":
    """Return the terminal table of attacks, with the examples that survive each attack, or with the sizes of the
    changes that it found.

    With `narrow`, intervals and queries are omitted.
    """
    distance = by_distance(summary)
    headings = (SMALLEST if distance else STANDING)[: 5 if narrow else 7]
    table = grid(title(summary), headings)
    clean = summary["metrics"].get("clean_accuracy")
    if clean and summary["threat"]["goal"] is None and not distance:
        surviving = round(clean["value"] * clean["n"])
        sure = interval("clean_accuracy", clean)
        cells = ["no attack", "", count_text(surviving), percent(clean["value"]), "", sure, ""]
        table.add_row(*cells[: len(headings)])
    for attack in summary["attacks"]:
        row_cells = row(attack, distance=distance)
        table.add_row(*(cell(row_cells[heading]) for heading in headings))
    return table


def metric_table(summary: Mapping[str, Any], *, brief: bool = False) -> "Table":
    """Return the terminal table of the metrics of a run with their confidence intervals. With `brief`, only the most
    important ones are included.
    """
    table = grid(
        f"metrics, {100 * summary['confidence']:.0f} % intervals", ("metric", "value", "interval", "n")
    )
    for name, estimate in shown_metrics(summary).items():
        if brief and name not in FIRST:
            continue
        table.add_row(
            cell(label(name)),
            shown(name, estimate["value"]),
            interval(name, estimate),
            count_text(estimate["n"]),
        )
    return table


def matrices(summary: Mapping[str, Any]) -> "list[Table]":
    """Return the terminal tables of the transfer between models, of the transfer across data sets, of a detector, of
    black-box attacks on a guard, and of attackers of a rotation, if these were measured.
    """
    return [*map(filled, measured_tables(summary)), *attackers(summary)]


def attackers(summary: Mapping[str, Any]) -> "list[Table]":
    """Return the terminal tables of attackers of a rotation and of alternatives to it, or an empty list if there is no
    rotation.
    """
    results, noun = summary.get("rotation"), summary["noun"]
    if results is None:
        return []
    attacker_table = filled(rotation.attacker_table(results, noun))
    alternative_table = filled(rotation.alternative_table(results, noun))
    for table in (attacker_table, alternative_table):
        table.columns[-1].justify, table.columns[-1].no_wrap = "left", False
    attacker_table.columns[-2].justify = "left"
    return [attacker_table, alternative_table]


def grid(title: str, headings: Sequence[str]) -> "Table":
    """Return an empty terminal table with headings. The first column is aligned left, and the others are
    aligned right.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        title=cell(title), title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False
    )
    for place, heading in enumerate(headings):
        table.add_column(cell(heading), justify="right" if place else "left", no_wrap=place > 0)
    return table


def filled(table: TextTable) -> "Table":
    """Return a table of a report as a terminal table."""
    filled_grid = grid(table.title, table.headings)
    for texts in table.rows:
        filled_grid.add_row(*map(cell, texts))
    return filled_grid


def shown_or_dash(metric: str, estimate: Mapping[str, Any] | None) -> str:
    """Return the value of a metric as text for a table, or a dash if the metric was not measured."""
    return shown(metric, estimate["value"]) if estimate else "–"


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
