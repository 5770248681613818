"""Measurement of robustness: runs attacks on the surviving examples, and judges their results with the original model.

A measurement is a sequence of stages. A stage takes examples and the columns of earlier stages, and returns columns.
Its result depends only on these, the plan and the seed, so that a caller may store, resume or parallelise the work.
`measure` is a caller that keeps everything in memory.
"""

from holdfast.runs.harness.assembly import (
    FOUND,
    PROBE,
    Context,
    Pass,
    Probes,
    assemble,
    due_examples,
    evidence_from,
    join,
    only_tested,
    passes,
    probe_passes,
    stage_passes,
    worst_rows,
)
from holdfast.runs.harness.kinds import KINDS
from holdfast.runs.harness.kinds.proof import prepared_prover
from holdfast.runs.harness.kinds.transfers import MATRIX_ROWS, paired
from holdfast.runs.harness.measure import ShardTask, measure, measure_plan, shard_rows, stage_of, task_of
from holdfast.runs.harness.plan import (
    Plan,
    members_of,
    on_detector,
    refuse_unfitted,
    refuse_what_is_hidden,
    settings,
    within_budget,
)
from holdfast.runs.harness.stage import (
    Member,
    Outline,
    Stage,
    StageKind,
    StageOutline,
    Work,
    broken_by_suite,
    certified_in,
    suite_columns,
)
from holdfast.runs.harness.target import LOOKED_AT, Target, prepared
from holdfast.runs.harness.verdict import judge_inputs, unattacked

__all__ = [
    "FOUND",
    "KINDS",
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
    "StageKind",
    "StageOutline",
    "Target",
    "Work",
    "assemble",
    "broken_by_suite",
    "certified_in",
    "due_examples",
    "evidence_from",
    "join",
    "judge_inputs",
    "measure",
    "measure_plan",
    "members_of",
    "on_detector",
    "only_tested",
    "paired",
    "passes",
    "prepared",
    "prepared_prover",
    "probe_passes",
    "refuse_unfitted",
    "refuse_what_is_hidden",
    "settings",
    "shard_rows",
    "stage_of",
    "stage_passes",
    "suite_columns",
    "task_of",
    "unattacked",
    "within_budget",
    "worst_rows",
]
