"""The work of one stage on one shard: a task, which contains all columns of earlier stages that it needs."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from holdfast.core.evidence import Columns, in_table
from holdfast.core.guard import Aim
from holdfast.core.types import Mask
from holdfast.harness.kinds.attack import learned_for, with_learned
from holdfast.harness.plan import Plan
from holdfast.harness.stage import Stage


@dataclass(frozen=True)
class ShardTask:
    """A stage on the examples `start` to `stop`, with the columns of earlier stages that it needs.

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
    by_stage: Mapping[str, Columns],
) -> ShardTask:
    """Return the task of a stage on one shard. The stage is one that `StageKind.ready` returned.

    `chosen` are the examples of the whole stage, and `broken` those that the suite has broken; see `ShardTask`. The
    columns of the task are copies, because a view of a tensor is pickled with the whole tensor.
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
        stage.aim,
        learned_for(stage, by_stage),
    )


def stage_of(task: ShardTask, plan: Plan) -> Stage:
    """Return the stage of a task, ready to run."""
    stage = next(stage for stage in plan.stages() if stage.name == task.stage)
    stage = replace(stage, aim=task.aim)
    return stage if task.learned is None else with_learned(stage, task.learned)


def shard_rows(columns: Columns, start: int, stop: int) -> dict[str, Tensor]:
    """Return a copy of the rows `start` to `stop` of those columns that have one row for each example."""
    return {name: values[start:stop].clone() for name, values in columns.items() if not in_table(name)}
