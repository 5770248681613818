"""The result of an assessment: evidence from stored artefacts, metrics, gates and reports."""

from collections.abc import Callable, Iterator, KeysView, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from holdfast.core.errors import UsageError
from holdfast.core.estimate import Estimate
from holdfast.core.evidence import (
    AnswerCheck,
    AttackRecord,
    Columns,
    Cost,
    Doubt,
    Ending,
    Evidence,
    Looks,
    Seconds,
    in_table,
)
from holdfast.core.names import enumerated, suggestion
from holdfast.doubts.answering import with_answers
from holdfast.gates.grammar import parse
from holdfast.gates.judging import Doubts, Judgement, exit_code, judge
from holdfast.metrics.catalogue import estimates, missing
from holdfast.metrics.predictions import EpsCurve, eps_curve
from holdfast.metrics.shares import notes_on_absent
from holdfast.reports.formats.csv import frame
from holdfast.reports.formats.html import notebook
from holdfast.reports.run import run_report
from holdfast.reports.summary import Json, later_gate, summary
from holdfast.reports.terminal import body, verdict
from holdfast.reports.tree import Report
from holdfast.reports.words import VERDICTS, measured
from holdfast.reports.write import rendered, write
from holdfast.runs.assess.served_runs import totals_to_json
from holdfast.runs.documents.record import DOUBTS, Adapted, Manifest, Record, doubt_from_json
from holdfast.runs.harness.assembly import Context, evidence_from, passes, worst_rows
from holdfast.runs.harness.stage import StageKind, StageOutline, broken_by_suite
from holdfast.runs.harness.target import DISTANCES
from holdfast.runs.store.folder import StoredStage

if TYPE_CHECKING:
    from holdfast.explanation.case import Explained

TUNING = "fine-tuning"
"""Name of the doubt whether fine-tuning would achieve more than rotation."""


def counted(kind: StageKind, stage: StoredStage, by_stage: Mapping[str, Columns]) -> Columns | None:
    """Return the columns of a stage for all examples, or None if time ran out during a stage that is neither an attack
    of the suite nor a proof.

    If time ran out during an attack of the suite, the examples that it did not reach count as not attacked. Likewise
    nothing is proved about the examples that a method of certification did not reach.
    """
    if stage.reached is None:
        return stage.columns
    return _filled(kind, stage.columns, by_stage["clean"]) if kind.in_suite or kind.proves else None


def evidence_of(record: Record) -> Evidence:
    """Return the evidence of a run, computed from its record."""
    manifest, doubted, by_stage = record.manifest, record.doubted, record.columns
    spent, served = record.seconds.get(DOUBTS, Seconds()), {}
    if record.sent is not None:
        served = totals_to_json(record.sent)
    context = Context(
        model=manifest.model,
        data=manifest.data,
        notes=(
            *manifest.notes,
            *_ended(record.looks),
            *doubted.notes,
            *served.get("messages", ()),
            *_mixed(record.nodes),
        ),
        details=tuple(manifest.details),
        doubts=doubted.doubts,
        batches=doubted.batches,
        doubts_cost=replace(doubted.cost, cpu_s=spent.cpu, wall_s=spent.wall),
        surrogates=tuple(manifest.surrogates),
        others=tuple(manifest.other_data),
        probes=doubted.probes,
    )
    if record.adapted is not None:
        context = _adapted(context, record, record.adapted)
    randomised = manifest.model["randomised"]
    evidence = evidence_from(manifest.outline, by_stage, record.seconds, context, randomised=randomised)
    return replace(_with_groups(evidence), served=served, looks=record.looks)


def _ended(looks: Looks | None) -> tuple[str, ...]:
    """Return a note on why a run with a condition ended, and after how many examples, if it has one."""
    if looks is None or looks.ended is None:
        return ()
    n = f"{looks.of:,} example{'s' * (looks.of != 1)}"
    place = f"at look {looks.look}, after {looks.examples:,} of {n} in a random order"
    reasons: Mapping[Ending, str] = {
        "decided": f"the run ended {place}, because its attacks decided {looks.condition!r}",
        "all measured": f"the run measured every example ({looks.of:,}), which does not decide {looks.condition!r}",
        "out of time": f"time ran out {place}, before the attacks decided {looks.condition!r}",
    }
    intervals = (
        "the intervals of gates on shares of all examples are valid at every look; the intervals of the metrics assume "
        "a number of examples that was fixed before the run, and are narrower"
    )
    return (f"{reasons[looks.ended]}; {intervals}",)


