"""Runs an audit in a folder, judges its gates, and opens the stored result of a finished audit."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NotRequired

import torch
from typing_extensions import TypedDict

from holdfast.audits.finding import AuditVerdict, Finding
from holdfast.core.catalogue import AUDITS
from holdfast.core.chain import canonical, digest
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.estimate import Estimate
from holdfast.gates.grammar import parse
from holdfast.gates.judging import Doubts, Verdict, exit_code, judged_estimate, overall
from holdfast.reports import audit as reported
from holdfast.reports.numbers import strict
from holdfast.runs.engine.executor import Executor, Inline
from holdfast.runs.engine.identity import code_digest, hardware, versions
from holdfast.runs.engine.progress import Notify, Progress, ignore, silent
from holdfast.runs.engine.resuming import way_out
from holdfast.runs.engine.run import Run
from holdfast.runs.engine.signals import stoppable
from holdfast.runs.engine.store import MemoryStore
from holdfast.runs.store.files import MANIFEST
from holdfast.runs.store.folder import (
    open_run_folder,
    read_about,
    read_manifest,
    recorded_document,
    refuse_altered,
)
from holdfast.runs.store.forms import refuse_form
from holdfast.runs.store.records import read_chain
from holdfast.runs.stored.documents import VERDICT
from holdfast.runs.stored.run_forms import JudgedAudit, ListedAudit
from holdfast.runs.stored.run_manifest import about_run

Json = dict[str, Any]

FINDING = "finding"
"""Name of the document with the finding of an audit."""
_NO_PICTURES = "the run stores no pictures of examples, so that reports show none"
_OF_VERDICT: Mapping[str, Verdict] = {"flagged": "fail", "not flagged": "pass", "unclear": "unclear"}


@dataclass(frozen=True)
class AuditRequest:
    """What identifies an audit, and how it is judged."""

    kind: str
    """name in `holdfast.core.catalogue.AUDITS`"""
    settings: Mapping[str, Any]
    """settings that change a number, as plain values"""
    model: Mapping[str, Any]
    """name, digest and other properties of the model; at least `name` and `digest`"""
    data: Mapping[str, Any]
    """name, digest and number of the examples, and of other data that are compared; at least `name` and `digest`"""
    steps: Sequence[str]
    """names of the stages and documents, in the order in which they are measured"""
    gates: Sequence[str] = ()
    seed: int = 0
    device: str = "cpu"
    command: str = ""
    notes: Sequence[str] = ()
    """notes on the model and the data"""
    shards: Sequence[tuple[int, int]] = ()
    """for each shard of the stages that are divided into shards, its first item and the item after its last one"""
    writes: bool = False
    """whether the audit writes a file of its own, from its stored steps if it is finished"""
    examples: bool = True
    """whether pictures are stored for the report"""

    def manifest(self) -> Json:
        """Return the content of `run.json`."""
        hidden = {} if self.examples else {"examples": False}
        config = strict({"kind": self.kind, "settings": dict(self.settings), "seed": self.seed, **hidden})
        return {
            "verb": "audit",
            "digests": {
                "config": digest(canonical(config)),
                "model": self.model["digest"],
                "data": self.data["digest"],
                "code": code_digest(),
            },
            "config": config,
            "model": strict(dict(self.model)),
            "data": strict(dict(self.data)),
            "notes": [*self.notes, *([] if self.examples else [_NO_PICTURES])],
            "versions": versions(),
            "hardware": hardware(torch.device(self.device)),
            "seed": self.seed,
            "plan": {
                "stages": [*self.steps, FINDING],
                "batch_size": 1,
                "shards": [list(shard) for shard in self.shards],
            },
        }


@dataclass(frozen=True, repr=False)
class AuditResult:
    """The result of an audit: its finding, its gates and its reports."""

    content: Json
    """content of all reports as strict JSON"""
    folder: Path | None = None

    @property
    def verdict(self) -> AuditVerdict:
        """`flagged`, `not flagged`, or `unclear` if there was nothing to compare with."""
        verdict: AuditVerdict = self.content["verdict"]
        return verdict

    @property
    def facts(self) -> Json:
        """The measured numbers as plain values by name."""
        facts: Json = self.content["facts"]
        return facts

    @property
    def metrics(self) -> dict[str, Estimate]:
        """The estimates on which gates can be set, by name."""
        return {name: Estimate(**estimate) for name, estimate in self.content["metrics"].items()}

    @property
    def exit_code(self) -> int:
        """Exit code of the command line: 0 if all gates pass or there are none, 1 if a gate fails, 4 if one is
        unclear.
        """
        return exit_code(gate["verdict"] for gate in self.content["gates"])

    def summary(self) -> Json:
        """Return the content of all reports as strict JSON."""
        return self.content

    def text(self, *, colour: bool = False, width: int | None = None) -> str:
        """Return the tables of the report as text for a terminal."""
        return reported.tables(self.content, colour=colour, width=width)

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return reported.audit_to_json(self.content)

    def write(self, path: str | Path) -> Path:
        """Write a report in the format of the file suffix, `.html`, `.json`, `.md` or `.xml`. Return the path."""
        from holdfast.reports.write import write_audit

        write_audit(self.content, Path(path))
        return Path(path)

    def __str__(self) -> str:
        return reported.headline(self.content)

    def __repr__(self) -> str:
        place = "" if self.folder is None else f" in {self.folder}"
        return f"<AuditResult: {self}{place}>"


def audited(
    request: AuditRequest,
    audit: Callable[[Run], Finding],
    folder: Path | None = None,
    *,
    resume: bool = False,
    progress: Progress = silent,
    notify: Notify = ignore,
    executor: Executor | None = None,
) -> AuditResult:
    """Run an audit, and return its result. `notify` is called with the notes on the model and the data.

    `audit` takes its slow steps with `Run.stage`, `Run.step` and `Run.document`, so that a stopped audit is resumed in
    its `folder`, and with `Run.sharded_stage`, whose shards `executor` measures. Without `folder` nothing is stored.
    """
    manifest, stages = request.manifest(), (*request.steps, FINDING)
    for note in manifest["notes"]:
        notify(note)
    work = Inline() if executor is None else executor
    with ExitStack() as stack:
        if folder is None:
            run = Run(stages, MemoryStore(), work, tuple(request.shards), progress=progress)
            about: Mapping[str, Any] = about_run(request.command)
        else:
            stopper = stack.enter_context(stoppable(way_out(request.command, folder)))
            store = stack.enter_context(
                open_run_folder(folder, manifest, about_run(request.command), resume=resume)
            )
            run = Run(stages, store, work, tuple(request.shards), stopper=stopper, progress=progress)
            about = read_about(folder)
        if request.writes and run.store.document(FINDING) is not None:
            audit(run)
        finding = run.document(FINDING, lambda: _stored(audit(run), request).to_json())
        gates = judged(request.kind, finding, request.gates)
        run.record(VERDICT, {"verdict_of": "audit", "gates": gates})
    return AuditResult(_content(manifest, about, finding, gates), folder)


def _stored(finding: Finding, request: AuditRequest) -> Finding:
    """The finding without pictures if no examples are to be stored."""
    return finding if request.examples else replace(finding, pictures=())


def judged(kind: str, finding: Mapping[str, Any], gates: Sequence[str]) -> list[Json]:
    """Return the gates with their verdicts on a finding, each with the text of the gate, its verdict and the reason."""
    results = []
    for gate in gates:
        if gate.strip() == AUDITS[kind].gate:
            verdict = _OF_VERDICT[finding["verdict"]]
            because = f"the audit is {finding['verdict']}"
        else:
            claim = parse(gate, AUDITS[kind].metrics)
            if claim.metric not in finding["metrics"]:
                raise UsageError(f"gate {gate!r} cannot be judged: {claim.metric} was not measured")
            judgement = judged_estimate(claim, Estimate(**finding["metrics"][claim.metric]), Doubts())
            verdict, because = judgement.verdict, judgement.because
            if finding["verdict"] == "unclear":  # the number does not measure what the gate is about
                verdict, because = "unclear", "the audit is unclear"
        results.append({"gate": gate.strip(), "verdict": verdict, "because": because})
    return results


class _Table(TypedDict):
    title: str
    headings: list[str]
    rows: list[list[Any]]
    note: str
    texts: NotRequired[bool]


class _Image(TypedDict):
    png: str
    caption: str


class _Picture(TypedDict):
    title: str
    together: NotRequired[int]
    images: list[_Image]


class _Line(TypedDict):
    name: str
    points: list[list[float]]


class _Curve(TypedDict):
    title: str
    across: str
    upward: str
    lines: list[_Line]
    least: float
    note: str


class _Estimate(TypedDict):
    value: float
    low: float
    high: float
    n: int


class _Finding(TypedDict):
    verdict: AuditVerdict
    headline: str
    reasons: list[str]
    facts: dict[str, Any]
    metrics: dict[str, _Estimate]
    tables: list[_Table]
    pictures: list[_Picture]
    curves: list[_Curve]
    limits: list[str]


def is_audit(path: Path) -> bool:
    """Return whether the folder of a run contains an audit."""
    return read_manifest(path).get("verb") == "audit"


def open_audit(path: Path) -> AuditResult:
    """Return the result of the finished audit in a folder.

    Raises `TargetError` if it is unfinished or altered, or if the verdicts of its gates do not follow from its finding.
    """
    manifest, chain = read_manifest(path), read_chain(path, repair=False)
    refuse_form(path / MANIFEST, manifest, ListedAudit)
    refuse_altered(path, chain)
    kind = manifest["config"]["kind"]
    finding, decided = (recorded_document(path, chain, name) for name in (FINDING, VERDICT))
    if kind not in AUDITS:
        raise TargetError(f"{str(path / MANIFEST)!r} is an audit of the unknown kind {kind!r}")
    if finding is None or decided is None:
        raise TargetError(
            f"the audit in {str(path)!r} is not finished; resume it with its command and --resume"
        )
    recorded = {link.content.get("name") or link.content["kind"] for link in chain.links}
    if missing := [step for step in manifest["plan"]["stages"] if step not in recorded]:
        raise TargetError(f"{str(path)!r} has a finding and no {missing[0]}; restore it from a copy")
    refuse_form(path / f"{FINDING}.json", finding, _Finding)
    refuse_form(path / f"{VERDICT}.json", decided, JudgedAudit)
    if decided["gates"] != judged(kind, finding, [gate["gate"] for gate in decided["gates"]]):
        raise TargetError(
            f"{str(path / f'{VERDICT}.json')!r} does not follow from the finding; restore it from a copy"
        )
    return AuditResult(_content(manifest, read_about(path), finding, decided["gates"]), path)


def _content(
    manifest: Mapping[str, Any], about: Mapping[str, Any], finding: Mapping[str, Any], gates: Sequence[Json]
) -> Json:
    return {
        "schema_version": reported.AUDIT_VERSION,
        "verb": "audit",
        "kind": manifest["config"]["kind"],
        **finding,
        "gates": list(gates),
        "exit_code": exit_code(gate["verdict"] for gate in gates),
        "gate_verdict": overall([gate["verdict"] for gate in gates]) if gates else None,
        "model": dict(manifest["model"]),
        "data": dict(manifest["data"]),
        "config": dict(manifest["config"]),
        "notes": list(manifest["notes"]),
        "seed": manifest["seed"],
        "hardware": manifest["hardware"],
        "versions": dict(manifest["versions"]),
        "created": str(about.get("created", "")),
    }
