"""Runs the stages of an assessment: selects the examples of each stage, measures them in shards, and reports what was
left out when time ran out.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from holdfast.core.batch import Batch, Data
from holdfast.core.errors import TargetError
from holdfast.core.evidence import Columns
from holdfast.core.meter import purpose
from holdfast.core.pieces import Room
from holdfast.core.remedies import RESUME
from holdfast.core.types import Mask
from holdfast.io.remote.served_model import Served
from holdfast.runs.assess.preparation import model_digest, readied, refuse_batch, with_surrogates
from holdfast.runs.assess.request import Opening
from holdfast.runs.assess.result import counted, enumerated
from holdfast.runs.engine.executor import Measure, OutOfTime, Timed
from holdfast.runs.engine.run import Run, Shards
from holdfast.runs.harness.assembly import due_examples, join, only_tested
from holdfast.runs.harness.measure import ShardTask, shard_rows, stage_of, task_of
from holdfast.runs.harness.plan import Plan
from holdfast.runs.harness.stage import Outline, Stage, StageKind, Work, broken_by_suite
from holdfast.runs.harness.target import Target


@dataclass(frozen=True)
class ShardMeasure:
    """Callable that measures one shard of a stage and returns its columns."""

    plan: Plan
    target: Target
    data: Data
    device: torch.device
    served: Served | None = None
    """connection to the server of a served model; None for other models"""
    _last: dict[tuple[int, int], Batch] = field(default_factory=dict)

    def __call__(self, task: ShardTask, room: Room, until: float) -> Columns:
        """Return the columns of a task. Raises `OutOfTime` if the model is queried after the time `until`."""
        batch, clean = self.read(task.start, task.stop), task.clean is None
        if clean:
            bare, classes = self.target.bare, self.target.classes
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


def timed(target: Target, until: float) -> Target:
    """Add a time limit to the attacked models of an assessment: each raises `OutOfTime` if it is queried after the time
    `until`.
    """
    return replace(target, quick=Timed(target.quick, until), view=Timed(target.view, until))


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
    target: Target
    data: Data
    device: torch.device
    sets: Mapping[str, tuple[Batch, ...]] = field(default_factory=dict)
    """data sets for the stages that are not divided into shards, by the name of the kind of stage"""
    served: Served | None = None
    """connection to the server of a served model, which may charge for each row; None for other models"""

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

        def report(done: Mapping[int, Columns], more: int) -> None:
            finished = sum(len(columns["id"]) for columns in done.values())
            surviving, n = self._surviving(stage, done, left), len(self.data)
            self.run.report(stage.name, finished + more, n, surviving, finished if chosen is None else n)

        return Shards(
            filled,
            lambda shard: task_of(stage, shard, shards[shard], chosen, broken, certified, by_stage),
            join,
            report,
            timed=chosen is not None,  # the clean pass is always finished: nothing can be reported without it
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
