"""The report of a run in Markdown, for a pull request or the summary of a CI job: the verdict, followed by tables."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from holdfast.core.names import line
from holdfast.reports import certification, rotation
from holdfast.reports.attacks import SMALLEST, STANDING, by_distance, fits_text, passes_line, risks, row
from holdfast.reports.numbers import count_text, percent
from holdfast.reports.summary import measured_tables
from holdfast.reports.words import (
    VERDICTS,
    TextTable,
    capitalized,
    interval,
    interval_of_gate,
    label,
    query_budget,
    sentences,
    shown,
    shown_metrics,
    shown_of_gate,
    verdict_of,
)

# `@` and `#` are included, because they would mention users and issues on GitHub
_SPECIAL = re.compile(r"([\\`*_\[\]<>|~$@&#])")


def markdown_document(summary: Mapping[str, Any]) -> str:
    """Return the report of a run as GitHub-flavoured Markdown, in which text from users is escaped."""
    sign, verdict = verdict_of(summary)
    about = f"{summary['model'].get('name', 'model')} on {summary['data'].get('name', 'data')}"
    lines = [f"## {sign} {verdict}: {escaped(about)}", "", escaped(summary["headline"]), ""]
    if summary["accepted_doubts"]:
        lines += [
            f"- accepted doubt **{escaped(name)}**: {escaped(why)}"
            for name, why in summary["accepted_doubts"].items()
        ]
        lines.append("")
    if summary["gates"]:
        lines += markdown_table(("gate", "measured", "interval", "verdict"), map(_gate, summary["gates"]))
    lines += _certification(summary)
    if summary["attacks"]:
        lines += _attacks(summary)
    lines += _matrices(summary)
    lines += _attackers(summary)
    lines += _texts(summary)
    lines += _doubts(summary)
    if summary["per_class"]:
        lines += ["<details><summary>Classes</summary>", ""]
        lines += markdown_table(
            ("class", escaped(summary["noun"]), "clean", "robust", "interval"),
            map(_class, summary["per_class"]),
        )
        lines += ["</details>", ""]
    lines += ["<details><summary>Metrics</summary>", ""]
    lines += markdown_table(
        ("metric", "value", "interval", "n"), (_metric(*item) for item in shown_metrics(summary).items())
    )
    lines += ["</details>", ""]
    lines += [f"- {escaped(capitalized(message))}." for message in summary["served"].get("messages", ())]
    lines += ["", _footing(summary), ""] if summary["served"] else [_footing(summary), ""]
    return "\n".join(lines)


def escaped(text: str) -> str:
    """Return a text on one line, in which the special characters of Markdown are escaped."""
    return _SPECIAL.sub(r"\\\1", line(text))


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table. The first column is aligned left, and the others are aligned right."""
    rule = ["---", *["---:"] * (len(headings) - 1)]
    return [*("| " + " | ".join(cells) + " |" for cells in (headings, rule, *rows)), ""]


def _class(row: Mapping[str, Any]) -> list[str]:
    clean, robust = row["clean_accuracy"], row["robust_accuracy"]
    return [
        escaped(row["name"]),
        count_text(row["n"]),
        percent(clean["value"]),
        percent(robust["value"]),
        interval("robust_accuracy", robust),
    ]


def _gate(gate: Mapping[str, Any]) -> list[str]:
    sign, verdict = VERDICTS[gate["verdict"]]
    return [
        f"{escaped(gate['condition'])}",
        shown_of_gate(gate),
        interval_of_gate(gate),
        f"{sign} {verdict}",
    ]


def _attacks(summary: Mapping[str, Any]) -> list[str]:
    distance = by_distance(summary)
    headings = SMALLEST if distance else STANDING
    rows = [row(attack, distance=distance) for attack in summary["attacks"]]
    title = f"### {'Smallest change of each attack' if distance else 'Attacks'}"
    return [
        title,
        "",
        *markdown_table(headings, [[escaped(cells[heading]) for heading in headings] for cells in rows]),
        *(
            part
            for text in (risks(summary), fits_text(summary), passes_line(summary))
            if text
            for part in (f"{escaped(capitalized(text))}.", "")
        ),
    ]


