"""The annex of a report: the evidence for each requirement of a standard, and what is missing.

The identifiers of each standard and the kinds of evidence that concern them are data, in `standards.json`, with the
version that was read. An annex states evidence for requirements. It never states that a requirement is met.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any, Literal

from holdfast.core.errors import UsageError
from holdfast.reports.numbers import json_text
from holdfast.reports.words import amount

Json = dict[str, Any]
ANNEX_VERSION = 1
"""Version of the format. It is increased if a reader of the previous version would misinterpret the new one."""
Source = Literal["attacks", "certificates", "audits", "guard rules", "verbs", "recipes", "folders"]
"""where evidence comes from: an attack or a method of certification that was run, an audit, a rule of the guard of an
assessed model, the verb of a run, the recipe of a hardening, or a folder or a file of another kind"""
DISCLAIMER = (
    "The annex lists evidence for requirements, and what is missing. Whether a requirement is met is for a person to "
    "judge, who reads it in the version of the standard that applies."
)


@dataclass(frozen=True)
class FolderEvidence:
    """What a folder contains that may be evidence."""

    folder: str
    """path of the folder or file"""
    model: str
    """name of the model; for a pool or audit chains the name of the folder; empty for a file of API keys"""
    about: str
    """data, threat and date, in one line"""
    digest: str
    """digest of the model, or else of what the folder records; empty if there is none"""
    content: Mapping[Source, Sequence[str]]
    """names of what was run, by source"""
    statement: str
    """the result in one sentence"""
    titles: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """names in reports by the names in `content`, where they differ: a suite may run one attack under several names"""


@cache
def standards_data() -> Json:
    """Return the identifiers of all standards, and the kinds of evidence with the identifiers that they concern."""
    text = resources.files("holdfast.reports").joinpath("standards.json").read_text(encoding="utf-8")
    content: Json = json.loads(text)
    return content


def standard_names() -> tuple[str, ...]:
    """Return the names of the standards for which there are annexes."""
    return tuple(standards_data()["standards"])


def annex(findings: Sequence[FolderEvidence], standard: str) -> Json:
    """Return the content of the annex of a standard as strict JSON. Raises `UsageError` for an unknown standard."""
    data = standards_data()
    if standard not in data["standards"]:
        raise UsageError(f"annex is {standard!r}; the standards are {', '.join(data['standards'])}")
    about = data["standards"][standard]
    requirements = [
        _requirement(name, about["requirements"][name], standard, findings) for name in about["requirements"]
    ]
    models = {(finding.model, finding.digest) for finding in findings if finding.model}
    names = sorted({model for model, _ in models})
    n = sum(bool(requirement["evidence"]) for requirement in requirements)
    sources = f"{amount(len(findings), 'sources')} {'contains' if len(findings) == 1 else 'contain'}"
    return {
        "schema_version": ANNEX_VERSION,
        "standard": {key: value for key, value in about.items() if key != "requirements"}
        | {"name": standard},
        "headline": f"{sources} evidence for {n} of {len(requirements)} requirements of {about['title']} that are "
        "considered",
        "models": names,
        "caution": f"The evidence is of different models: {', '.join(names)}. Evidence of one is none of another."
        if len(models) > 1
        else "",
        "folders": [
            {key: getattr(finding, key) for key in ("folder", "model", "digest", "about", "statement")}
            for finding in findings
        ],
        "requirements": requirements,
        "disclaimer": DISCLAIMER,
    }


def _requirement(
    name: str, about: Mapping[str, Any], standard: str, findings: Sequence[FolderEvidence]
) -> Json:
    kinds = [kind for kind in standards_data()["evidence"].values() if name in kind[standard]]
    evidence, missing = [], []
    for kind in kinds:
        found = [item for finding in findings for item in _evidence(kind, finding)]
        evidence += found
        if not found:
            missing.append({"title": kind["title"], "how": kind["how"]})
    return {
        "id": name,
        "title": about["title"],
        "level": about.get("level"),
        "evidence": evidence,
        "missing": missing,
        "covered": bool(kinds),
    }


def _evidence(kind: Mapping[str, Any], finding: FolderEvidence) -> list[Json]:
    """The entry for a kind of evidence if a folder contains it."""
    named = [
        title
        for source, names in kind["of"].items()
        for name in names
        if name in finding.content.get(source, ())
        for title in finding.titles.get(name, (name,))
    ]
    if not named:
        return []
    entry = {"kind": kind["title"], "names": named, "folder": finding.folder, "model": finding.model}
    return [entry | {"statement": finding.statement}]


def annex_to_json(content: Mapping[str, Any]) -> str:
    """Return the annex as strict JSON, with a newline at the end."""
    return json_text(content)


def annex_page(content: Mapping[str, Any]) -> str:
    """Return the annex as a self-contained HTML page."""
    from holdfast.reports.html import render

    return render("annex.html.j2", s=content)


def annex_lines(content: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return the identifier and title, the evidence and what is missing of each requirement, as text."""
    rows = []
    for requirement in content["requirements"]:
        level = "" if requirement["level"] is None else f" (level {requirement['level']})"
        found = [f"{e['folder']} ({e['model']}): {', '.join(e['names'])}" for e in requirement["evidence"]]
        missing = [f"{each['title']} ({each['how']})" for each in requirement["missing"]]
        absent = "" if requirement["covered"] else "Holdfast has no evidence for this requirement"
        rows.append(
            (
                f"{requirement['id']}: {requirement['title']}{level}",
                "; ".join(found),
                absent or "; ".join(missing),
            )
        )
    return rows


def annex_markdown(content: Mapping[str, Any]) -> str:
    """Return the annex as a Markdown document."""
    from holdfast.reports.markdown import escaped, markdown_table

    standard = content["standard"]
    lines = [
        f"## Annex: {escaped(standard['title'])}, {escaped(standard['version'])}",
        "",
        *(
            escaped(text) + "\n"
            for text in (content["headline"], content["caution"], content["disclaimer"])
            if text
        ),
        escaped(f"Read on {standard['read']}: {standard['source']} ({standard['how']}). {standard['scope']}"),
        "",
        *markdown_table(
            ("folder", "model", "result"),
            [[escaped(each[key]) for key in ("folder", "model", "statement")] for each in content["folders"]],
        ),
        "",
        *markdown_table(
            ("requirement", "evidence", "missing"),
            [[escaped(cell) for cell in row] for row in annex_lines(content)],
        ),
    ]
    return "\n".join([*lines, ""])