def _with_groups(evidence: Evidence) -> Evidence:
    """The evidence with the column `group`, if `run.json` states the groups of the examples."""
    stated = evidence.data.get("groups")
    if stated is None:
        return evidence
    from holdfast.io.data.labels import places_of_letters  # only for runs with groups

    group = torch.from_numpy(places_of_letters(stated["of"], len(stated["names"])))[: len(evidence)]
    data = {**evidence.data, "groups": {name: stated[name] for name in ("column", "names", "absent")}}
    return replace(evidence, columns={**evidence.columns, "group": group}, data=data)


def _mixed(nodes: Sequence[Mapping[str, str]]) -> tuple[str, ...]:
    """Return a note on the nodes that differ from the process of the run, if there were some."""
    if not nodes:
        return ()
    shown = "; ".join(", ".join(f"{key} {value}" for key, value in each.items()) for each in nodes)
    return (
        f"some shards were measured on nodes that differ (--mixed-nodes), so that last bits may differ: {shown}",
    )


def with_attackers(evidence: Evidence, table: Mapping[str, Any] | None) -> Evidence:
    """Add to the evidence what was measured about attackers of a model with rotation: the doubt, the verdict and the
    notes.

    Returns `evidence` unchanged if these measurements, `table`, are None or not complete.
    """
    if table is None or not table["complete"]:
        return evidence
    notes = (table["conclusion"], *table.get("notes", ()))
    fine_tuning_doubt = table["doubt"]
    doubts = () if fine_tuning_doubt is None else (doubt_from_json({"name": TUNING, **fine_tuning_doubt}),)
    return replace(evidence, doubts=(*evidence.doubts, *doubts), notes=(*evidence.notes, *notes))


def _adapted(context: Context, record: Record, adapted: Adapted) -> Context:
    """The context after the adaptive attacks: which doubts they answered, and their notes."""
    outline, by_stage = record.manifest.outline, record.columns
    order = [step.attack for step in outline.steps]  # a stored document has its keys in alphabetical order
    reasons = {
        arm: tuple(names)
        for arm, names in sorted(adapted.reasons.items(), key=lambda item: order.index(item[0]))
    }
    measured = [step for step in outline.steps if step.adaptive and step.name in by_stage]
    places = {step.attack: step.name for step in measured if step.kind.in_suite}
    checks = _answer_checks(measured, by_stage)
    results = {} if adapted.unfinished else {arm: by_stage[name] for arm, name in places.items()}
    clean = by_stage["clean"]
    robust = clean["correct"] & clean["eligible"] & ~broken_by_suite(outline.steps, by_stage)
    broken_by_probes = {id_ for ids in record.doubted.broken.values() for id_ in ids}
    broken_elsewhere = broken_by_probes & set(clean["id"][robust].tolist())
    return replace(
        context,
        doubts=with_answers(
            context.doubts,
            results,
            reasons,
            bypassed=bool(adapted.bypassed),
            survivor_broken=bool(broken_elsewhere),
            blind=adapted.no_detector_gradient,
            checks=checks,
        ),
        answer_checks=checks,
        notes=(*context.notes, *adapted.unfinished, *adapted.notes),
        remarks={
            name: (f"run because of {enumerated(reasons[arm])}", *_bypass_note(adapted, arm))
            for arm, name in places.items()
        },
    )


def _answer_checks(
    measured: Sequence[StageOutline], by_stage: Mapping[str, Columns]
) -> tuple[AnswerCheck, ...]:
    """The checks of the adaptive search; none if it was not run or not checked."""
    names = [step.name for step in measured if step.kind.name == "answer-checks"]
    if not names:
        return ()
    from holdfast.doubts.answering import answer_checks  # only for runs with adaptive attacks

    changed = sum(
        int((by_stage[step.name]["changed"] > 0).sum())
        for step in measured
        if step.kind.in_suite and "changed" in by_stage[step.name]
    )
    return answer_checks(by_stage[names[0]], changed=changed)


def _bypass_note(adapted: Adapted, arm: str) -> tuple[str, ...]:
    bypassed = adapted.bypassed if arm != "Search" else []
    return (f"its gradient bypasses {enumerated(bypassed)}",) if bypassed else ()


def adversarial(record: Record) -> dict[str, Tensor]:
    """Return one stored adversarial input for each broken example, as the columns `id` and `x`.

    If several passes broke an example, the input is that of the first pass or, in a run that searches for the smallest
    change, that with the smallest change. Probes and other passes follow the attacks.
    """
    outline, by_stage = record.manifest.outline, record.columns
    attacks = [step.name for step in outline.steps if step.kind.in_suite]
    columns = [by_stage[name] for name in attacks if name in by_stage]
    counted = passes(outline, by_stage, record.doubted.probes)
    with_examples = [c for c in (*columns, *(passed.columns for passed in counted)) if "adversarial.id" in c]
    if not with_examples:
        return {}
    ids = torch.cat([columns["adversarial.id"] for columns in with_examples])
    rows = worst_rows(with_examples, "adversarial", smallest=outline.smallest)
    return {"id": ids[rows], "x": torch.cat([columns["adversarial.x"] for columns in with_examples])[rows]}


