"""Reads folders of runs, audits, pools, audit chains and adaptations, reports of `monitor` and files of API keys for an
annex.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from typing_extensions import TypedDict

from holdfast.adaptation.journal import difference, is_adaptation, open_finished
from holdfast.attacks.suites import VARIANTS
from holdfast.audits.audit import is_audit, open_audit
from holdfast.core.errors import TargetError, UsageError
from holdfast.monitoring.monitored import Source
from holdfast.monitoring.watching import Alarm
from holdfast.reports import monitoring
from holdfast.reports.annex import FolderEvidence, annex, annex_report
from holdfast.reports.audit import headline
from holdfast.reports.terminal import as_lines, body
from holdfast.reports.tree import Report
from holdfast.reports.words import amount, open_doubts, threat_syntax
from holdfast.reports.write import rendered, write
from holdfast.rotation.pool.pool_manifest import verify_pool
from holdfast.runs.store.files import AUDIT_MARK, MANIFEST, POOL_MANIFEST, content_of
from holdfast.runs.store.folder import parsed, read_manifest
from holdfast.runs.store.forms import refuse_form
from holdfast.runs.stored.run_forms import consistent
from holdfast.runs.stored.stored_runs import open_run
from holdfast.server.audit_folder import server_records, verify_audit
from holdfast.server.keys import read_keys

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
    stream: Source
    reference: Source
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
        f"{monitoring.headline(content)} {unprotected}",
    )
