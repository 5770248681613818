"""Markdown for a pull request or a CI job summary: the verdict first, the tables after it."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from holdfast.reports.numbers import count, percent, seconds
from holdfast.reports.words import VERDICTS, interval, label, printable, shown

_SPECIAL = re.compile(r"([\\`*_\[\]<>|~$@&#])")


def document(summary: Mapping[str, Any]) -> str:
    """The summary as GitHub-flavoured Markdown; every string of a user is escaped."""
    sign, word = VERDICTS[summary["verdict"]]
    about = f"{summary['model'].get('name', 'model')} on {summary['data'].get('name', 'data')}"
    lines = [f"## {sign} {word}: {escaped(about)}", "", escaped(summary["headline"]), ""]
    if summary["accepted_doubts"]:
        lines += [
            f"- accepted doubt **{escaped(name)}**: {escaped(why)}"
            for name, why in summary["accepted_doubts"].items()
        ]
        lines.append("")
    if summary["gates"]:
        lines += table(("gate", "measured", "interval", "verdict"), map(_gate, summary["gates"]))
    if summary["attacks"]:
        lines += ["### Worst case, attack by attack", ""]
        lines += table(
            ("attack", "broke", "standing", "share", "queries", "time"), map(_attack, summary["attacks"])
        )
    lines += _doubts(summary)
    lines += ["<details><summary>All metrics</summary>", ""]
    lines += table(
        ("metric", "value", "interval", "n"), (_metric(*item) for item in summary["metrics"].items())
    )
    lines += ["</details>", "", _footing(summary), ""]
    return "\n".join(lines)


def escaped(text: str) -> str:
    """The text on one line, shown as it is."""
    return _SPECIAL.sub(r"\\\1", printable(text))


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table, the first column to the left and the others to the right."""
    rule = ["---", *["---:"] * (len(headings) - 1)]
    return [*("| " + " | ".join(cells) + " |" for cells in (headings, rule, *rows)), ""]


def _gate(gate: Mapping[str, Any]) -> list[str]:
    sign, word = VERDICTS[gate["verdict"]]
    metric, estimate = gate["metric"], gate["estimate"]
    return [
        f"{escaped(gate['claim'])}",
        shown(metric, estimate["value"]),
        interval(metric, estimate),
        f"{sign} {word}",
    ]


def _attack(attack: Mapping[str, Any]) -> list[str]:
    after = attack["robust_accuracy"]
    return [
        escaped(attack["name"]),
        count(attack["standing_before"] - attack["standing_after"]),
        count(attack["standing_after"]),
        percent(after["value"]) if after else "–",
        count(attack["queries"]),
        seconds(attack["seconds"]),
    ]


def _metric(name: str, estimate: Mapping[str, Any]) -> list[str]:
    return [
        escaped(label(name)),
        shown(name, estimate["value"]),
        interval(name, estimate),
        count(estimate["n"]),
    ]


def _doubts(summary: Mapping[str, Any]) -> list[str]:
    raised = [doubt for doubt in summary["doubts"] if doubt["state"] == "raised"]
    if not raised:
        return []
    lines = ["### Doubts", ""]
    for doubt in raised:
        state = "accepted" if doubt["name"] in summary["accepted_doubts"] else "open"
        says = " ".join(part for part in (doubt["says"], doubt["advice"]) if part)
        lines.append(
            f"- ▲ **{escaped(doubt['name'])}** ({state}): {escaped(doubt['title'])}. {escaped(says)}"
        )
    return [*lines, ""]


def _footing(summary: Mapping[str, Any]) -> str:
    command = f" Repeat it: {code(summary['reproduce'])}" if summary["reproduce"] else ""
    return (
        "Robust accuracy under a suite is an upper bound on the truth; the interval is sampling error only."
        f" Threat {code(summary['threat']['constraint'])}, seed {summary['seed']}.{command}"
    )


def code(text: str) -> str:
    """The text as code, fenced by more backticks than it holds in a row."""
    line = printable(text)
    longest = max((len(run) for run in re.findall(r"`+", line)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {line} {fence}" if longest else f"{fence}{line}{fence}"
