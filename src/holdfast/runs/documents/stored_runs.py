"""Opens stored runs, computes their verdicts again, and lists the runs of a folder."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from holdfast.core.catalogue import AUDITS
from holdfast.core.chain import canonical, digest
from holdfast.core.errors import RESUME, HoldfastError, Remedy, TargetError, UnsoundProof, UsageError
from holdfast.core.estimate import Estimate, Goal
from holdfast.core.evidence import Columns, Evidence, Seconds
from holdfast.gates.grammar import look_sizes, parse
from holdfast.gates.judging import Before, Doubts, Judgement, exit_code, judge, judged_estimate
from holdfast.metrics.comparisons import clean_accuracy_drop, regression
from holdfast.metrics.names import PAIRED
from holdfast.metrics.shares import robust_accuracy
from holdfast.reports import comparison as reported
from holdfast.reports.card import training_summary
from holdfast.reports.formats.html import notebook
from holdfast.reports.summary import Json
from holdfast.reports.terminal import body
from holdfast.reports.tree import Report
from holdfast.reports.words import strict
from holdfast.reports.write import rendered, write
from holdfast.runs.assess.certify import refuse_unsound
from holdfast.runs.assess.result import (
    ATTACKED,
    Result,
    about_of,
    adversarial,
    counted,
    evidence_of,
    with_attackers,
    worst_case,
)
from holdfast.runs.assess.served_runs import totals_in
from holdfast.runs.documents import record as record_forms
from holdfast.runs.documents.record import (
    ADAPTIVE,
    DOUBTS,
    ROTATION,
    UNTIL,
    VERDICT,
    Decided,
    DecidedGate,
    Manifest,
    Record,
    adapted_from_json,
    decided_from_json,
    doubted_from_json,
    looks_from_json,
    manifest_from_json,
)
from holdfast.runs.documents.run_manifest import command_of
from holdfast.runs.engine.ray_cluster import NODES
from holdfast.runs.harness.assembly import FOUND, joined_waves
from holdfast.runs.harness.stage import StageOutline
from holdfast.runs.store import columns as column_files
from holdfast.runs.store.columns import refuse_form
from holdfast.runs.store.files import MANIFEST
from holdfast.runs.store.folder import (
    Chain,
    read_about,
    read_chain,
    read_manifest,
    read_stage,
    recorded_document,
    refuse_altered,
)
from holdfast.runs.store.leases import spent_in
from holdfast.threats.stored import threat_from_json

_DIGITS = 6
"""Significant digits of an estimate that are compared: other versions of libraries round the last ones differently."""
_COPY = "restore the run from a copy, or measure it again"


def files_of(chain: Chain) -> dict[str, str]:
    """Return the digests of the records of the files from which the verdict of a run is computed, by their names: of
    all in the chain but the verdict. A record contains the digest of the file, and whether time ran out.
    """
    recorded = (link.content for link in chain.links if link.content["kind"] != VERDICT)
    return {str(content["file"]): digest(canonical(content)) for content in recorded}


def refuse_other_files(path: Path, chain: Chain, computed_from: Mapping[str, str]) -> None:
    """Raise `TargetError` if a file in the chain of a run is not the one from which its verdict was computed."""
    files = files_of(chain)
    for name in sorted(files.keys() | computed_from.keys()):
        if files.get(name) != computed_from.get(name):
            raise TargetError(
                f"{str(path / name)!r} is not the file from which the verdict of the run was computed: the digest of "
                f"its record in the chain is not the one that {VERDICT}.json states; {_COPY}"
            )


def decided(
    judgements: Sequence[Judgement], accepted: Mapping[str, str], files: Mapping[str, str]
) -> Decided:
    """Return the content of `verdict.json` for the judged gates of a run, whose chain lists `files`."""
    return Decided(
        [
            DecidedGate(
                judgement.claim.text,
                _digest_of(judgement),
                strict(vars(judgement.estimate)) if _compares(judgement) else None,
                judgement.scope,
            )
            for judgement in judgements
        ],
        dict(accepted),
        exit_code(judgement.verdict for judgement in judgements),
        dict(files),
    )


def _compares(judgement: Judgement) -> bool:
    """Whether a gate compares with a measurement that is not part of the run: a baseline, or the given model of a
    training.
    """
    return judgement.claim.metric in PAIRED or judgement.claim.versus == "before"


def _digest_of(judgement: Judgement) -> str:
    estimate = judgement.estimate
    numbers = [f"{value:.{_DIGITS}g}" for value in (estimate.value, estimate.low, estimate.high)]
    return digest(canonical([*numbers, estimate.n, judgement.open_doubts, judgement.verdict]))


def judgements_of(gates: Sequence[DecidedGate], evidence: Evidence, doubts: Doubts) -> tuple[Judgement, ...]:
    """Return the judgements of the gates of a finished run. A gate that compares with a measurement outside the run is
    judged by its stored estimate. Raises `UsageError` if the metric of a gate was not measured.
    """
    return tuple(
        judge(parse(gate.condition), evidence, doubts)
        if gate.estimate is None
        else replace(judged_estimate(parse(gate.condition), gate.estimate, doubts), scope=gate.scope)
        for gate in gates
    )


def computed_gates(path: Path, stated: Decided, evidence: Evidence) -> tuple[Judgement, ...]:
    """Return the judgements that follow from the columns of a run. Raises `TargetError` if they are not those that the
    run recorded, as of an edited run, and of a run that another version of Holdfast judged otherwise.
    """
    file = path / f"{VERDICT}.json"
    try:
        refuse_unsound(evidence)
        judgements = judgements_of(stated.gates, evidence, Doubts(evidence.doubts, stated.accepted_doubts))
    except (UnsoundProof, UsageError) as error:
        raise TargetError(
            f"{str(file)!r} states a verdict that its columns do not give: {error}; {_COPY}"
        ) from error
    for gate, judgement in zip(stated.gates, judgements, strict=True):
        if gate.judgement != _digest_of(judgement):
            raise TargetError(
                f"{str(file)!r} states another judgement of the gate {gate.condition!r} than the columns of the run "
                f"give, which is {judgement}; {_COPY}, or open it with the version that wrote it"
            )
    refuse_other(file, "exit_code", stated.exit_code, exit_code(each.verdict for each in judgements))
    return judgements


def refuse_other(file: Path, name: str, stored: object, computed: object) -> None:
    """Raise `TargetError` if a field of a document is not the value that is computed from the run."""
    if stored != computed:
        raise TargetError(
            f"{str(file)!r} states {name} {stored!r:.100}, but the columns of the run give {computed!r:.100}; {_COPY}"
        )


def refuse_other_settings(path: Path, manifest: Manifest, n: int) -> None:
    """Raise `TargetError` if a digest in `run.json` is not that of its settings or of its groups of examples, or if its
    numbers of examples are not `n`.
    """
    file, groups = path / MANIFEST, manifest.data.get("groups")
    config: Mapping[str, Any] = dict(manifest.config)
    refuse_other(file, "data.n", manifest.data.get("n", n), n)
    refuse_other(file, "data.groups", groups is not None, "groups" in config)
    if groups is not None:
        refuse_other(file, "data.groups.of", len(groups["of"]), n)
        refuse_other(file, "config.groups.digest", config["groups"]["digest"], digest(canonical(groups)))
    refuse_other(file, "digests.config", manifest.digests["config"], digest(canonical(config)))


def refuse_other_looks(path: Path, record: Record, decided: Decided, n: int) -> None:
    """Raise `TargetError` if the document on the looks of a run contradicts its settings, its gates or its `n`
    examples.
    """
    file, looks, until = path / f"{UNTIL}.json", record.looks, record.manifest.config.get("until")
    refuse_other(path / MANIFEST, "config.until", until, None if looks is None else looks.condition)
    if looks is not None:
        first = next((gate.condition for gate in decided.gates), None)
        refuse_other(path / f"{VERDICT}.json", "the first gate", first, looks.condition)
        refuse_other(file, "ended", looks.ended is None, False)
        if looks.ended == "all measured":
            refuse_other(file, "examples", looks.examples, looks.of)
        refuse_other(file, "examples", looks.examples, n)
        refuse_other(file, "examples", n, dict(enumerate(look_sizes(looks.of), 1)).get(looks.look))


def refuse_other_worst_case(path: Path, expected: Columns) -> None:
    """Raise `TargetError` if a column of the file with the columns of the verdict is not the one that follows from the
    columns of the stages.
    """
    file = path / f"{ATTACKED}{column_files.SUFFIX}"
    stored = column_files.read(file).columns
    refuse_other(file, "columns", sorted(stored), sorted(expected))
    for name, values in expected.items():
        digests = (column_files.content_digest({name: column}) for column in (stored[name], values))
        refuse_other(file, f"column {name} with the digest", *digests)


def refuse_other_training(
    path: Path, manifest: Mapping[str, Any], card: Mapping[str, Any], before: Result, after: Result
) -> None:
    """Raise `TargetError` if the verdict of a hardening on its training does not follow from its two measurements."""
    from holdfast.runs.harden.hardened import verdict_entries  # only for hardenings

    goal = Goal(**manifest["config"].get("goals", {}).get(card["recipe"], {}))
    computed = strict(verdict_entries(before.evidence, after.evidence, goal))
    rounded = [_rounded({name: entries[name] for name in computed}) for entries in (card, computed)]
    refuse_other(path / "card.json", "the verdict on the training", *rounded)
    improvement = strict(vars(Before(before.evidence, goal).improvement(after.evidence)))
    for gate in after.gates:
        if gate.claim.versus == "before":
            stated = _rounded(strict(vars(gate.estimate)))
            refuse_other(path / "after" / f"{VERDICT}.json", "compared", stated, _rounded(improvement))


def _rounded(content: Any) -> Any:
    """Nested JSON with numbers as texts of the digits that are compared."""
    if isinstance(content, dict):
        return {name: _rounded(value) for name, value in content.items()}
    return f"{content:.{_DIGITS}g}" if isinstance(content, float) else content


@dataclass(frozen=True)
class Comparison:
    """Comparison of two runs on the examples that they have in common. Raises `UsageError` if they
    have none in common.
    """

    first: Result
    second: Result

    @property
    def regression(self) -> Estimate:
        """Robust accuracy of the first run minus that of the second; positive if the second run is worse."""
        return regression(self.second.evidence, self.first.evidence)

    @property
    def clean_accuracy_drop(self) -> Estimate:
        """Clean accuracy of the first run minus that of the second; positive if the second run is worse."""
        return clean_accuracy_drop(self.second.evidence, self.first.evidence)

    def summary(self) -> Json:
        """Return the content of all reports of the comparison as strict JSON."""
        return self._summary

    @cached_property
    def _summary(self) -> Json:
        summaries = self.first.summary(), self.second.summary()
        return reported.comparison(self.first.evidence, self.second.evidence, summaries)

    @property
    def report(self) -> Report:
        """The report of the comparison."""
        return reported.comparison_report(self._summary)

    def text(self, *, colour: bool = False, width: int | None = None) -> str:
        """Return the comparison as text for a terminal: the changes, and the metrics of both runs. The result in one
        sentence is `str`.
        """
        return body(self.report, colour=colour, width=width)

    def to_json(self) -> str:
        """Return the summary of the comparison as JSON text."""
        return rendered(self.report, ".json")

    def write(self, path: str | Path) -> Path:
        """Write a report of the comparison in the format of the file suffix, such as `.html`. Return the path."""
        return write(self.report, Path(path))

    def _repr_html_(self) -> str:
        """HTML representation of the comparison for notebooks."""
        return notebook(self.report)

    def __str__(self) -> str:
        return " ".join(sentence for key in ("caution", "headline") if (sentence := self._summary[key]))


RUNS = Path("holdfast-runs")
"""Parent folder of runs for which no folder is given."""


@dataclass(frozen=True)
class RunEntry:
    """A stored run as one row of the list of runs."""

    path: Path
    verb: str
    created: str
    model: str
    data: str
    threat: str
    suite: str
    finished: bool
    stages_done: int
    stages: int
    exit_code: int | None = None
    """exit code of the run; None until it is finished, and if `open_run` refuses it"""
    defence: str = ""
    """what is in front of the model: random transformations and a guard"""
    robust: float | None = None
    """robust accuracy; for a hardening, that of the new model; None until the run is finished"""
    is_audit: bool = False
    """whether the folder contains an audit, or a run with a policy or a generator, whose result is that of an audit"""
    gates: int = 0
    """number of gates of the verdict; 0 for a hardening, whose verdict is that of its inner run"""


def new_folder(verb: str, digest: str, *, parent: Path = RUNS, now: datetime | None = None) -> Path:
    """Return an unused path `<time>-<verb>-<digest>` in `parent` for a new run, with a number at the end if needed."""
    stamp = (now or datetime.now(UTC)).strftime("%Y%m%d-%H%M%S")
    path, k = parent / f"{stamp}-{verb}-{digest[:6]}", 2
    while path.exists():
        path, k = path.with_name(f"{stamp}-{verb}-{digest[:6]}-{k}"), k + 1
    return path


def open_run(path: Path) -> Result:
    """Return the result of the finished run in the folder `path`. For a hardening, it is the assessment of the new
    model.

    Raises `TargetError` if there is no run in the folder, or if it is unfinished or altered.
    """
    manifest, chain = read_manifest(path), read_chain(path, repair=False)
    if manifest.get("verb") in ("audit", "adapt"):
        what = "an audit" if manifest["verb"] == "audit" else "an adaptation"
        kind = manifest.get("config", {}).get("kind") if manifest["verb"] == "audit" else ""
        if kind in AUDITS and AUDITS[kind].verb:
            raise TargetError(
                f"{str(path)!r} is the {AUDITS[kind].noun} of a policy or a generator, which has no examples of a "
                f"classifier; show it by holdfast report {path}"
            )
        raise TargetError(f"{str(path)!r} is {what}, and a run of assess, certify or harden was expected")
    refuse_altered(path, chain)  # the model and the threat model in the manifest belong to the measurements
    decided = recorded_document(path, chain, VERDICT)
    if decided is None:
        raise TargetError(f"the run in {str(path)!r} is not finished", _resumed(path))
    verbs = ("harden",) if "verdict_of" in decided else ("assess", "certify")
    if manifest.get("verb") not in verbs:
        raise TargetError(
            f"{str(path / MANIFEST)!r} states the verb {str(manifest.get('verb'))!r}, but {VERDICT}.json is that of "
            f"{' or '.join(verbs)}; restore it from a copy"
        )
    if "verdict_of" not in decided:
        return _opened(path, manifest, chain, decided)
    refuse_form(path / f"{VERDICT}.json", decided, record_forms.Judged)
    with record_forms.consistent(path):
        return _hardened(path, manifest, chain, decided)


def _hardened(path: Path, manifest: dict[str, Any], chain: Chain, decided: dict[str, Any]) -> Result:
    """The measurement of the new model of a hardening, with the verdict on its training."""
    refuse_other_files(path, chain, decided["computed_from"])
    card = recorded_document(path, chain, "card")
    if card is None or chain.last("model") is None:
        raise TargetError(f"{str(path)!r} has a verdict but no card and no model; restore it from a copy")
    before, after = (_opened(*_inner_run(path, chain, side)) for side in ("before", "after"))
    refuse_other(path / f"{VERDICT}.json", "exit_code", decided["exit_code"], after.exit_code)
    refuse_other_training(path, manifest, card, before, after)
    command = command_of(manifest, after.gates)
    return replace(after, about={**after.about, "command": command}, training=training_summary(card))


def attacked_stages(path: Path) -> dict[str, Columns]:
    """Return the columns of each attack of a finished run by the name of its stage. An attack that tried its examples
    in several waves has one entry. For a hardening, the run is that of the new model. The columns `id`, `ran` and
    `success` state on which examples an attack was run, and which it broke.

    Raises `TargetError` if the files do not match their chain. `open_run` also checks what follows from the columns.
    """
    if (path / "after" / MANIFEST).is_file() and not (path / "after").is_symlink():
        path = path / "after"
    manifest, chain = read_manifest(path), read_chain(path, repair=False)
    refuse_altered(path, chain)
    with record_forms.consistent(path):
        steps = manifest_from_json(path, manifest).outline.steps
        by_stage = joined_waves(steps, _stages(path, steps, chain))
        return {
            step.name: by_stage[step.name] for step in steps if step.kind.in_suite and step.name in by_stage
        }


def learned_values(path: Path) -> dict[str, Tensor]:
    """Return what each learned attack of a finished run learned, such as a patch (1, channels, height, width) in the
    units of the model, by the name of the stage that learned it. Raises `TargetError` as `attacked_stages` does.
    """
    manifest, chain = read_manifest(path), read_chain(path, repair=False)
    refuse_altered(path, chain)
    with record_forms.consistent(path):
        steps = manifest_from_json(path, manifest).outline.steps
        stages = {step.name: read_stage(path, chain, step.name) for step in steps}
        return {
            name: stage.columns["learned.x"]
            for name, stage in stages.items()
            if stage is not None and "learned.x" in stage.columns
        }


def refuse_false(path: Path) -> None:
    """Raise `TargetError` if a document of the finished run in a folder, or of a run inside it, contradicts its
    columns. An unfinished run is not examined.
    """
    if read_chain(path, repair=False).last(VERDICT) is None:
        return
    open_run(path)
    for inner in sorted(path.iterdir()):
        if (inner / MANIFEST).is_file() and inner.name not in ("before", "after"):
            open_run(inner)


def command_to_resume(path: Path) -> str:
    """Return the command line of the run in a folder, finished or not, from its settings; "" for another verb than
    `assess`, `certify` and `harden`.
    """
    manifest = read_manifest(path)
    refuse_form(path / MANIFEST, manifest, record_forms.Listed)
    with record_forms.consistent(path):
        return command_of(manifest)


def _inner_run(
    path: Path, chain: Chain, inner_name: str
) -> tuple[Path, dict[str, Any], Chain, dict[str, Any]]:
    """The inner run of a hardening that measured the given or the new model; it must match the digest in the outer
    chain.
    """
    inner_path, inner_document = path / inner_name, recorded_document(path, chain, inner_name)
    if inner_document is None or inner_path.is_symlink():
        raise TargetError(f"{str(path)!r} has no inner run {inner_name!r}; restore it from a copy")
    refuse_form(path / f"{inner_name}.json", inner_document, record_forms.Inner)
    manifest, inner = read_manifest(inner_path), read_chain(inner_path, repair=False)
    # The inner run could otherwise be exchanged for another valid one.
    if inner.head != inner_document["chain"]:
        raise TargetError(
            f"{str(inner_path)!r} is not the run whose chain is recorded in {inner_name}.json; restore it from a copy"
        )
    refuse_altered(inner_path, inner)
    verdict = recorded_document(inner_path, inner, VERDICT)
    if verdict is None:
        raise TargetError(f"the run in {str(inner_path)!r} is not finished", _resumed(path))
    return inner_path, manifest, inner, verdict


def _opened(path: Path, manifest: dict[str, Any], chain: Chain, decided: dict[str, Any]) -> Result:
    with record_forms.consistent(path):
        verdict = decided_from_json(path, decided)
        refuse_other_files(path, chain, verdict.computed_from)
        return _result(read_record(path, manifest, chain), path, chain, verdict)


def _result(record: Record, path: Path, chain: Chain, decided: Decided) -> Result:
    rotation = recorded_document(path, chain, ROTATION)
    evidence = with_attackers(evidence_of(record), rotation)
    refuse_other_looks(path, record, decided, len(evidence))
    refuse_other_settings(path, record.manifest, len(evidence) if record.looks is None else record.looks.of)
    gates, inputs = computed_gates(path, decided, evidence), adversarial(record)
    refuse_other_worst_case(path, worst_case(evidence, inputs))
    about = {**read_about(path), "command": command_of(record.manifest.to_json(), gates)}
    shown = about_of(record.manifest, about, path, chain.head)
    return Result(evidence, gates, decided.accepted_doubts, shown, path, inputs, rotation=rotation)


def read_record(path: Path, content: Mapping[str, Any], chain: Chain) -> Record:
    """Return the record of the run in a folder, whose manifest has this content. Raises `TargetError` if a file is
    missing, has another form or does not match the chain.
    """
    manifest = manifest_from_json(path, content)
    doubts, adapted, nodes, looks = (
        recorded_document(path, chain, kind) for kind in (DOUBTS, ADAPTIVE, NODES, UNTIL)
    )
    if doubts is None:
        raise TargetError(f"the run in {str(path)!r} has a verdict but no {DOUBTS}; restore it from a copy")
    if nodes is not None:
        refuse_form(path / f"{NODES}.json", nodes, record_forms.Differing)
    recorded = {link.content.get("name") or link.content["kind"] for link in chain.links}
    times = {name: time for name, time in spent_in(path).items() if name in recorded}
    return Record(
        manifest,
        _stages(path, manifest.outline.steps, chain),
        doubted_from_json(path, doubts),
        None if adapted is None else adapted_from_json(path, adapted),
        {name: Seconds(time.cpu_s, time.wall_s) for name, time in times.items()},
        totals_in(path),
        () if nodes is None else nodes["nodes"],
        None if looks is None else looks_from_json(path, looks),
    )


def _stages(path: Path, steps: Sequence[StageOutline], chain: Chain) -> dict[str, Columns]:
    by_stage: dict[str, Columns] = {}
    for step in steps:
        stage = read_stage(path, chain, step.name)
        columns = None if stage is None else counted(step.kind, stage, by_stage)
        if columns is not None:
            by_stage[step.name] = columns
    found_by_probes = read_stage(path, chain, FOUND)
    return by_stage if found_by_probes is None else {**by_stage, FOUND: found_by_probes.columns}


def runs_in(parent: Path = RUNS) -> list[RunEntry]:
    """Return the runs in a folder, oldest first. Subfolders without a readable run are skipped."""
    if not parent.is_dir():
        return []
    return sorted(_entries(parent), key=lambda entry: (entry.created, entry.path.name))


def _entries(parent: Path) -> Iterator[RunEntry]:
    for folder in parent.iterdir():
        with suppress(HoldfastError, OSError):
            if (folder / MANIFEST).is_file():
                yield run_entry(folder)


def run_entry(path: Path, *, checked: bool = True) -> RunEntry:
    """Return the entry of the run or audit in a folder.

    If `checked` is False, the exit code is that of the stored verdict, which matches the chain but is not computed
    again, and the robust accuracy is None. This takes a millisecond instead of a twentieth of a second. Raises
    `TargetError` if the files have another format or do not match the chain.
    """
    with record_forms.consistent(path):
        return _entry(path, checked=checked)


def _entry(path: Path, *, checked: bool) -> RunEntry:
    manifest, chain = read_manifest(path), read_chain(path, repair=False)
    is_audit = manifest.get("verb") == "audit"
    refuse_form(path / MANIFEST, manifest, record_forms.ListedAudit if is_audit else record_forms.Listed)
    refuse_altered(path, chain)
    decided = recorded_document(path, chain, VERDICT)
    if decided is not None:
        of_run: type = record_forms.Judged if "verdict_of" in decided else Decided
        refuse_form(path / f"{VERDICT}.json", decided, record_forms.JudgedAudit if is_audit else of_run)
    config, stages = manifest["config"], manifest["plan"]["stages"]
    entry = RunEntry(
        path,
        manifest["verb"],
        str(read_about(path).get("created", "")),
        str(manifest["model"].get("name", "")),
        str(manifest["data"].get("name", "")),
        "",
        "",
        decided is not None,
        _done(stages, chain),
        len(stages),
        gates=len((decided or {}).get("gates", ())),
    )
    if is_audit:  # which has neither a threat model nor a suite
        code = None if decided is None else exit_code(gate["verdict"] for gate in decided["gates"])
        kind = config["kind"]
        verb = AUDITS[kind].verb if kind in AUDITS else ""
        return replace(entry, verb=verb or f"audit {kind}", exit_code=code, is_audit=True)
    outcome: tuple[int | None, float | None] = (None, None)
    if decided is not None:
        outcome = _outcome(path) if checked else (decided["exit_code"], None)
    return replace(
        entry,
        threat=threat_from_json(config["threat"]).text,
        suite=config["suite"],
        exit_code=outcome[0],
        defence=_defence(manifest["model"]),
        robust=outcome[1],
    )


def _defence(card: Mapping[str, Any]) -> str:
    """What is in front of a model, by its card."""
    transformed = ""
    if "seen_through" in card:
        from holdfast.settings.grammar import (
            transform_text,
        )  # late: few models have one, and settings decide no number

        transformed = transform_text(card["seen_through"])
    return ", ".join(
        (["guard"] if card.get("guard") else []) + ([f"transform {transformed}"] if transformed else [])
    )


def _done(stages: Sequence[str], chain: Chain) -> int:
    """The number of records of stages in a chain."""
    return sum({link.content["kind"], link.content.get("name")} & {*stages} != set() for link in chain.links)


def _outcome(path: Path) -> tuple[int | None, float | None]:
    """The exit code and the robust accuracy as in the report; None for what the folder does not show."""
    try:
        result = open_run(path)
    except HoldfastError:
        return None, None
    if not result.evidence.threat.constraint.measures_robustness:
        return result.exit_code, None
    try:
        return result.exit_code, robust_accuracy(
            result.evidence
        ).value  # `metrics` would compute all others, too
    except HoldfastError:
        return result.exit_code, None


def _resumed(path: Path) -> Remedy:
    """Return the arguments of the verb that finish a run."""
    return Remedy("run", str(path), also=(RESUME,))
