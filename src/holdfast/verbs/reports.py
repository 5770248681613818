"""The functions `compare`, `report` and `verify` for stored runs, the list of runs, and the annex of a report: the
evidence for each requirement of a standard, read from folders of runs, audits, pools, audit chains and adaptations.
"""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from typing_extensions import TypedDict

from holdfast.adaptation.journal import (
    adaptation_entry,
    difference,
    is_adaptation,
    open_adaptation,
    open_finished,
)
from holdfast.attacks.suites import VARIANTS
from holdfast.audits.audit import AuditResult, is_audit, open_audit
from holdfast.audits.compared_policies import PolicyComparison, compared_policies
from holdfast.core.errors import HoldfastError, TargetError, UsageError
from holdfast.monitoring.watching import Alarm
from holdfast.monitoring.watching import Source as MonitoredSource
from holdfast.reports import audit
from holdfast.reports.audit import headline
from holdfast.reports.print_sheet import PrintedPatch, write_sheet
from holdfast.reports.terminal import as_lines, body
from holdfast.reports.tree import Cell, Facts, Paragraph, Report, Section, Table
from holdfast.reports.words import amount, capitalized, open_doubts, threat_syntax
from holdfast.reports.write import rendered, write
from holdfast.rotation.ledger import verify_pool
from holdfast.runs.assess.result import Result
from holdfast.runs.documents.record import consistent
from holdfast.runs.documents.stored_runs import (
    Comparison,
    RunEntry,
    learned_values,
    open_run,
    refuse_false,
    runs_in,
)
from holdfast.runs.store.columns import refuse_form
from holdfast.runs.store.files import AUDIT_MARK, MANIFEST, POOL_MANIFEST, content_of
from holdfast.runs.store.folder import parsed, read_manifest
from holdfast.runs.store.verify import Verified
from holdfast.runs.store.verify import verify as verify_folder
from holdfast.server.audit_folder import server_records, verify_audit
from holdfast.server.keys import read_keys
from holdfast.threats.transformations import Patch

if TYPE_CHECKING:
    from holdfast.explanation.case import Explained

__all__ = ["compare", "report", "verify"]


def compare(
    first: Result | AuditResult | str | Path, second: Result | AuditResult | str | Path
) -> Comparison | PolicyComparison:
    """Compare two runs on the examples that both contain, or on the episodes of both if they are assessments of
    policies, and return the differences between them.
    """
    before, after = _audit_folder(first), _audit_folder(second)
    if before is not None and after is not None:
        return compared_policies(before, after)
    return Comparison(_result(first), _result(second))


def report(run: str | Path) -> Result | AuditResult:
    """Read the folder of a finished run or audit and return its result."""
    if is_audit(Path(run)):
        return open_audit(Path(run))
    return replace(open_run(Path(run)), explaining=_explained)


def print_sheet(run: str | Path, path: str | Path, size: str) -> Path:
    """Write a sheet with the learned patch of a finished run in its true size, and return its path.

    `path` is the path of a PDF, and `size` the width of what the images show, such as `60cm`. Raises `UsageError` for
    another size, and for a run without a learned patch in printable colours or with several.
    """
    matched = re.fullmatch(r"(\d+(?:\.\d+)?) ?(mm|cm|m|in)", size)
    if matched is None or float(matched[1]) <= 0:
        raise UsageError(
            f"the print size is {size!r}; expected the width of what an image shows, as in --print-size 60cm (mm, cm, "
            "m, in)"
        )
    opened = open_run(Path(run))
    patch = opened.evidence.threat.constraint
    learned = {} if opened.training is not None else learned_values(Path(run))
    patches = {
        name: x
        for name, x in learned.items()
        if isinstance(patch, Patch) and x.shape[2:] == patch.pixels.shape
    }
    if not isinstance(patch, Patch) or patch.colours is None or not patches:
        raise UsageError(
            f"the run {str(run)!r} has no learned patch in printable colours, and its threat is {patch}; a sheet needs "
            'a run such as assess MODEL DATA --threat patch:8x8,at=centre,printable=default --set "attacks=[{use: '
            'AdversarialPatch}]"'
        )
    if len(patches) > 1:
        raise UsageError(
            f"the run {str(run)!r} has {len(patches)} learned patches, {' and '.join(patches)}, and a sheet shows one; "
            "assess with one of these attacks"
        )
    (values,) = patches.values()
    height, width = read_manifest(Path(run))["data"]["shape"][1:]
    return write_sheet(
        PrintedPatch(patch, values, (height, width)), Path(path), float(matched[1]) * _CM[matched[2]]
    )


