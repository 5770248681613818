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
from holdfast.reports.tree import Cell, Facts, Paragraph, Report, Section, Table
from holdfast.reports.words import amount, capitalized

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


def annex_report(content: Mapping[str, Any]) -> Report:
    """Return the report of an annex with the given content."""
    standard = content["standard"]
    folders = Table(
        ("folder", "model", "result"),
        [
            (
                Cell(each["folder"], (each["about"],)),
                Cell(each["model"], (each["digest"][:16],)),
                each["statement"],
            )
            for each in content["folders"]
        ],
        texts=_WORDS,
    )
    requirements = Table(
        ("requirement", "evidence", "missing"), [_row(each) for each in content["requirements"]], texts=_WORDS
    )
    facts = Facts(
        [(name, standard[key]) for name, key in (*_KEYS, ("how it was read", "how"), ("scope", "scope"))]
    )
    return Report(
        verb="annex",
        about=f"annex: {standard['title']}, version {standard['version']}",
        headline=content["headline"],
        content=content,
        caution=content["caution"],
        lead=(Paragraph(content["disclaimer"]),),
        sections=(
            Section("Evidence", (folders,)),
            Section("Requirements", (requirements,), standard["scope"]),
            Section("Standard", (facts,), depth="page"),
        ),
        footer="Generated by Holdfast from the evidence in the folders.",
    )


_WORDS = frozenset({1, 2})
_KEYS = (("title", "title"), ("version", "version"), ("read on", "read"), ("source", "source"))


def _row(requirement: Mapping[str, Any]) -> tuple[str | Cell, ...]:
    """The identifier and title, the evidence and what is missing of a requirement."""
    level = "" if requirement["level"] is None else f" (level {requirement['level']})"
    evidence = tuple(
        f"{capitalized(e['kind'])}: {', '.join(e['names'])}; {e['folder']} ({e['model']})"
        for e in requirement["evidence"]
    )
    missing = tuple(f"{each['title']} ({each['how']})" for each in requirement["missing"])
    absent = "–" if requirement["covered"] else "Holdfast has no evidence for this requirement"
    return (
        f"{requirement['id']}: {requirement['title']}{level}",
        Cell("", evidence) if evidence else "none",
        Cell("", missing) if missing else absent,
    )