def _filled(kind: StageKind, columns: Columns, clean: Columns) -> dict[str, Tensor]:
    """The columns of the first examples, extended by those of examples that the stage was not run on."""
    unattacked_columns, n = kind.columns(clean), len(columns["id"])
    filled = {
        name: torch.cat([columns[name], values[n:]]) if n else values
        for name, values in unattacked_columns.items()
    }
    return filled | {name: values for name, values in columns.items() if in_table(name)}


class UnknownMetric(KeyError):
    """Error for the name of an unknown metric. Unlike the message of other `KeyError`s, its message is shown without
    quotes.
    """

    def __str__(self) -> str:
        return str(self.args[0])


class Metrics(dict[str, Estimate]):
    """Dictionary of metrics by name. An unknown name raises `UnknownMetric`, whose message contains the most similar
    name and all names.
    """

    def __missing__(self, name: str) -> Estimate:
        similar = suggestion(str(name), self)
        available = f"this run has {', '.join(self) or 'none'}"
        raise UnknownMetric(f"there is no metric {name!r}; {f'{similar} ' if similar else ''}{available}")


ATTACKED = "attacked"
"""Name of the file of a run folder with the columns from which the verdict is computed, without its suffix."""
_WORST_CASE = (
    "id",
    "y",
    "prediction",
    "correct",
    "success",
    "broken_by",
    "adversarial_prediction",
    "right_probability",
    "queries",
    *DISTANCES,
)