_CM = {"mm": 0.1, "cm": 1.0, "m": 100.0, "in": 2.54}
"""centimetres of each unit of a print size"""


def _explained(result: Result, index: int | None) -> "Explained":
    """Explain an example of a stored run, or its model, which is opened by its address."""
    from holdfast.verbs.settings import Explain  # late, as few runs are explained

    return Explain(model=str(result.run_folder), index=index).run()


def verify(run: str | Path, *, expect_head: str = "") -> Verified:
    """Check that the files in the folder of a run or audit match its hash chain, and that its results follow from its
    columns. Return the number of files and the state of the run.

    Raises `TargetError` for the first difference, and if the chain does not contain `expect_head`, an earlier head.
    """
    verified = verify_folder(Path(run), expect_head=expect_head)
    if is_adaptation(Path(run)):
        open_adaptation(Path(run))
    elif not is_audit(Path(run)):
        refuse_false(Path(run))
    elif verified.complete:
        open_audit(Path(run))
    return verified


def stored_runs(parent: Path) -> list[RunEntry]:
    """Return the runs, audits and adaptations in a folder, oldest first. Subfolders without a readable one are
    skipped.
    """
    entries = runs_in(parent)
    for folder in parent.iterdir() if parent.is_dir() else ():
        with suppress(HoldfastError, OSError):
            if (folder / MANIFEST).is_file() and is_adaptation(folder):
                entries.append(adaptation_entry(folder))
    return sorted(entries, key=lambda entry: (entry.created, entry.path.name))


def _audit_folder(run: Result | AuditResult | str | Path) -> Path | None:
    if isinstance(run, AuditResult):
        if run.folder is None:
            raise UsageError(
                "an assessment of a policy is compared from its folder; give run to both assessments"
            )
        return run.folder
    return Path(run) if isinstance(run, str | Path) and is_audit(Path(run)) else None


def _result(run: Result | AuditResult | str | Path) -> Result:
    if isinstance(run, Result):
        return run
    path = _audit_folder(run) or Path(str(run))
    with consistent(path):
        result = open_run(path)
        result.summary()
    return result


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


_OF_ADAPT = ("adapt", "approval")
"""kinds of records of a server about adaptations"""
_ALONE = "The journal alone proves nothing, because whoever writes a folder can choose its steps."


@dataclass(frozen=True)
class Annex:
    """The evidence in some folders for each requirement of a standard."""

    content: dict[str, Any]
    """content of all formats, as strict JSON"""

    @property
    def report(self) -> Report:
        """The report of the annex."""
        return annex_report(self.content)

    def to_json(self) -> str:
        """Return the annex as JSON text."""
        return rendered(self.report, ".json")

    def write(self, path: str | Path) -> Path:
        """Write the annex in the format of the file suffix, such as `.html`. Return the path."""
        return write(self.report, Path(path))

    def __str__(self) -> str:
        headline = as_lines([self.content["headline"]])
        return f"{body(self.report, colour=False)}\n\n{headline}"


def annex_of(folders: Sequence[str | Path], standard: str) -> Annex:
    """Return the annex of a standard, such as `aisvs`, over the evidence in folders of runs, audits, pools, audit
    chains and adaptations, in reports of `holdfast monitor` as JSON, and in files of API keys.

    Raises `UsageError` without a folder or for an unknown standard, and `TargetError` for a folder or file that is none
    of these, or one that is unfinished or was altered.
    """
    if not folders:
        raise UsageError("no folder was given; an annex needs the folders that contain the evidence")
    paths = [Path(folder) for folder in folders]
    chains = [path for path in paths if (path / AUDIT_MARK).is_file()]
    return Annex(annex([_finding(path, chains) for path in paths], standard))


def _finding(folder: Path, chains: Sequence[Path]) -> FolderEvidence:
    if (folder / POOL_MANIFEST).is_file():
        return _pool(folder)
    if (folder / AUDIT_MARK).is_file():
        return _chains(folder)
    if folder.is_file():
        return _file(folder)
    if not (folder / MANIFEST).is_file():
        raise TargetError(
            f"{str(folder)!r} contains no run, audit, pool, audit chain or adaptation; give a folder that does, a "
            "report of holdfast monitor as JSON, or a file of API keys"
        )
    if is_adaptation(folder):
        return _adaptation(folder, chains)
    with consistent(folder):
        return _audit(folder) if is_audit(folder) else _run(folder)


