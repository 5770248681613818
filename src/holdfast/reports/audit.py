"""The report of an audit, made from its content."""

from collections.abc import Iterator, Mapping
from typing import Any

from holdfast.core.catalogue import AUDITS
from holdfast.core.names import line
from holdfast.reports import tree
from holdfast.reports.charts import LOOKS, rates
from holdfast.reports.numbers import value_text
from holdfast.reports.words import VERDICTS, capitalized

Json = Mapping[str, Any]

AUDIT_VERSION = 1
"""Version of the format. It is increased if a reader of the previous version would misinterpret the new one."""

NOT_COMPUTED_AGAIN = (
    "The pictures are stored with the audit. When it is opened, everything else in this report is computed again from "
    "the stored measurements; of the pictures only the digest is compared."
)
"""sentence of reports with pictures"""
_TONES: Mapping[str, tree.Tone] = {"flagged": "fail", "not flagged": "pass", "unclear": "unclear"}
"""tone of a report for each verdict"""


def headline(content: Json) -> str:
    """Return the result in one sentence, after the verdict."""
    return line(f"{capitalized(content['verdict'])}: {content['headline']}")


def failing_gate(content: Json) -> str:
    """Return the gate that would fail if it was set; empty if a gate was set, or if the audit is not flagged."""
    flagged_without_gate = content["verdict"] == "flagged" and not content["gates"]
    return AUDITS[content["kind"]].gate if flagged_without_gate else ""


def audit_report(content: Json) -> tree.Report:
    """Return the report of an audit with the given content."""
    tone = _TONES[content["verdict"]]
    model, data = content["model"], content["data"]
    return tree.Report(
        verb="audit",
        about=f"audit {content['kind']} of {model['name']} on {data['name']}",
        headline=headline(content),
        title=content["headline"],
        content=content,
        tone=tone,
        badge=(VERDICTS[tone][0], capitalized(content["verdict"])),
        lead=[*_lead(content)],
        sections=[*_sections(content)],
        case=("audit", content["kind"]),
        checks=[
            tree.Check("gates", gate["gate"], gate["verdict"], gate["because"]) for gate in content["gates"]
        ],
        properties={
            "verdict": content["verdict"],
            "seed": str(content["seed"]),
            "pictures": NOT_COMPUTED_AGAIN if content["pictures"] else "",
        },
        created=content["created"],
    )


def _lead(content: Json) -> Iterator[tree.Block]:
    """The reasons for the verdict, and the gates."""
    gates = [f"{VERDICTS[g['verdict']][0]} {g['gate']}: {g['because']}" for g in content["gates"]]
    for title, texts in (("Why", content["reasons"]), ("Gates", gates)):
        if texts:
            yield tree.Group(title, (tree.Items(texts),))


def _sections(content: Json) -> Iterator[tree.Section]:
    yield from (tree.Section(curve["title"], (_chart(curve),), depth="page") for curve in content["curves"])
    yield from (_pictures(picture) for picture in content["pictures"])
    for table in content["tables"]:
        rows = [[value_text(cell) for cell in row] for row in table["rows"]]
        texts = frozenset(range(1, len(table["headings"])) if table["texts"] else ())
        blocks: list[tree.Block] = [tree.Table(table["headings"], rows, texts=texts, depth="notebook")]
        blocks += [tree.Paragraph(table["note"])] if table["note"] else []
        yield tree.Section(table["title"], blocks, depth="notebook")
    for title, texts in (("What this does not show", content["limits"]), ("Notes", content["notes"])):
        if texts:
            yield tree.Section(title, (tree.Items(texts),))
    identity = {
        **{
            name: f"{content[name]['name']}, digest {content[name]['digest'][:16]}"
            for name in ("model", "data")
        },
        "seed": str(content["seed"]),
        "versions": ", ".join(f"{name} {version}" for name, version in content["versions"].items()),
    }
    yield tree.Section("Audited", (tree.Facts([*identity.items()]),), depth="page")


def _chart(curve: Json) -> tree.Chart:
    drawings = rates(curve["lines"], curve["least"])
    names = [path.title for path in drawings[0][1].paths]
    lines = ", ".join(f"{name} ({LOOKS[place % 3]} line)" for place, name in enumerate(names))
    alternative = f"{curve['upward']} by {curve['across']}, on logarithmic axes."
    return tree.Chart(drawings, curve["across"], alternative, f"{curve['upward']}: {lines}. {curve['note']}")


def _pictures(picture: Json) -> tree.Section:
    images = [tree.Picture(image["png"], image["caption"]) for image in picture["images"]]
    n = picture["together"]
    blocks = [tree.Pictures(images[start : start + n]) for start in range(0, len(images), n)]
    return tree.Section(picture["title"], blocks, depth="page")