def escaped_table(table: TextTable) -> list[str]:
    """Return the lines of a Markdown table, in which text from users is escaped."""
    return markdown_table([*map(escaped, table.headings)], ([*map(escaped, row)] for row in table.rows))


def _certification(summary: Mapping[str, Any]) -> list[str]:
    """The table of a certification with the sentences about it."""
    table = certification.certification_table(summary)
    if table is None:
        return []
    sentences_of = certification.certification_lines(summary)
    return [
        "### Certification",
        "",
        *escaped_table(table),
        *(part for text in sentences_of for part in (f"{escaped(capitalized(text))}.", "")),
    ]


def _matrices(summary: Mapping[str, Any]) -> list[str]:
    """The transfer matrix, the transfer across data sets, a detector, and black-box attacks on a guard."""
    lines = []
    for table in measured_tables(summary):
        description = f"{escaped(capitalized(table.description))}."
        lines += [f"### {table.name.capitalize()}", "", description, "", *escaped_table(table)]
    return lines


def _attackers(summary: Mapping[str, Any]) -> list[str]:
    """The attackers that a rotation stops, and the alternatives."""
    attackers = summary.get("rotation")
    if attackers is None:
        return []
    lines = ["### Attackers of the rotation", "", f"{escaped(capitalized(attackers['conclusion']))}.", ""]
    for table in (rotation.attacker_table, rotation.alternative_table):
        shown_table = table(attackers, summary["noun"])
        lines += [f"{escaped(capitalized(shown_table.description))}:", "", *escaped_table(shown_table)]
    return lines


def _texts(summary: Mapping[str, Any]) -> list[str]:
    """The broken examples of a model of texts, with the changed words in bold."""
    texts = [example for example in summary["examples"] if example["kind"] == "text"]
    if not texts:
        return []
    rows = [
        (
            escaped(f"#{text['id']}, {text['label']}"),
            escaped(text["clean"]),
            "".join(
                f"**{escaped(part['text'])}**"
                if part["clean"] is not None and part["text"].strip()
                else escaped(part["text"])
                for part in text["parts"]
            ),
        )
        for text in texts
    ]
    table = markdown_table(("text", "clean", "changed"), rows)
    return ["<details><summary>Adversarial examples</summary>", "", *table, "</details>", ""]


def _metric(name: str, estimate: Mapping[str, Any]) -> list[str]:
    return [
        escaped(label(name)),
        shown(name, estimate["value"]),
        interval(name, estimate),
        count_text(estimate["n"]),
    ]


def _doubts(summary: Mapping[str, Any]) -> list[str]:
    raised = [doubt for doubt in summary["doubts"] if doubt["state"] == "raised"]
    if not raised:
        return []
    lines = ["### Doubts", ""]
    for doubt in raised:
        state = "accepted" if doubt["name"] in summary["accepted_doubts"] else "open"
        text = sentences(doubt["title"], doubt["message"], doubt["advice"])
        lines.append(f"- ▲ **{escaped(doubt['name'])}** ({state}): {escaped(text)}")
    return [*lines, ""]


def _footing(summary: Mapping[str, Any]) -> str:
    command = f" Reproduce: {code(summary['reproduce'])}" if summary["reproduce"] else ""
    unit = f" (eps in {escaped(summary['threat']['unit'])})" if summary["threat"].get("unit") else ""
    budget = query_budget(summary["threat"])
    allowed = f", {budget}" if budget else ""
    return (
        "Robust accuracy under a suite is an upper bound of the true value; the interval contains "
        "the sampling error only."
        f" Threat {code(summary['threat']['constraint'])}{unit}{allowed}, seed {summary['seed']}.{command}"
    )


def code(text: str) -> str:
    """Return a text as Markdown code, enclosed in enough backticks even if the text contains some."""
    shown_text = line(text)
    longest = max((len(run) for run in re.findall(r"`+", shown_text)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {shown_text} {fence}" if longest else f"{fence}{shown_text}{fence}"
