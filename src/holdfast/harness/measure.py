"""`measure`: all stages on all examples, in memory."""

import time
from collections.abc import Sequence

import torch

from holdfast.attacks.protocol import Attack
from holdfast.core.batch import Batch
from holdfast.core.errors import TargetError
from holdfast.core.evidence import Columns, Evidence
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.harness.assembly import Context, Seconds, conclude, join
from holdfast.harness.plan import Plan, labelled, refuse_what_is_hidden
from holdfast.harness.stages import Room, run_stage
from holdfast.harness.target import LOOKED_AT, prepared


def measure(
    model: Classifier,
    batches: Sequence[Batch],
    attacks: Sequence[Attack],
    threat: ThreatModel,
    *,
    seed: int = 0,
    batch_size: int = 256,
) -> Evidence:
    """What a list of attacks does to `model` on some batches, whose ids must differ.

    The model is measured in eval mode and comes back as it was. Raises `UsageError` when an attack needs more access
    than the threat model allows, `TargetError` when there is nothing to measure or the model is unusable.
    """
    if not sum(map(len, batches)):
        raise TargetError("there are no examples to measure; expected at least one")
    plan = refuse_what_is_hidden(Plan(labelled(attacks), threat, seed), model.access)
    first = next(batch for batch in batches if len(batch))
    with prepared(model, first.take(torch.arange(min(len(first), LOOKED_AT)))) as target:
        shards: list[dict[str, Columns]] = [{} for _ in batches]
        seconds: dict[str, Seconds] = {}
        for stage in plan.stages():
            cpu, wall = time.process_time(), time.perf_counter()
            for batch, prior in zip(batches, shards, strict=True):
                prior[stage.name] = run_stage(stage, plan, target, batch, prior, Room(batch_size))
            seconds[stage.name] = Seconds(time.process_time() - cpu, time.perf_counter() - wall)
        by_stage = {stage.name: join([prior[stage.name] for prior in shards]) for stage in plan.stages()}
        outline, context = plan.outline(target.classes), Context(notes=target.notes)
        return conclude(outline, by_stage, seconds, context, randomised=target.randomised)