def _run(folder: Path) -> FolderEvidence:
    result, manifest = open_run(folder), read_manifest(folder)
    inner = read_manifest(folder / "after") if manifest["verb"] == "harden" else manifest
    summary, evidence = result.summary(), result.evidence
    doubts = open_doubts(summary)
    statement = summary["headline"] + (f" Open doubts: {', '.join(doubts)}." if doubts else "")
    training = summary["training"]
    attacks: dict[str, dict[str, None]] = {}  # names in reports by the names of the algorithms
    for step in inner["config"]["stages"]:
        attacks.setdefault(VARIANTS.get(step["attack"], step["attack"]), {})[step["attack"]] = None
    return FolderEvidence(
        str(folder),
        str(summary["model"].get("name", "")),
        f"{summary['verb']}, {summary['data'].get('name', '')}, {threat_syntax(summary['threat'])}, "
        f"{summary['run'].get('created', '')}",
        str(summary["hashes"].get("model", "")),
        {
            "attacks": list(attacks),
            "certificates": [record.name for record in evidence.proofs],
            "guard rules": [str(rule) for rule in evidence.model.get("guard", {}).get("rules", ())],
            "verbs": [summary["verb"], manifest["verb"]],
            "recipes": [] if training is None else [training["recipe"]],
        },
        statement if training is None else f"{training['message']} {statement}",
        {algorithm: list(names) for algorithm, names in attacks.items()},
    )


def _audit(folder: Path) -> FolderEvidence:
    content, manifest = open_audit(folder).summary(), read_manifest(folder)
    return FolderEvidence(
        str(folder),
        str(manifest["model"]["name"]),
        f"audit, {manifest['data']['name']}",
        str(manifest["model"].get("digest", "")),
        {"audits": [content["kind"]]},
        headline(content),
    )


def _pool(folder: Path) -> FolderEvidence:
    verified = verify_pool(folder)
    authentic = "authenticated" if verified.authenticated else "not authenticated, without the key"
    statement = (
        f"The ledger has {verified.entries} entries and {len(verified.members)} sets; its chain is consistent and "
        f"{authentic}."
    )
    return FolderEvidence(str(folder), folder.name, "pool", verified.head, {"folders": ["pool"]}, statement)


def _chains(folder: Path) -> FolderEvidence:
    verified = verify_audit(folder)
    statement = (
        f"{verified.chains} chains with {verified.records} records are unchanged: {verified.answered} requests "
        f"answered, {verified.failed} failed, {verified.interrupted} interrupted, {verified.lost} records lost."
    )
    return FolderEvidence(
        str(folder), folder.name, "audit chains", verified.head, {"folders": ["chains"]}, statement
    )


def _adaptation(folder: Path, chains: Sequence[Path]) -> FolderEvidence:
    """The evidence of an adaptation; none if the audit chains of the server are given and have other steps."""
    stored = open_finished(folder)
    reason = f": {stored.reason}" if stored.reason else ""
    statement = f"Outcome: {stored.outcome}{reason}. {_ALONE}"
    names = ["adaptation"]
    if not chains:
        statement += " No audit chain of the server was given to compare it with."
    elif other := difference(stored, [each for path in chains for each in server_records(path, _OF_ADAPT)]):
        names = []
        statement += f" It is no evidence, because the given audit chains differ: {other}."
    else:
        statement += f" The audit chain of the server has the same {amount(len(stored.steps), 'steps')}."
    return FolderEvidence(str(folder), stored.server, "adaptation", "", {"folders": names}, statement)


class _Test(TypedDict):
    name: str
    alarm: Alarm | None


class _Monitored(TypedDict):
    """The parts of a report of `monitor` that an annex states."""

    schema_version: Literal[1]
    verb: Literal["monitor"]
    model: str | None
    stream: MonitoredSource
    reference: MonitoredSource
    decisive: list[str]
    tests: list[_Test]


def _file(path: Path) -> FolderEvidence:
    """The evidence in a file of API keys, or in the report of a monitored stream. Neither is protected by a chain."""
    content = parsed(path, content_of(path))
    unprotected = "The file has no chain that would show later changes."
    if "keys" in content:
        keys = [key for key in read_keys(path) if key.state == "valid" and "infer" in key.scopes]
        limited = sum(key.rate is not None for key in keys)
        statement = (
            f"{limited} of {amount(len(keys), 'valid keys')} for requests have a rate limit. {unprotected}"
        )
        names = ["limits"] if limited else []
        return FolderEvidence(str(path), "", "API keys", "", {"folders": names}, statement)
    refuse_form(path, content, _Monitored)
    return FolderEvidence(
        str(path),
        content["model"] or content["stream"]["name"],
        f"monitor, {content['stream']['name']}, {content['reference']['name']}",
        "",
        {"folders": ["monitoring"]},
        f"{audit.monitoring_headline(content)} {unprotected}",
    )
