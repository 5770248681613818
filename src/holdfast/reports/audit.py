"""The report of an audit as text, Markdown, HTML, JUnit XML and JSON, written from its content."""

from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree as ET

from holdfast.core.catalogue import AUDITS
from holdfast.core.names import line
from holdfast.reports.numbers import json_text, plain
from holdfast.reports.words import VERDICTS, TextTable, capitalized

AUDIT_VERSION = 1
"""Version of the format. It is increased if a reader of the previous version would misinterpret the new one."""

NOT_COMPUTED_AGAIN = (
    "The pictures are stored with the audit. When it is opened, everything else in this report is computed again from "
    "the stored measurements; of the pictures only the digest is compared."
)
"""sentence of reports with pictures"""
_TONES = {"flagged": "fail", "not flagged": "pass", "unclear": "unclear"}
"""Tone of the page for each verdict."""


def headline(content: Mapping[str, Any]) -> str:
    """Return the result in one sentence, after the verdict."""
    return line(f"{capitalized(content['verdict'])}: {content['headline']}")


def report_tables(content: Mapping[str, Any]) -> list[TextTable]:
    """Return the tables of a report as text."""
    return [
        TextTable(
            table["title"],
            table["headings"],
            [[_cell(cell) for cell in row] for row in table["rows"]],
            table["texts"],
        )
        for table in content["tables"]
    ]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return plain(value) if isinstance(value, float) else str(value)


def gate_lines(content: Mapping[str, Any]) -> list[str]:
    """Return one line for each gate: its sign, its text and the reason for its verdict."""
    return [f"{VERDICTS[g['verdict']][0]} {g['gate']}: {g['because']}" for g in content["gates"]]


def failing_gate(content: Mapping[str, Any]) -> str:
    """Return the gate that would fail if it was set; empty if a gate was set, or if the audit is not flagged."""
    flagged_without_gate = content["verdict"] == "flagged" and not content["gates"]
    return AUDITS[content["kind"]].gate if flagged_without_gate else ""


def tables(content: Mapping[str, Any], *, colour: bool, width: int | None = None) -> str:
    """Return the report as text for a terminal."""
    from holdfast.reports.terminal import as_lines, as_string, filled

    blocks = []
    for table, stored in zip(report_tables(content), content["tables"], strict=True):
        blocks.append(as_string(filled(table), colour=colour, width=width).rstrip("\n"))
        blocks += [line(stored["note"])] if stored["note"] else []
    for heading, key in (("Why:", "reasons"), ("What this does not show:", "limits"), ("Notes:", "notes")):
        if content[key]:
            blocks.append(as_lines([heading, *(f"- {text}" for text in content[key])]))
    blocks += [as_lines(gate_lines(content))] if content["gates"] else []
    return "\n\n".join(blocks)


def audit_to_json(content: Mapping[str, Any]) -> str:
    """Return the report as strict JSON, with a newline at the end."""
    return json_text(content)


def audit_markdown(content: Mapping[str, Any]) -> str:
    """Return the report as a Markdown document, without the pictures."""
    from holdfast.reports.markdown import escaped, escaped_table

    lines = [f"## Audit: {content['kind']}", "", escaped(headline(content)), ""]
    lines += [f"- {escaped(gate)}" for gate in gate_lines(content)]
    for title, key in (("Why", "reasons"), ("What this does not show", "limits"), ("Notes", "notes")):
        if content[key]:
            lines += ["", f"### {title}", "", *(f"- {escaped(text)}" for text in content[key])]
    for table, stored in zip(report_tables(content), content["tables"], strict=True):
        lines += ["", f"### {escaped(table.title)}", ""]
        lines += escaped_table(table)
        lines += [escaped(stored["note"])] if stored["note"] else []
    return "\n".join([*lines, ""])


def audit_view(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of the template `audit-fragment.html.j2`."""
    from holdfast.reports.charts import rates
    from holdfast.reports.html import SIZES

    return {
        "s": content,
        "tone": _TONES[content["verdict"]],
        "gates": [
            (gate["verdict"], text) for gate, text in zip(content["gates"], gate_lines(content), strict=True)
        ],
        "curves": [
            (
                curve,
                [
                    (name, rates(curve["lines"], curve["least"], width=width, height=height))
                    for name, width, height in SIZES
                ],
            )
            for curve in content["curves"]
        ],
        "tables": [
            (table, stored["note"])
            for table, stored in zip(report_tables(content), content["tables"], strict=True)
        ],
    }


def audit_page(content: Mapping[str, Any]) -> str:
    """Return the report as a self-contained HTML page."""
    from holdfast.reports.html import render

    return render("audit.html.j2", **audit_view(content))


def audit_junit(content: Mapping[str, Any]) -> str:
    """Return the gates of the audit as JUnit XML, in which a gate that fails or is unclear is a failure."""
    from holdfast.reports.junit import xml_text

    failures = sum(gate["verdict"] != "pass" for gate in content["gates"])
    counted = {"tests": str(len(content["gates"]) + 1), "failures": str(failures), "errors": "0"}
    root = ET.Element("testsuites", {"name": "holdfast"} | counted)
    suite = ET.SubElement(root, "testsuite", {"name": f"holdfast audit {content['kind']}"} | counted)
    result = ET.SubElement(suite, "testcase", {"classname": "audit", "name": content["kind"]})
    texts = [headline(content), *([NOT_COMPUTED_AGAIN] if content["pictures"] else [])]
    ET.SubElement(result, "system-out").text = " ".join(texts)
    for gate in content["gates"]:
        case = ET.SubElement(suite, "testcase", {"classname": "gate", "name": gate["gate"]})
        if gate["verdict"] != "pass":
            ET.SubElement(case, "failure", {"type": gate["verdict"], "message": gate["because"]})
    return xml_text(root)
