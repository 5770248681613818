"""The core of the assess verb: runs attacks on the surviving examples and judges their results on the original model.

A measurement is a sequence of stages. A stage takes examples and the columns of earlier stages, and returns columns.
It is a pure function of these, the plan and the seed, so that a caller may store, resume or parallelise the work.
`measure` is the caller that keeps everything in memory.
"""

from holdfast.harness.assembly import Context, assemble, evidence_from, join, speaking
from holdfast.harness.carrying import paired, run_across
from holdfast.harness.detecting import on_detector
from holdfast.harness.fitting import run_fit
from holdfast.harness.measure import measure, measure_plan
from holdfast.harness.passes import FOUND, PROBE, Pass, Probes, passes, probe_passes, stage_passes
from holdfast.harness.plan import (
    Member,
    Outline,
    Plan,
    Stage,
    StageOutline,
    members_of,
    refuse_unfitted,
    refuse_what_is_hidden,
    settings,
)
from holdfast.harness.shards import ShardTask, shard_rows, stage_of, task_of
from holdfast.harness.stages import (
    judge_inputs,
    makers,
    ready_stage,
    run_clean,
    run_stage,
    unattacked,
)
from holdfast.harness.target import LOOKED_AT, Target, prepared
from holdfast.harness.waves import MATRIX_ROWS, broken_by_suite, due_examples

__all__ = [
    "FOUND",
    "LOOKED_AT",
    "MATRIX_ROWS",
    "PROBE",
    "Context",
    "Member",
    "Outline",
    "Pass",
    "Plan",
    "Probes",
    "ShardTask",
    "Stage",
    "StageOutline",
    "Target",
    "assemble",
    "broken_by_suite",
    "due_examples",
    "evidence_from",
    "join",
    "judge_inputs",
    "makers",
    "measure",
    "measure_plan",
    "members_of",
    "on_detector",
    "paired",
    "passes",
    "prepared",
    "probe_passes",
    "ready_stage",
    "refuse_unfitted",
    "refuse_what_is_hidden",
    "run_across",
    "run_clean",
    "run_fit",
    "run_stage",
    "settings",
    "shard_rows",
    "speaking",
    "stage_of",
    "stage_passes",
    "task_of",
    "unattacked",
]
