"""Tests whether gates can be judged on a plan, on synthetic evidence of a few examples, before the run."""

from collections.abc import Mapping, Sequence

import torch

from holdfast.core.batch import Batch
from holdfast.core.evidence import Columns, Evidence
from holdfast.core.threat import ThreatModel
from holdfast.gates.grammar import Claim
from holdfast.gates.judging import Doubts, judge, refuse_rotation
from holdfast.harness import Context, Plan, Room, Stage, Target, conclude, makers, run_clean, unattacked


def refuse_gates(claims: Sequence[Claim], plan: Plan, target: Target, sample: Batch) -> None:
    """Raise `UsageError` for a gate whose metric the plan does not measure; the message says what would.

    Gates against a baseline are not tested: the common examples are known only at the end.
    """
    for claim in claims:
        refuse_rotation(claim)
    alone = [claim for claim in claims if claim.versus is None]
    if not alone:
        return
    evidence = _as_if_broken(plan, target, sample)
    for claim in alone:
        judge(claim, evidence, Doubts())


def _as_if_broken(plan: Plan, target: Target, sample: Batch) -> Evidence:
    """Evidence with every column of the plan, in which the last attack breaks all correct examples."""
    by_stage: dict[str, Columns] = {}
    for stage in plan.stages():
        if stage.kind == "clean":
            by_stage[stage.name] = run_clean(plan, target, sample, Room(len(sample)))
        else:
            by_stage[stage.name] = _made_up(stage, by_stage["clean"])
    if "transfer" in by_stage:
        by_stage["transfer"] = {**by_stage["transfer"], **_turned(by_stage["clean"], plan.threat, target)}
    outline = plan.outline(target.classes)
    return conclude(outline, by_stage, {}, Context(), randomised=target.randomised)


def _made_up(stage: Stage, clean: Columns) -> Mapping[str, torch.Tensor]:
    alone = unattacked(clean, stage.kind)
    if stage.kind == "attacked":
        return {**alone, **{name: values for name, values in clean.items() if name != "correct"}}
    near = {
        name: torch.zeros_like(values)
        for name, values in alone.items()
        if name.startswith("distance") or name == "score"
    }
    return {**alone, **near, "success": clean["correct"].clone()}


def _turned(clean: Columns, threat: ThreatModel, target: Target) -> dict[str, torch.Tensor]:
    """Columns of a transfer matrix in which all models agree with this one and every example breaks all of them."""
    models, right = 1 + len(threat.surrogates), clean["correct"][:, None]
    wrong = right[:, None].expand(-1, len(makers(target.quick, threat)), models)
    return {"transfer.id": clean["id"], "transfer.right": right.expand(-1, models), "transfer.wrong": wrong}
