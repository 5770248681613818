"""Runs an audit in a folder, judges its gates, and opens the stored result of a finished audit.

The finding is computed by the function `concluded` of its kind from the settings in `run.json` and the stored steps.
When a finished audit is opened, it is computed again and compared with the stored one.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from holdfast.audits.finding import (
    PICTURES,
    AuditVerdict,
    Finding,
    Measure,
    Source,
    StoredSteps,
    image_columns,
    shown,
)
from holdfast.core.catalogue import AUDITS
from holdfast.core.chain import canonical, digest
from holdfast.core.errors import Need, TargetError, UsageError
from holdfast.core.estimate import Estimate
from holdfast.gates.grammar import parse
from holdfast.gates.judging import Doubts, Verdict, exit_code, judged_estimate, overall
from holdfast.reports import audit as reported
from holdfast.reports.terminal import body
from holdfast.reports.tree import Report
from holdfast.reports.words import strict
from holdfast.reports.write import rendered, write
from holdfast.runs.documents.record import VERDICT, JudgedAudit, ListedAudit, consistent
from holdfast.runs.documents.run_manifest import about_run
from holdfast.runs.engine.identity import code_digest, hardware, versions, way_out
from holdfast.runs.engine.progress import Notify, Progress, ignore, silent, stoppable
from holdfast.runs.engine.run import Executor, Inline, MemoryStore, Run
from holdfast.runs.store.columns import refuse_form
from holdfast.runs.store.files import MANIFEST
from holdfast.runs.store.folder import (
    Chain,
    StoredStage,
    open_run_folder,
    read_about,
    read_chain,
    read_manifest,
    read_stage,
    recorded_document,
    refuse_altered,
)

Json = dict[str, Any]

FINDING = "finding"
"""Name of the document with the finding of an audit."""
FORMAT = 3
"""Version of the settings and steps of audits. It is increased if a finding is computed from others. Version 1, which
`run.json` did not state, lacked steps from which the finding can be computed."""
_TOLERANCE = 1e-6
"""Largest relative difference of equal numbers of two findings. Another version of a library may round other last
digits: sums over a million float64 numbers differ by less than 1e-9, and reports show at most six digits."""
_SMALLEST = 1e-9
"""Difference of equal numbers that are almost 0."""
_NO_PICTURES = "the run stores no pictures of examples, so that reports show none"
_OF_VERDICT: Mapping[str, Verdict] = {"flagged": "fail", "not flagged": "pass", "unclear": "unclear"}


Conclude = Callable[[StoredSteps], Finding]
"""Type of a function from the settings and the stored steps of an audit to its finding. It raises `TargetError` if
steps are missing, have another form, or contradict each other."""


def conclusion_of(kind: str) -> Conclude:
    """Return the function that computes the finding of an audit."""
    concluded: Conclude = import_module(f"holdfast.audits.{AUDITS[kind].conclusion}").concluded
    return concluded


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
        """Return the content of `run.json`, as it is read from there."""
        config: Json = {"kind": self.kind, "format": FORMAT, "settings": self.settings, "seed": self.seed}
        config = strict(config if self.examples else {**config, "examples": False})
        content = {
            "verb": "audit",
            "digests": {
                "config": digest(canonical(config)),
                "model": self.model["digest"],
                "data": self.data["digest"],
                "code": code_digest(),
            },
            "config": config,
            "model": strict(self.model),
            "data": strict(self.data),
            "notes": [*self.notes, *([] if self.examples else [_NO_PICTURES])],
            "versions": versions(),
            "hardware": hardware(torch.device(self.device)),
            "seed": self.seed,
            "plan": {
                "stages": [*self.steps, PICTURES, FINDING],
                "batch_size": 1,
                "shards": [list(shard) for shard in self.shards],
            },
        }
        read: Json = json.loads(canonical(content))
        return read


@dataclass(frozen=True)
class PreparedAudit:
    """An audit whose model and data are open."""

    request: AuditRequest
    measure: Measure
    needs: tuple[Need, ...] = ()
    """what the steps need, besides what was checked when the model and the data were opened"""
    executor: Executor | None = None
    """executor of the stages that are divided into shards; None for this process"""


@dataclass(frozen=True)
class AuditStart:
    """How the run of an audit begins."""

    folder: Path | None
    resume: bool
    notify: Notify


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

    @property
    def report(self) -> Report:
        """The report of the audit."""
        return reported.audit_report(self.content)

    def text(self, *, colour: bool = False, width: int | None = None) -> str:
        """Return the tables of the report as text for a terminal."""
        return body(self.report, colour=colour, width=width)

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return rendered(self.report, ".json")

    def write(self, path: str | Path) -> Path:
        """Write a report in the format of the file suffix, such as `.html`. Return the path."""
        return write(self.report, Path(path))

    def __str__(self) -> str:
        return reported.headline(self.content)

    def __repr__(self) -> str:
        place = "" if self.folder is None else f" in {self.folder}"
        return f"<AuditResult: {self}{place}>"


def audited(
    request: AuditRequest,
    measure: Measure,
    folder: Path | None = None,
    *,
    resume: bool = False,
    progress: Progress = silent,
    notify: Notify = ignore,
    executor: Executor | None = None,
) -> AuditResult:
    """Run an audit, and return its result. `notify` is called with the notes on the model and the data.

    `measure` takes all steps with `Run.stage`, `Run.step` and `Run.document`, so that a stopped audit is resumed in its
    `folder`, and with `Run.sharded_stage`, whose shards `executor` measures; it returns the images of the pictures.
    Without `folder` nothing is stored.
    """
    manifest, stages = request.manifest(), (*request.steps, PICTURES, FINDING)
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
        stored = run.store.document(FINDING)
        if stored is None or request.writes:
            images = measure(run)
            run.stage(PICTURES, lambda: image_columns(images() if request.examples else {}))
        place = Path() if folder is None else folder
        finding = conclusion_of(request.kind)(StoredSteps(manifest, run.store, place)).to_json()
        if stored is not None:
            _refuse_other_finding(place, stored, finding)
        run.document(FINDING, lambda: finding)
        gates = judged(request.kind, finding, request.gates)
        run.record(VERDICT, {"verdict_of": "audit", "gates": gates})
        pictures = _shown_pictures(finding, run.store)
    return AuditResult(_content(manifest, about, finding, pictures, gates), folder)


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
            doubts = [name for name, of in finding["facts"].get("doubts", {}).items() if claim.metric in of]
            if doubts and verdict == "pass":
                verdict, because = "unclear", f"open doubts: {', '.join(doubts)}"
            if finding["verdict"] == "unclear":  # the number does not measure what the gate is about
                verdict, because = "unclear", "the audit is unclear"
        results.append({"gate": gate.strip(), "verdict": verdict, "because": because})
    return results


def is_audit(path: Path) -> bool:
    """Return whether the folder of a run contains an audit."""
    return read_manifest(path).get("verb") == "audit"


@dataclass(frozen=True)
class _Folder:
    """The stored steps in a run folder that is only read."""

    path: Path
    chain: Chain

    def stage(self, name: str) -> StoredStage | None:
        return read_stage(self.path, self.chain, name)

    def document(self, kind: str) -> Mapping[str, Any] | None:
        return recorded_document(self.path, self.chain, kind)


def open_audit(path: Path) -> AuditResult:
    """Return the result of the finished audit in a folder.

    Raises `TargetError` if it is unfinished or altered, if its finding does not follow from its settings and its stored
    steps, or if the verdicts of its gates do not follow from its finding.
    """
    with consistent(path):
        return _opened(path)


def _opened(path: Path) -> AuditResult:
    manifest, chain = read_manifest(path), read_chain(path, repair=False)
    refuse_form(path / MANIFEST, manifest, ListedAudit)
    refuse_altered(path, chain)
    kind, source = manifest["config"]["kind"], _Folder(path, chain)
    stored, decided = source.document(FINDING), source.document(VERDICT)
    if kind not in AUDITS:
        raise TargetError(f"{str(path / MANIFEST)!r} is an audit of the unknown kind {kind!r}")
    if stored is None or decided is None:
        raise TargetError(
            f"the audit in {str(path)!r} is not finished; resume it with its command and --resume"
        )
    _refuse_other_format(path, manifest)
    recorded = {link.content.get("name") or link.content["kind"] for link in chain.links}
    if missing := [step for step in manifest["plan"]["stages"] if step not in recorded]:
        raise TargetError(f"{str(path)!r} has a finding and no {missing[0]}; restore it from a copy")
    finding = conclusion_of(kind)(StoredSteps(manifest, source, path)).to_json()
    _refuse_other_finding(path, stored, finding)
    refuse_form(path / f"{VERDICT}.json", decided, JudgedAudit)
    gates: list[Json] = []
    with suppress(UsageError):  # of a gate that the audit does not have
        gates = judged(kind, finding, [gate["gate"] for gate in decided["gates"]])
    if decided["gates"] != gates:
        raise TargetError(
            f"{str(path / f'{VERDICT}.json')!r} does not follow from the finding; restore it from a copy"
        )
    return AuditResult(
        _content(manifest, read_about(path), finding, _shown_pictures(finding, source), gates), path
    )


def _refuse_other_format(path: Path, manifest: Mapping[str, Any]) -> None:
    """Raise `TargetError` if an audit was written with other settings and steps."""
    if manifest["config"].get("format") != FORMAT:
        version = manifest["versions"].get("holdfast", "an unknown version")
        raise TargetError(
            f"the audit in {str(path)!r} was written by holdfast {version} in another format, from which this version "
            "does not compute the finding; audit again, or read it with the version that wrote it"
        )


def _refuse_other_finding(path: Path, stored: Mapping[str, Any], computed: Mapping[str, Any]) -> None:
    """Raise `TargetError` if a stored finding is not the one that is computed from the stored steps."""
    differing = next(_differing(stored, computed, ""), None)
    if differing is not None:
        raise TargetError(
            f"{differing} in {str(path / f'{FINDING}.json')!r} does not follow from its columns; restore it from a copy"
        )


def _differing(stored: object, computed: object, place: str) -> Iterator[str]:
    """The places of values that differ, such as `facts.p`. Numbers may differ by their rounding."""
    if isinstance(stored, Mapping) and isinstance(computed, Mapping) and stored.keys() == computed.keys():
        for name in stored:
            yield from _differing(stored[name], computed[name], f"{place}.{name}" if place else name)
    elif isinstance(stored, list) and isinstance(computed, list) and len(stored) == len(computed):
        for k, pair in enumerate(zip(stored, computed, strict=True)):
            yield from _differing(*pair, f"{place}[{k}]")
    elif isinstance(stored, float) and isinstance(computed, float):
        if not math.isclose(stored, computed, rel_tol=_TOLERANCE, abs_tol=_SMALLEST):
            yield place
    elif type(stored) is not type(computed) or stored != computed:
        yield place or "the content"


def _shown_pictures(finding: Mapping[str, Any], source: Source) -> list[Json]:
    """The pictures of a finding with their images."""
    if not finding["pictures"]:
        return []
    stage = source.stage(PICTURES)
    assert stage is not None  # the finding lists only pictures whose images are stored
    return [shown(picture, stage.columns[picture["name"]]) for picture in finding["pictures"]]


_IDENTITY = ("model", "data", "config", "notes", "seed", "hardware", "versions")
"""fields of `run.json` that reports contain"""


def _content(
    manifest: Mapping[str, Any],
    about: Mapping[str, Any],
    finding: Mapping[str, Any],
    pictures: Sequence[Json],
    gates: Sequence[Json],
) -> Json:
    return {
        "schema_version": reported.AUDIT_VERSION,
        "verb": "audit",
        "kind": manifest["config"]["kind"],
        **finding,
        "pictures": list(pictures),
        "limits": [*finding["limits"], *([reported.NOT_COMPUTED_AGAIN] if pictures else [])],
        "gates": list(gates),
        "exit_code": exit_code(gate["verdict"] for gate in gates),
        "gate_verdict": overall([gate["verdict"] for gate in gates]) if gates else None,
        **{key: manifest[key] for key in _IDENTITY},
        "created": str(about.get("created", "")),
    }
