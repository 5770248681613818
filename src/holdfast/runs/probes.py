"""The doubts' probes: run between two stages, in pieces that fit, and counted apart from the attacks."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.evidence import Columns, Cost, Doubt
from holdfast.core.model import Bounds, Model
from holdfast.core.types import Ids, Inputs, Logits, Mask
from holdfast.doubts.concluding import Circumstances, Findings, broken_elsewhere, conclude
from holdfast.doubts.probing import Probe, Probed, Run, probes_for, probing_threat, rows_for
from holdfast.harness import assemble, in_pieces
from holdfast.runs.assembling import DOUBTS
from holdfast.runs.course import Course, Watch
from holdfast.runs.selection import gathered

ON_DETECTOR = "the passes on the detector"
"""What is said to have broken an example that stood where one of them did."""


@dataclass
class Counted:
    """A model that counts what is asked of it."""

    model: Model
    forwards: int = 0
    backwards: int = 0

    @property
    def bounds(self) -> Bounds:
        """The box of the model underneath."""
        return self.model.bounds

    def __call__(self, x: Inputs, ids: Ids | None = None) -> Logits:
        """Logits of `x`."""
        self.forwards += len(x)
        logits = self.model(x, ids)
        if logits.requires_grad:
            logits.register_hook(lambda _: self._book(len(x)))  # type: ignore[no-untyped-call]
        return logits

    def _book(self, n: int) -> None:
        self.backwards += n


@dataclass(frozen=True)
class Asked:
    """What the probes said, and what they asked of the model."""

    findings: Findings
    cost: Cost = field(default_factory=Cost)
    """without times"""


def ask(course: Course, by_stage: Mapping[str, Columns], missed: Sequence[str], watch: Watch) -> Asked:
    """The doubts that the plan wants, measured after everything else: over all shards, at a barrier.

    Where time ran out nothing is probed, and `missed` says what the suite did not do.
    """
    plan, passes = course.plan, _passes(course, by_stage)
    is_probability = by_stage["clean"]["is_probability"]
    columns = {**assemble(plan.outline(course.target.classes), by_stage), "is_probability": is_probability}
    if plan.doubts == "none":
        return Asked(Findings((), broken_elsewhere({}, columns, plan.threat, passes)))
    wanted = plan.suite if plan.doubts == "all" else ""
    target = course.target
    circumstances = Circumstances(
        plan.threat,
        wanted,
        target.in_training,
        _first_gradients(by_stage),
        target.blind,
        target.randomised,
    )
    if not wanted:
        return Asked(conclude({}, columns, circumstances, passes))
    if missed:
        return Asked(_unfinished(conclude({}, columns, circumstances, passes), missed))
    counted = Counted(course.target.quick)
    found = dict(_probed(course, counted, columns, watch))
    cost = Cost(counted.forwards, counted.backwards, counted.forwards)
    return Asked(conclude(found, columns, circumstances, passes), cost)


def _passes(course: Course, by_stage: Mapping[str, Columns]) -> dict[str, Mask]:
    """What passes that are in no verdict broke inside the threat model: fixed ones, the curve's, the transfer matrix.

    All but the curve's look once, which proves nothing of a randomised model; nor does what takes more than the budget.
    """
    broke, budget = {}, course.plan.threat.queries
    for stage in course.plan.stages():
        if stage.name not in by_stage or stage.kind not in ("curve", "attacked", "detection", "transfer"):
            continue
        columns = by_stage[stage.name]
        fell = _turned(columns) if stage.kind == "transfer" else columns["success"]
        if budget is not None:
            fell = fell & (columns["queries"] <= budget)
        if stage.kind == "curve" and stage.member is not None:
            broke[f"{stage.member.name} of the curve"] = fell
        elif course.target.randomised:
            continue
        elif stage.kind == "attacked":
            broke["the fixed pass"] = fell
        elif stage.kind == "transfer":
            broke["the transfer matrix"] = fell
        elif stage.kind == "detection":
            broke[ON_DETECTOR] = broke.get(ON_DETECTOR, torch.zeros_like(fell)) | fell
    return broke


def _turned(columns: Columns) -> Mask:
    """Which examples of the transfer matrix turned the target, whoever they were made on."""
    fell = torch.zeros_like(columns["ran"])
    if "transfer.wrong" in columns:
        fell[columns["ran"]] = columns["transfer.wrong"][:, :, 0].any(1)
    return fell


def _first_gradients(by_stage: Mapping[str, Columns]) -> Mask | None:
    """Whose gradient was dead in the first pass of the first attack that asked for one; None if none did."""
    for name, columns in by_stage.items():
        if name[0].isdigit():
            asked = columns["dead"] | (columns["backwards"] > 0)
            if asked.any():
                return columns["dead"][asked]
    return None


def _probed(course: Course, model: Model, columns: Columns, watch: Watch) -> Iterator[tuple[str, Probed]]:
    plan, rng = course.plan, Draws(course.plan.seed).at("stage", DOUBTS)
    within = probing_threat(plan.threat, columns)
    probes = probes_for(within, tuple(member.attack for member in plan.members))
    standing = int((columns["correct"] & ~columns["success"]).sum())
    examples: dict[str, Batch] = {}
    for place, probe in enumerate(probes):
        course.tell(DOUBTS, place, len(probes), standing, len(course.data))
        rows = rows_for(probe, columns, plan.threat, rng)
        if not len(rows):
            continue
        if probe.on not in examples:  # one by one: a shard of large pictures costs more to decode
            few = gathered([course.data.read(row, row + 1) for row in rows.tolist()])
            examples[probe.on] = few.to(course.device)
        batch = examples[probe.on]

        look = probe.voted if probe.voted is not None and course.target.randomised else probe.run

        def run(piece: Batch, probe: Probe = probe, look: Run = look) -> dict[str, Tensor]:
            if within.goal is not None:
                piece = piece.towards(torch.full_like(piece.y, within.goal))
            asked = course.target.asked(model, piece)
            with course.target.repeatable(rng.at(probe.name, int(piece.ids[0]))):
                return {name: values.cpu() for name, values in look(asked, piece, within, rng).items()}

        yield probe.name, Probed(rows, in_pieces(run, batch, course.room(DOUBTS, place)))
        watch.tick()


def _unfinished(findings: Findings, missed: Sequence[str]) -> Findings:
    """What is left of the doubts when there was no time to look."""

    def said(doubt: Doubt) -> Doubt:
        if doubt.name == "not-exhausted":
            return replace(doubt, state="raised", says=missed[0])
        if doubt.state == "not measured":
            return replace(doubt, says="time ran out before it was measured")
        return doubt

    return replace(findings, doubts=tuple(said(doubt) for doubt in findings.doubts))
