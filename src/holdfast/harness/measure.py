"""Runs all stages on all examples in memory."""

import time
from collections.abc import Mapping, Sequence

import torch

from holdfast.attacks.protocol import Attack
from holdfast.core.batch import Batch
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.evidence import Columns, Evidence, Seconds
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.harness.assembly import Context, evidence_from, join
from holdfast.harness.fitting import run_fit
from holdfast.harness.plan import Plan, Stage, members_of, refuse_unfitted, refuse_what_is_hidden
from holdfast.harness.stages import ready_stage, run_clean, run_stage
from holdfast.harness.target import LOOKED_AT, Target, prepared
from holdfast.harness.waves import broken_by_suite, due_examples
from holdfast.ops.pieces import Room

_TYPES = (torch.float32, torch.float64)


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
    """Evidence of a list of attacks on `model`: see `measure_plan`."""
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
    """Return the evidence of a plan on `model` and some batches, whose ids must be distinct.

    `fit` are other examples, for learned attacks. The model is measured in eval mode and restored afterwards. Raises
    `UsageError` if an attack needs more access than the threat model allows, or inputs have less than single
    precision, and `TargetError` if there are no examples or the model is unusable.
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
            if stage.kind == "fit" and fit is not None:
                by_stage[stage.name] = run_fit(stage, plan, target, fit, by_stage["clean"])
            else:
                shards = _shards(ready_stage(stage, by_stage), plan, target, batches, by_stage, batch_size)
                by_stage[stage.name] = join(shards)
            seconds[stage.name] = Seconds(time.process_time() - cpu, time.perf_counter() - wall)
        outline, context = plan.outline(target.classes), Context(notes=target.notes)
        return evidence_from(outline, by_stage, seconds, context, randomised=target.randomised)


def _shards(
    stage: Stage,
    plan: Plan,
    target: Target,
    batches: Sequence[Batch],
    by_stage: Mapping[str, Columns],
    batch_size: int,
) -> list[Columns]:
    """Columns of one stage on each of the batches."""
    if stage.kind == "clean":
        return [run_clean(plan, target, batch, Room(batch_size)) for batch in batches]
    chosen, shards, start = due_examples(stage, plan, by_stage), [], 0
    gone = broken_by_suite(by_stage) if stage.kind != "attack" else None
    for batch in batches:
        rows = slice(start, start + len(batch))
        clean = {name: values[rows] for name, values in by_stage["clean"].items()}
        known = None if gone is None else gone[rows]
        shards.append(run_stage(stage, plan, target, batch, clean, chosen[rows], Room(batch_size), known))
        start += len(batch)
    return shards
