"""Runs all stages of a measurement on all examples in memory, or one stage on one shard in a worker process.

A task contains all columns of earlier stages that it needs, so that it can run in another process.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from holdfast.attacks.protocol import Attack
from holdfast.core.batch import Batch
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.evidence import Columns, Evidence, Seconds, in_table
from holdfast.core.meter import Room
from holdfast.core.model import Classifier
from holdfast.core.outputs import Aim
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Mask
from holdfast.runs.harness.assembly import Context, due_examples, evidence_from, join, only_tested
from holdfast.runs.harness.kinds.attack import learned_for, with_learned
from holdfast.runs.harness.plan import Plan, members_of, refuse_unfitted, refuse_what_is_hidden
from holdfast.runs.harness.stage import Stage, Work, broken_by_suite
from holdfast.runs.harness.target import LOOKED_AT, PreparedModel, prepared

_TYPES = (torch.float32, torch.float64)  # attacks lose their steps to rounding in shorter types


def measure(
    model: Classifier,
    batches: Sequence[Batch],
    attacks: Sequence[Attack],
    threat: ThreatModel,
    *,
    seed: int = 0,
    batch_size: int = 256,
    fit: Batch | None = None,
) -> Evidence:
    """Run a list of attacks on the model and the examples in `batches`, and return the evidence."""
    return measure_plan(
        model, batches, Plan(members_of(attacks), threat, seed), batch_size=batch_size, fit=fit
    )


def measure_plan(
    model: Classifier,
    batches: Sequence[Batch],
    plan: Plan,
    *,
    batch_size: int = 256,
    fit: Batch | None = None,
) -> Evidence:
    """Run all attacks and other measurements of a plan on the model and the examples in `batches`, and return the
    evidence.

    `fit` are further examples, on which learned attacks are fitted. The model is measured in evaluation mode and
    restored afterwards. Raises `UsageError` if an attack needs more access than the threat model allows, or the inputs
    have less than single precision, and `TargetError` if there are no examples or the model cannot be measured.
    """
    if not sum(map(len, batches)):
        raise TargetError("there are no examples to measure; expected at least one")
    for batch in batches:
        if batch.x.dtype not in _TYPES:
            raise UsageError(
                f"inputs are {batch.x.dtype}, in which attacks lose their steps to rounding; give them as float32, and "
                "let the model cast them"
            )
    plan = refuse_what_is_hidden(plan, model.access)
    refuse_unfitted(plan, fit=fit is not None)
    first = next(batch for batch in batches if len(batch))
    with prepared(model, first.take(torch.arange(min(len(first), LOOKED_AT)))) as target:
        by_stage: dict[str, Columns] = {}
        seconds: dict[str, Seconds] = {}
        for stage in plan.stages():
            if stage.adaptive:  # no doubts are measured here that could require it
                continue
            cpu, wall = time.process_time(), time.perf_counter()
            if fit is not None and not stage.kind.sharded:
                work = Work(plan, target, (fit,), Room(batch_size), by_stage["clean"])
                by_stage[stage.name] = stage.kind.run(stage, work)
            else:
                by_stage[stage.name] = join(_shards(stage, plan, target, batches, by_stage, batch_size))
            seconds[stage.name] = Seconds(time.process_time() - cpu, time.perf_counter() - wall)
        outline, context = plan.outline(target.classes), Context(notes=target.notes, details=target.details)
        return evidence_from(outline, by_stage, seconds, context, randomised=target.randomised)


def _shards(
    stage: Stage,
    plan: Plan,
    target: PreparedModel,
    batches: Sequence[Batch],
    by_stage: Mapping[str, Columns],
    batch_size: int,
) -> list[Columns]:
    """Columns of one stage on each of the batches."""
    stage, shards, start = stage.kind.ready(stage, by_stage), [], 0
    due = due_examples(stage, plan, by_stage)
    is_clean = due is None
    broken = None if is_clean or stage.kind.in_suite else broken_by_suite(plan.stages(), by_stage)
    certified = only_tested(stage, plan, by_stage)
    for batch in batches:
        rows = slice(start, start + len(batch))
        clean = {} if is_clean else {name: values[rows] for name, values in by_stage["clean"].items()}
        masks = [None if mask is None else mask[rows] for mask in (due, broken, certified)]
        work = Work(plan, target, (batch,), Room(batch_size), clean, *masks)
        shards.append(stage.kind.run(stage, work))
        start += len(batch)
    return shards


@dataclass(frozen=True)
class ShardTask:
    """The work of a worker process on one shard: a stage, the range of its examples, and the columns of earlier stages
    that it needs.

    It does not contain the attack, which is in the plan that each worker process has.
    """

    stage: str
    """name of the stage in the plan"""
    shard: int
    start: int
    stop: int
    clean: Columns | None = None
    """columns of the clean stage for these examples; None for the clean stage itself"""
    chosen: Mask | None = None
    """mask of the examples that the stage is run on; None for the clean stage, which is run on all"""
    broken: Mask | None = None
    """mask of the examples that the suite has broken, for a pass outside the suite; None for an attack of the suite"""
    certified: Mask | None = None
    """mask of the certified examples; see `only_tested`"""
    aim: Aim = Aim()
    """how the stage treats a detector of the model"""
    learned: Tensor | None = None
    """perturbation that the attack has learned in an earlier stage; None if it is not learned"""


def task_of(
    stage: Stage,
    shard: int,
    rows: tuple[int, int],
    chosen: Mask | None,
    broken: Mask | None,
    certified: Mask | None,
    by_stage: Mapping[str, Columns],
) -> ShardTask:
    """Return the work of a stage on one shard in a form that can be pickled for a worker process.

    `chosen`, `broken` and `certified` are masks of the examples of the whole stage; see `ShardTask`. The columns of the
    task are copies, because a view of a tensor is pickled with the whole tensor.
    """
    start, stop = rows
    if chosen is None:
        return ShardTask(stage.name, shard, start, stop)
    return ShardTask(
        stage.name,
        shard,
        start,
        stop,
        shard_rows(by_stage["clean"], start, stop),
        chosen[start:stop].clone(),
        None if broken is None else broken[start:stop].clone(),
        None if certified is None else certified[start:stop].clone(),
        stage.aim,
        learned_for(stage, by_stage),
    )


def stage_of(task: ShardTask, plan: Plan) -> Stage:
    """Return the stage that a worker process runs for a task, with all values from earlier stages that its attack
    needs.
    """
    stage = next(stage for stage in plan.stages() if stage.name == task.stage)
    stage = replace(stage, aim=task.aim)
    return stage if task.learned is None else with_learned(stage, task.learned)


def shard_rows(columns: Columns, start: int, stop: int) -> dict[str, Tensor]:
    """Return a copy of the rows `start` to `stop` of all columns. Tables that do not have one row for each example are
    left out.
    """
    return {name: values[start:stop].clone() for name, values in columns.items() if not in_table(name)}