@dataclass(frozen=True)
class Result:
    """The result of a finished assessment."""

    evidence: Evidence
    gates: tuple[Judgement, ...] = ()
    accepted_doubts: Mapping[str, str] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    """information that is not part of the evidence: `verb`, `folder`, `created`, `command`, `hashes`, `versions`,
    `hardware`"""
    folder: Path | None = None
    """the run folder; None for a run in memory"""
    adversarial: Columns = field(default_factory=dict)
    """the adversarial input of each broken example as columns `id` and `x`, if the run stores them"""
    baseline: Evidence | None = None
    """evidence of another run, with which `regression` and `clean_accuracy_drop` compare; None without a baseline"""
    rotation: Mapping[str, Any] | None = None
    """the table of attackers of a model with rotation; None for other models"""
    training: Mapping[str, Any] | None = None
    """the verdict on the training of the model, for the assessment of a hardened model; None for other models"""
    explaining: "Callable[[Result, int | None], Explained] | None" = field(
        default=None, repr=False, compare=False
    )
    """function that opens the model and the data of the run again, and explains an example or the model; None if they
    are not known"""
    _asked: dict[str, Judgement] = field(default_factory=dict, init=False, repr=False, compare=False)
    """gates judged after the run, by their text, for the notebook view"""

    @cached_property
    def metrics(self) -> dict[str, Estimate]:
        """All metrics of the run by name, with confidence intervals."""
        return Metrics(estimates(self.evidence, baseline=self.baseline))

    @property
    def attacks(self) -> tuple[AttackRecord, ...]:
        """Attacks of the run in their order, each with the number of surviving examples before and after it."""
        return self.evidence.attacks

    @property
    def doubts(self) -> tuple[Doubt, ...]:
        """All doubts of the run with their states. A doubt is a reason why the measured robust accuracy may be too
        high.
        """
        return self.evidence.doubts

    @property
    def cost(self) -> Cost:
        """Numbers of forward and backward passes through the model, and the time of the run."""
        return self.evidence.cost

    @property
    def exit_code(self) -> int:
        """Exit code of the command line: 0 if all gates pass or there are none, 1 if a gate fails, 4 if the verdict is
        unclear.
        """
        return exit_code(judgement.verdict for judgement in self.gates)

    @property
    def worst_case(self) -> dict[str, Tensor]:
        """Columns with the strongest result against each example over all attacks and probes that count, including the
        distances of adversarial examples.
        """
        return worst_case(self.evidence)

    @property
    def table(self) -> str:
        """Attacks, metrics and doubts of the run as text for a terminal."""
        return body(self.report, colour=False)

    @property
    def curve(self) -> EpsCurve:
        """Robust accuracy as a function of eps, which is the largest change that the attacker may make.

        It is measured with `curve=True` or by a suite of minimum-norm attacks. Raises `UsageError` if it was not
        measured.
        """
        return eps_curve(self.evidence)

    def explain(self, index: int | None = None) -> "Explained":
        """Explain the example with the row number `index`, or without it the model: why it breaks, and what attacks
        use.

        The model and the data are opened again. Raises `UsageError` if the run does not state how;
        `holdfast.explain(model, x, y)` then does the same.
        """
        if self.explaining is None:
            raise UsageError(
                "this result does not state how its model and data are opened; give them, as in "
                "holdfast.explain(model, x, y, threat='linf:8/255')"
            )
        return self.explaining(self, index)

    @property
    def run_folder(self) -> Path | None:
        """Folder of the run: for a hardened model, the folder of the hardening, which contains its assessment."""
        return self.folder.parent if self.folder is not None and self.training is not None else self.folder

    def __getitem__(self, metric: str) -> Estimate:
        """Return a metric by name, as in `result["robust_accuracy"]`; `float()` of it is its value."""
        return self.metrics[metric]

    def __contains__(self, metric: object) -> bool:
        return metric in self.metrics

    def __iter__(self) -> Iterator[str]:
        return iter(self.metrics)

    def keys(self) -> KeysView[str]:
        """Return the names of the metrics of the run."""
        return self.metrics.keys()

    def gate(self, claim: str) -> Judgement:
        """Judge a further gate, such as `"robust_accuracy >= 0.5"`, on the evidence and the doubts of the run. Return
        the judged gate.

        Notebooks show it beside the gates of the run. It changes neither the verdict nor the exit code.
        """
        doubts = Doubts(self.doubts, self.accepted_doubts)
        judgement = judge(parse(claim), self.evidence, doubts, baseline=self.baseline)
        self._asked[judgement.claim.text] = judgement
        return judgement

    def summary(self) -> Json:
        """Return the content of all reports of the run as strict JSON."""
        return self._summary

    @cached_property
    def _summary(self) -> Json:
        return summary(
            self.evidence,
            metrics=self.metrics,
            gates=self.gates,
            accepted_doubts=self.accepted_doubts,
            run=self.about,
            rotation=self.rotation,
            training=self.training,
            notes=(*missing(self.evidence, self.baseline), *notes_on_absent(self.evidence)),
        )

    @cached_property
    def report(self) -> Report:
        """The report of the run."""
        return run_report(self._summary, self.evidence.columns)

    def to_html(self, path: str | Path) -> Path:
        """Write the HTML report of the run to `path`, and return the path."""
        return self._write(path, ".html")

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the summary of the run as JSON text. If `path` is given, the text is also written to this file."""
        if path is not None:
            self._write(path, ".json")
        return rendered(self.report, ".json")

    def to_pandas(self) -> Any:
        """Return the columns of the evidence as a `pandas.DataFrame` with one row for each example, indexed by id.

        `broken_by` is the attack or pass that broke the example; `robust` is true if the example is correct when clean
        and nothing broke it. The other columns, such as labels, predictions and distances, are those of the evidence.
        Raises `UsageError` if pandas is not installed.
        """
        return frame(self.evidence)

    def write(self, path: str | Path) -> Path:
        """Write a report of the run in the format of the file suffix, such as `.html`. Return the path."""
        return write(self.report, Path(path))

    def _write(self, path: str | Path, suffix: str) -> Path:
        if Path(path).suffix.lower() != suffix:
            raise UsageError(
                f"{str(path)!r} does not end in {suffix}; add the suffix, or call write() for other formats"
            )
        return self.write(path)

    def _repr_html_(self) -> str:
        """HTML for notebooks: verdict, gates, attacks, metrics, doubts with advice, and a few examples."""
        later = [later_gate(gate, self._summary) for gate in self._asked.values()]
        return notebook(run_report(self._summary, later_gates=later))

    def __str__(self) -> str:
        return verdict(self.report, colour=False).rstrip("\n")

    def __repr__(self) -> str:
        """Return the verdict and the main metrics in one line."""
        where = "" if self.folder is None else f", folder {str(self.folder)!r}"
        return f"<Result: {VERDICTS[self._summary['verdict']][1]}; {measured(self._summary)}{where}>"


def worst_case(evidence: Evidence, adversarial: Columns = MappingProxyType({})) -> dict[str, Tensor]:
    """Return the columns from which the verdict of a run is computed: the strongest result against each example, and as
    `adversarial.id` and `adversarial.x` the inputs `adversarial` that the run stores.
    """
    inputs = {f"adversarial.{name}": values for name, values in adversarial.items()}
    return {name: values for name, values in evidence.columns.items() if name in _WORST_CASE} | inputs


def about_of(
    manifest: Manifest, about: Mapping[str, Any], folder: Path | None, head: str | None
) -> dict[str, Any]:
    """Return the facts of a report that are not part of the evidence, such as digests, versions, hardware and the start
    time.
    """
    hashes = dict(manifest.digests) | ({} if head is None else {"chain": head})
    facts = {name: getattr(manifest, name) for name in ("verb", "versions", "hardware")}
    return {**facts, **about, "hashes": hashes, **({} if folder is None else {"folder": str(folder)})}
