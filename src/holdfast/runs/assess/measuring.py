"""Runs the stages of an assessment, and the probes that test its doubts."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from holdfast.attacks.costs import Passes
from holdfast.attacks.parts.random_search import sample_rows
from holdfast.core.batch import Batch, Data, Lookup, without_missing
from holdfast.core.draws import Draws
from holdfast.core.errors import RESUME, HoldfastError, TargetError, TargetLost, TargetRefused
from holdfast.core.evidence import Columns, Cost, Doubt
from holdfast.core.meter import Room, in_pieces, in_room, purpose
from holdfast.core.model import Bounds, Model
from holdfast.core.names import enumerated
from holdfast.core.outputs import Aim
from holdfast.core.types import Ids, Inputs, Logits, Mask
from holdfast.doubts.probing import (
    JUDGED_AT_RANDOM,
    Allotment,
    Findings,
    allotted,
    as_allotted,
    conclude,
    counts,
    doubt_test,
    is_wanted,
    missed_by_suite,
    probe_rows,
    probes_for,
    rows_for,
    surviving_examples,
)
from holdfast.doubts.protocol import SAMPLE, MeasurementContext, Probe, Probed, probing_threat
from holdfast.doubts.protocol import Run as ProbeRun
from holdfast.io.data.data import concatenated
from holdfast.io.doctor import BETTER, FILLED, Finding, misfit, names_of_labels
from holdfast.io.remote.served_model import Served
from holdfast.runs.assess.preparation import model_digest, readied, refuse_batch, with_surrogates
from holdfast.runs.assess.request import Opening
from holdfast.runs.assess.result import counted
from holdfast.runs.documents.record import DOUBTS
from holdfast.runs.engine.run import Measure, OutOfTime, Run, Shards, Stopwatch, Timed
from holdfast.runs.harness.assembly import (
    FOUND,
    PROBE,
    Probes,
    assemble,
    due_examples,
    join,
    only_tested,
    probe_passes,
    stage_passes,
)
from holdfast.runs.harness.measure import ShardTask, shard_rows, stage_of, task_of
from holdfast.runs.harness.plan import Plan
from holdfast.runs.harness.stage import (
    Outline,
    Stage,
    StageKind,
    Work,
    broken_by_suite,
    gradients_vanish,
    outcomes,
    repeated_attacks,
    suite_columns,
)
from holdfast.runs.harness.target import PreparedModel, judge_inputs


@dataclass(frozen=True)
class ShardMeasure:
    """Callable that measures one shard of a stage and returns its columns."""

    plan: Plan
    target: PreparedModel
    data: Data
    device: torch.device
    served: Served | None = None
    """connection to the server of a served model; None for other models"""
    _last: dict[tuple[int, int], Batch] = field(default_factory=dict)

    def __call__(self, task: ShardTask, room: Room, until: float) -> Columns:
        """Return the columns of a task. Raises `OutOfTime` if the model is queried after the time `until`."""
        batch, clean = self.read(task.start, task.stop), task.clean is None
        if clean:
            bare, classes = self.target.original, self.target.classes
            limits, logits = (bare.bounds, classes, self.data.name), self.target.logits
            refuse_batch(batch, *limits, whole=self.data, remote=bare.remote, logits=logits)
        with purpose(task.stage, task.shard, "clean" if clean else "attacks"):
            target, stage = timed(self.target, until), stage_of(task, self.plan)
            work = Work(
                self.plan, target, (batch,), room, task.clean or {}, task.chosen, task.broken, task.certified
            )
            columns = stage.kind.run(stage, work)
            if self.served is not None and not clean:  # a rejected clean input has ended the run already
                self.served.confirm()
            return columns

    def read(self, start: int, stop: int) -> Batch:
        """Return the examples from `start` to `stop` - 1 on the device. The last range that was read is cached."""
        if (start, stop) not in self._last:
            self._last.clear()
            self._last[start, stop] = self.data.read(start, stop).to(self.device)
        return self._last[start, stop]


def timed(target: PreparedModel, until: float) -> PreparedModel:
    """Add a time limit to the attacked models of an assessment: each raises `OutOfTime` if it is queried after the time
    `until`.
    """
    return replace(target, optimised=Timed(target.optimised, until), view=Timed(target.view, until))


@dataclass(frozen=True)
class WorkerSetup:
    """Callable that opens the model and the data in a worker process, and checks their digests."""

    opening: Opening
    """function that opens the model, the data and the surrogates"""
    digests: Mapping[str, Any]
    """digests of the model, the data and the surrogates, with which what the worker opens is compared"""
    plan: Plan
    """the plan without surrogates, which the worker prepares itself"""
    device: str
    batch_size: int | None = None
    """largest number of examples in a forward pass; None if any is accepted"""

    @contextmanager
    def __call__(self) -> Iterator[Measure]:
        """Yield the function that measures shards. Raises `TargetError` if a digest differs from that of the run."""
        subject, data, surrogates = self.opening()
        device, adaptive = torch.device(self.device), bool(self.plan.adaptive)
        with (
            readied(subject, data, device, adaptive=adaptive, batch_size=self.batch_size) as (target, sample),
            ExitStack() as stack,
        ):
            plan = with_surrogates(self.plan, stack, surrogates, sample, target)
            digests = {
                "model": model_digest(subject, target),
                "data": data.digest,
                "surrogates": [surrogate.digest for surrogate in surrogates],
            }
            for what, expected in self.digests.items():
                if digests[what] != expected:
                    raise TargetError(f"the {what} changed while a worker opened it", RESUME)
            yield ShardMeasure(plan, target, data, device)


@dataclass(frozen=True)
class Measurement:
    """The state that all stages of an assessment share: the run, the plan, the models and the data."""

    run: Run
    plan: Plan
    target: PreparedModel
    data: Data
    device: torch.device
    sets: Mapping[str, tuple[Batch, ...]] = field(default_factory=dict)
    """data sets for the stages that are not divided into shards, by the name of the kind of stage"""
    served: Served | None = None
    """connection to the server of a served model, which may charge for each row; None for other models"""
    looks: bool = False
    """whether a stored shard may be that of an earlier look, at which its stage was run on other examples"""

    def stages(self, stages: Sequence[Stage], by_stage: dict[str, Columns]) -> tuple[str, ...]:
        """Measure the given stages and add their columns to `by_stage`. Return notes on what was left out when time ran
        out.
        """
        cut: list[CutShort] = []
        for stage in stages:
            if not stage.kind.sharded:
                stored = self.run.stage(stage.name, partial(self._whole, stage, by_stage))
            else:
                stored = self.run.sharded_stage(stage.name, partial(self._shards, stage, by_stage))
            columns = counted(stage.kind, stored, by_stage)
            if columns is not None:
                by_stage[stage.name] = columns
            if stored.reached is not None:
                cut.append(CutShort(attack_of(stage), stage.kind, len(stored.columns["id"])))
        return out_of_time(cut, len(self.data), self.plan)

    def _whole(self, stage: Stage, by_stage: Mapping[str, Columns]) -> Columns:
        """Columns of a stage without shards. After a kill, the whole stage is measured again."""
        sets = self.sets[stage.kind.name]
        left = int(self.surviving(by_stage).sum())
        self.run.report(stage.name, 0, len(sets[0]), left, len(self.data))
        target, room = timed(self.target, self.run.deadline), self.run.room(stage.name, 0)
        on_device = tuple(each.to(self.device) for each in sets)
        try:
            with purpose(stage.name, 0, "attacks"):
                columns = stage.kind.run(stage, Work(self.plan, target, on_device, room, by_stage["clean"]))
        except OutOfTime:
            self.confirm()  # the inputs that the server rejected so far are counted as well
            raise
        self.confirm()
        return columns

    def _shards(self, stage: Stage, by_stage: Mapping[str, Columns]) -> Shards:
        """The work of a stage with shards."""
        stage, shards = stage.kind.ready(stage, by_stage), self.run.shards
        chosen, broken, left = due_examples(stage, self.plan, by_stage), None, None
        certified = only_tested(stage, self.plan, by_stage)
        if chosen is not None:
            left = self.surviving(by_stage)
            broken = None if stage.kind.in_suite else broken_by_suite(self.plan.stages(), by_stage)

        def filled(shard: int) -> Columns | None:
            start, stop = shards[shard]
            if chosen is None or chosen[start:stop].any():
                return None
            return stage.kind.unattacked(stage, shard_rows(by_stage["clean"], start, stop))

        def current(shard: int, columns: Columns) -> bool:
            if chosen is None or not self.looks:
                return True
            start, stop = shards[shard]
            # an aim at a detector depends on all examples of a look
            return stage.aim == Aim() and torch.equal(columns["ran"], chosen[start:stop])

        plan = self.plan
        complete = plan.full or plan.smallest or plan.threat.constraint.judges_misclassified
        # in a complete plan these examples may not have survived before, and a deadline discards unfinished shards
        falls = stage.kind.in_suite and not complete and math.isinf(self.run.deadline)

        def report(done: Mapping[int, Columns], more: int, n_broken: int) -> None:
            finished = sum(len(columns["id"]) for columns in done.values())
            surviving, n = self._surviving(stage, done, left) - (n_broken if falls else 0), len(self.data)
            self.run.report(stage.name, finished + more, n, surviving, finished if chosen is None else n)

        return Shards(
            filled,
            lambda shard: task_of(stage, shard, shards[shard], chosen, broken, certified, by_stage),
            join,
            report,
            timed=chosen is not None,  # the clean pass is always finished: nothing can be reported without it
            current=current,
        )

    def _surviving(self, stage: Stage, done: Mapping[int, Columns], left: Mask | None) -> int:
        """Number of examples that no finished shard has broken, of those that were `left` before the stage.

        For the clean stage, which has none before it, the number of examples that are known to be correct.
        """
        if left is None:
            return sum(int(columns["correct"].sum()) for columns in done.values())
        if not stage.kind.in_suite:
            return int(left.sum())
        broken = 0
        for shard, columns in done.items():
            start, stop = self.run.shards[shard]
            broken += int((left[start:stop] & columns["success"]).sum())
        return int(left.sum()) - broken

    def surviving(self, by_stage: Mapping[str, Columns]) -> Mask:
        """Return the mask of the examples that no attack of the suite has broken."""
        clean = by_stage["clean"]
        return clean["correct"] & clean["eligible"] & ~broken_by_suite(self.plan.stages(), by_stage)

    def confirm(self) -> None:
        """Check that a server that rejected attacked inputs still accepts clean inputs. For models that are not behind
        a server, nothing is done.
        """
        if self.served is not None:
            self.served.confirm()


def attack_of(stage: Stage) -> str:
    """Return the name that the attack of a stage has in the suite, or that of its method of certification. For a stage
    without either, return the name of the stage.
    """
    if stage.prover is not None:
        return stage.prover.name
    return stage.name if stage.member is None else stage.member.name


def shards_of(n: int, size: int) -> tuple[tuple[int, int], ...]:
    """Return consecutive ranges (start, stop) of at most `size` rows that cover `n` rows."""
    return tuple((start, min(start + size, n)) for start in range(0, n, size))


@dataclass(frozen=True)
class CutShort:
    """A stage for which time ran out: the name of its attack or method, its kind, and the number of finished
    examples.
    """

    name: str
    kind: StageKind
    finished: int


def out_of_time(cut: Sequence[CutShort], of: int, plan: Plan | Outline) -> tuple[str, ...]:
    """Return notes for the report on the stages for which time ran out, with the number of their finished examples and
    the effect on the metrics.

    `cut` contains each of these stages, and `of` is the number of all examples. Of an attack with waves, the first
    unfinished one is reported.
    """
    by_name: dict[str, CutShort] = {}
    for stage in cut:
        if not stage.kind.of_attack:
            by_name.setdefault(stage.name, stage)
    attacks = [stage for stage in by_name.values() if stage.kind.in_suite]
    done = [
        f"{stage.name} finished {stage.finished:,} of {of:,} examples" for stage in attacks if stage.finished
    ]
    idle = [stage.name for stage in attacks if not stage.finished]
    if idle:
        done.append(f"{enumerated(idle)} finished none")
    notes = [f"time ran out: {', '.join(done)}; {_meaning(plan)}"] if attacks else []
    for stage in by_name.values():
        if stage.kind.proves:
            notes.append(
                f"time ran out: {stage.name} finished {stage.finished:,} of {of:,} examples; a longer run may certify "
                "more"
            )
        elif not stage.kind.in_suite:
            on = "its sample" if stage.kind.sampled else "every example"
            notes.append(
                f"time ran out: the pass of {stage.name} on {on} was not finished, so {stage.kind.lost} left out"
            )
    return tuple(notes)


def _meaning(plan: Plan | Outline) -> str:
    if plan.smallest:
        return "a longer run may find smaller changes, so the distances are upper bounds"
    if plan.threat.goal is not None:
        return "a longer run may break more, so the targeted success rate is a lower bound"
    return "a longer run may break more, so robust accuracy is an upper bound"


@dataclass
class PassCounter:
    """Wrapper of a model that counts its forward and backward passes."""

    model: Model
    forwards: int = 0
    backwards: int = 0

    @property
    def bounds(self) -> Bounds:
        """Valid range of the inputs of the model."""
        return self.model.bounds

    def __call__(self, x: Inputs, ids: Ids | None = None) -> Logits:
        """Return the logits of `x`, and count the passes."""
        self.forwards += len(x)
        logits = self.model(x, ids)
        if logits.requires_grad:
            logits.register_hook(lambda _: self._count_backward(len(x)))  # type: ignore[no-untyped-call]
        return logits

    def _count_backward(self, n: int) -> None:
        self.backwards += n


@dataclass(frozen=True)
class ProbeResults:
    """Results of the probes of an assessment: the doubts, the adversarial examples that were found, and the cost."""

    findings: Findings
    cost: Cost = field(default_factory=Cost)
    """number of passes; times are not included"""
    probes: Probes = ()
    """probes whose adversarial examples count towards robust accuracy"""
    found: Columns = field(default_factory=dict)
    """the adversarial examples of these probes, as the columns of the stage `FOUND`; empty if there are none"""


_FITTING = 1_000  # shard number for the batch splits of the doubt `input`, larger than those of the probes


def run_probes(
    measurement: Measurement, by_stage: Mapping[str, Columns], missed: Sequence[str], stopwatch: Stopwatch
) -> ProbeResults:
    """Run the probes that test the doubts of an assessment, and return their results. All earlier stages must be
    finished.

    If time ran out, no probe is run. `missed` are the notes on the unfinished stages.
    """
    plan, outline = measurement.plan, measurement.plan.outline(measurement.target.classes)
    broken_by = {passed.name: passed.columns["success"] for passed in stage_passes(outline, by_stage)}
    is_probability = by_stage["clean"]["is_probability"]
    columns = {**assemble(outline, by_stage), "is_probability": is_probability}
    if plan.doubts == "none":
        return ProbeResults(Findings((), missed_by_suite(columns, plan.threat, broken_by)))
    suite = plan.suite if plan.doubts == "all" else ""
    target = measurement.target
    of_suite, again = suite_columns(plan.stages(), by_stage), repeated_attacks(plan.stages(), by_stage)
    unclear = (
        target.randomised or plan.smallest or measurement.served is not None or gradients_vanish(of_suite)
    )
    context = MeasurementContext(
        plan.threat,
        suite,
        target.in_training,
        _first_gradients(of_suite),
        target.blind,
        target.randomised,
        access=target.original.access,
        classes=target.classes,
        outcomes=() if unclear else outcomes(plan.stages(), by_stage),
        repeated=tuple(again.values()),
        task=None if target.task is None else target.task.name,
    )
    counting_model = PassCounter(measurement.target.optimised)
    fitting, n_forwards = _input(measurement, columns)
    counting_model.forwards += n_forwards
    context = replace(context, input=fitting)
    if not suite or missed:
        findings = conclude({}, columns, context, broken_by)
        findings = _unfinished(findings, missed) if suite else findings
        return ProbeResults(findings, Cost(counting_model.forwards, 0, counting_model.forwards))
    possible = _probes(plan, columns, again)
    probes = tuple(probe for probe in possible if not (probe.settles and unclear))
    allotment = _allotment(measurement, columns, by_stage, probes)
    raising = dict[str, str]()
    needless = {probe.name for probe in possible if probe not in probes}
    probed = _probed(
        measurement, probes, context, counting_model, columns, stopwatch, allotment, raising, needless
    )
    counted_probes = tuple(
        (probe.name, 0 if probe.name in needless else len(probed[probe.name].rows))
        for probe in possible
        if (probe.name in needless or probe.name in probed) and counts(probe, plan.threat)
    )
    adversarial = _judged(measurement, columns, probed, counted_probes)
    judged = Cost(len(adversarial.get("id", ())) * (JUDGED_AT_RANDOM if target.randomised else 1))
    cost = Cost(counting_model.forwards, counting_model.backwards, counting_model.forwards) + judged
    by_probe = probe_passes(
        outline, {**by_stage, **({FOUND: adversarial} if adversarial else {})}, counted_probes
    )
    broken_by |= {passed.name: passed.columns["success"] for passed in by_probe}
    findings = _without_raising(conclude(probed, columns, context, broken_by), raising)
    if allotment is not None:
        findings = replace(findings, doubts=as_allotted(findings.doubts, allotment))
    return ProbeResults(findings, cost, counted_probes, adversarial)


def _without_raising(findings: Findings, raising: Mapping[str, str]) -> Findings:
    """The findings with the reason for doubts that were not measured because the model raised an error."""

    def updated(doubt: Doubt) -> Doubt:
        errors = [raising[probe.name] for probe in doubt_test(doubt.name).probes if probe.name in raising]
        if doubt.state != "not measured" or not errors:
            return doubt
        return replace(doubt, message=f"the model raised an error for an input of its probe: {errors[0]}")

    return replace(findings, doubts=tuple(map(updated, findings.doubts)))


def _allotment(
    measurement: Measurement, columns: Columns, by_stage: Mapping[str, Columns], possible: Sequence[Probe]
) -> Allotment | None:
    """Number of examples for each probe on a served model, within the rows of the suite; None for other models."""
    if measurement.served is None:
        return None
    plan, rng = measurement.plan, Draws(measurement.plan.seed).at("stage", DOUBTS)
    within = probing_threat(plan.threat, columns)
    probes = {probe.name: probe for probe in possible}
    n_by_probe = {name: len(rows_for(probe, columns, plan.threat, rng)) for name, probe in probes.items()}
    passes = Passes(measurement.run.room(DOUBTS, 0).size, measurement.target.original.batches)

    def cost(name: str, n: int) -> int | None:
        return probe_rows(probes[name], within, n, passes, randomised=measurement.target.randomised)

    judged = JUDGED_AT_RANDOM if measurement.target.randomised else 1
    suite = suite_columns(plan.stages(), by_stage).values()
    budget = sum(
        int(stage_columns["queries"].sum()) + judged * int(stage_columns["ran"].sum())
        for stage_columns in suite
    )
    return allotted(n_by_probe, budget, cost)


def _input(measurement: Measurement, columns: Columns) -> tuple[Doubt, int]:
    """The doubt whether the data fit the model, measured on a sample, and the number of forward passes."""
    if measurement.served is not None:
        message = "a served model is not queried for it; run holdfast doctor"
        return Doubt("input", "not measured", message=message), 0
    rng, all_examples = Draws(measurement.plan.seed).at("stage", DOUBTS), torch.ones_like(columns["correct"])
    rows = sample_rows(columns, all_examples, rng.at("input"), SAMPLE)
    batch = concatenated([measurement.data.read(row, row + 1) for row in rows.tolist()]).to(
        measurement.device
    )
    with measurement.target.repeatable(rng.at("input")):
        finding, n_forwards = _misfit(measurement, batch)
    if finding is None:
        properties = "value range, normalisation, layout or numbering of the labels"
        message = f"no other {properties} fits the model better"
        return Doubt("input", "clear", 0.0, BETTER, len(batch), message), n_forwards
    statistic, threshold = (None, FILLED) if finding.gain is None else (finding.gain, BETTER)
    message = f"{finding.message}: {finding.on_command_line()}"
    return Doubt("input", "raised", statistic, threshold, len(batch), message), n_forwards


def _misfit(measurement: Measurement, batch: Batch) -> tuple[Finding | None, int]:
    """Test whether the data do not fit the model, in smaller batches if memory runs out."""
    room = measurement.run.room(DOUBTS, _FITTING)
    names = names_of_labels(measurement.data)
    model, domain = measurement.target.original, measurement.plan.threat.constraint.domain
    return in_room(lambda size: misfit(model, batch, size, names, domain), room, 0, len(batch))


def _probes(plan: Plan, columns: Columns, again: Iterable[int]) -> tuple[Probe, ...]:
    """The probes that the threat model allows. The fresh pass repeats the attacks with the places `again`."""
    attacks = {place: plan.members[place].attack for place in again}
    return probes_for(probing_threat(plan.threat, columns), attacks)


def _judged(
    measurement: Measurement, columns: Columns, probed: Mapping[str, Probed], counting: Probes
) -> dict[str, Tensor]:
    """Judge, on the target model, inputs by which probes broke examples that survive the suite."""
    plan, rng = measurement.plan, Draws(measurement.plan.seed).at("stage", FOUND)
    surviving, rows_of = surviving_examples(columns, plan.threat), []
    for place, (name, tried) in enumerate(counting):
        if not tried:
            continue
        rows = probed[name].rows
        positions = (probed[name].columns["broken"] & surviving[rows]).nonzero()[:, 0]
        if not len(positions):
            continue
        x_adv = probed[name].columns["x"][positions]
        batch = concatenated([measurement.data.read(row, row + 1) for row in rows[positions].tolist()])
        inputs = Lookup(batch.ids)

        def work(
            piece: Batch, x_adv: Tensor = x_adv, inputs: Lookup = inputs, place: int = place, name: str = name
        ) -> dict[str, Tensor]:
            x = x_adv[inputs.rows(piece.ids.cpu())].to(piece.x.device)
            judged_columns = judge_inputs(plan, measurement.target, piece, x, rng.at(name))
            marks = [prefix for prefix in ("", "gallery.", "adversarial.") if f"{prefix}id" in judged_columns]
            return judged_columns | {
                f"{prefix}{PROBE}": torch.full_like(judged_columns[f"{prefix}id"], place) for prefix in marks
            }

        room = measurement.run.room(DOUBTS, len(probed) + place)
        rows_of.append(in_pieces(work, batch.to(measurement.device), room))
    return (
        {name: torch.cat([judged_columns[name] for judged_columns in rows_of]) for name in rows_of[0]}
        if rows_of
        else {}
    )


def _first_gradients(suite: Mapping[str, Columns]) -> Mask | None:
    """Which gradients were zero in the first pass of the first gradient attack; None if no attack used gradients."""
    for columns in suite.values():
        measured = columns["dead"] | (columns["backwards"] > 0)
        if measured.any():
            return columns["dead"][measured]
    return None


def _probed(
    measurement: Measurement,
    probes: Sequence[Probe],
    context: MeasurementContext,
    model: Model,
    columns: Columns,
    stopwatch: Stopwatch,
    allotment: Allotment | None,
    raising: dict[str, str],
    needless: set[str],
) -> dict[str, Probed]:
    """Results of the probes whose doubts the suite and the probes before them leave open.

    A probe with inputs outside the threat model for which the model's own code raises an error is left out, and the
    error is added to `raising` under its name. The name of a probe that cannot change the result, because its doubts
    are settled or there is no example for it, is added to `needless`.
    """
    plan, rng = measurement.plan, Draws(measurement.plan.seed).at("stage", DOUBTS)
    within = probing_threat(plan.threat, columns)
    n_surviving = int((columns["correct"] & ~columns["success"]).sum())
    examples: dict[tuple[str, int], Batch] = {}
    results: dict[str, Probed] = {}
    for place, probe in enumerate(probes):
        if not is_wanted(probe, results, columns, context):
            needless.add(probe.name)
            continue
        measurement.run.report(DOUBTS, place, len(probes), n_surviving, len(measurement.data))
        limit = None if allotment is None else allotment.examples.get(probe.name, 0)
        rows = rows_for(probe, columns, plan.threat, rng, limit)
        if not len(rows):
            if limit != 0:
                needless.add(probe.name)
            continue
        key = probe.on, len(rows)
        if key not in examples:  # read one by one, since a whole shard of large images is slower to decode
            examples_of_probe = concatenated([measurement.data.read(row, row + 1) for row in rows.tolist()])
            examples[key] = examples_of_probe.to(measurement.device)
        batch = examples[key]

        run_probe = probe.voted if probe.voted is not None and measurement.target.randomised else probe.run

        def run(piece: Batch, probe: Probe = probe, run_probe: ProbeRun = run_probe) -> dict[str, Tensor]:
            if within.goal is not None:
                piece = piece.towards(torch.full_like(piece.y, within.goal))
            probed_model = measurement.target.queried(model, piece, errors=True)
            piece = without_missing(piece, model.bounds)
            with measurement.target.repeatable(rng.at(probe.name, int(piece.ids[0]))):
                return {
                    name: values.cpu() for name, values in run_probe(probed_model, piece, within, rng).items()
                }

        try:
            results[probe.name] = Probed(rows, in_pieces(run, batch, measurement.run.room(DOUBTS, place)))
        except TargetError as error:
            own = isinstance(error.__cause__, Exception) and not isinstance(error.__cause__, HoldfastError)
            if probe.breaks or not own or isinstance(error, (TargetLost, TargetRefused)):
                raise  # only an error of the model's own code may come from the inputs of the probe
            raising[probe.name] = f"{type(error.__cause__).__name__}: {error.__cause__}"
            continue
        stopwatch.tick()
    return results


def _unfinished(findings: Findings, missed: Sequence[str]) -> Findings:
    """The findings of a run in which time ran out before the probes."""

    def updated(doubt: Doubt) -> Doubt:
        if doubt.name == "not-exhausted":
            return replace(doubt, state="raised", message=missed[0])
        if doubt.state == "not measured":
            return replace(doubt, message="time ran out before it was measured")
        return doubt

    return replace(findings, doubts=tuple(updated(doubt) for doubt in findings.doubts))
