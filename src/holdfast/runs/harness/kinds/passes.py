"""Attacks outside the suite that are run on every example: a fixed PGD attack, and minimum-norm attacks for accuracy as
a function of eps.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from holdfast.attacks.parts.ascent import flat
from holdfast.attacks.parts.losses import cross_entropy
from holdfast.attacks.pgd import PGD
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.evidence import Columns
from holdfast.core.meter import margin
from holdfast.core.names import slug
from holdfast.core.pieces import Pieces
from holdfast.core.refused import for_label
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Ids, Mask
from holdfast.runs.harness.kinds.attack import AttackKind, unlimited
from holdfast.runs.harness.stage import Member, Outline, Schedule, Stage, Work
from holdfast.runs.harness.verdict import aimed, cost_columns, returned, stored_inputs, verdict_of

if TYPE_CHECKING:
    from holdfast.runs.harness.plan import Plan

FIXED = Member("PGD-40", PGD(steps=40, reach=2.5, loss=cross_entropy, schedule=flat, drop=False))
"""Attack of the fixed pass. It runs on every example, so its result does not depend on the order of the suite."""
_DRAWS = "attacked"
"""Name of the random draws of the fixed pass, which decides its results."""


class FixedPass(AttackKind):
    """Kind of stage that runs PGD with 40 steps on every example. Entropy, margin, F1 and calibration under attack are
    computed from its results.
    """

    name = "fixed-pgd"
    named = "fixed-pgd"
    title = "the fixed {} pass"
    listed = "fixed pass"
    lost = "entropy, margin, precision and calibration under attack are"

    def stages(self, plan: "Plan") -> list[Stage]:
        """Return the stage of the fixed PGD attack, if the plan contains it and the threat model permits gradients."""
        return [Stage(self.name, self, FIXED)] if plan.attacked and plan.threat.gives("gradients") else []

    def due(self, stage: Stage, plan: Schedule, by_stage: Mapping[str, Columns]) -> Mask:
        """Return a mask that contains all examples, because the fixed PGD attack is run on every example."""
        return torch.ones_like(by_stage["clean"]["correct"])

    def run(self, stage: Stage, work: Work) -> Columns:
        """Run the fixed PGD attack on all examples of a shard, and return its columns."""
        batch, rng = work.batch, Draws(work.plan.seed).at("stage", _DRAWS)
        missed = batch.ids if work.broken is None else batch.ids[~work.broken.to(batch.ids.device)]
        pieces = Pieces(batch, work.room)
        for piece in pieces:
            with pieces.attempt():
                pieces.add(self.piece(stage, work, piece, rng, missed))
        return pieces.columns()

    def piece(self, stage: Stage, work: Work, batch: Batch, rng: Draws, missed: Ids) -> dict[str, Tensor]:
        """Run the fixed PGD attack on one batch, and return as columns the judgement of its inputs, their class
        probabilities and the cost.
        """
        plan, target = work.plan, work.target
        batch = aimed(batch, plan.threat)
        with target.repeatable(rng.at(int(batch.ids[0]))):
            x_adv, spent = returned(stage.attack, plan.threat, target, batch, rng)
            logits, columns = verdict_of(plan, target, batch, x_adv)
        probabilities = for_label(logits[:, : target.classes], batch.y).softmax(1)
        columns |= {
            "confidence": probabilities.amax(1),
            "entropy": torch.special.entr(probabilities).sum(1),
            "probability_margin": margin(probabilities, batch.towards(None)),
            **cost_columns(spent),
            **stored_inputs(plan, batch, x_adv, columns["success"], missed),
        }
        return {name: values.cpu() for name, values in columns.items()}

    def as_if_broken(self, stage: Stage, work: Work) -> Columns:
        """Return columns with the results for clean inputs instead of those for attacked ones. They serve to check
        gates before a run.
        """
        clean = {name: values for name, values in work.clean.items() if name != "correct"}
        return {**self.columns(work.clean), **clean}

    def evidence(
        self, outline: Outline, by_stage: Mapping[str, Columns], worst: Columns
    ) -> Mapping[str, Tensor]:
        """Return the columns that the fixed PGD attack adds to the evidence: predictions, confidences, entropies and
        margins of the attacked inputs.
        """
        if self.name not in by_stage:
            return {}
        names = ("prediction", "confidence", "entropy", "probability_margin")
        return {f"attacked_{name}": by_stage[self.name][name] for name in names}


class CurvePass(AttackKind):
    """Kind of stage that runs minimum-norm attacks on every correct example, from which accuracy as a function of eps
    is computed.
    """

    name = "curve"
    named = r"curve-\d+-.*"
    title = "{} of the eps curve"
    listed = "curve"
    lost = "its distances are"
    smallest = True

    def stages(self, plan: "Plan") -> list[Stage]:
        """Return one stage for each minimum-norm attack from which accuracy as a function of eps is computed."""
        return [Stage(f"curve-{k}-{slug(m.name)}", self, m) for k, m in enumerate(plan.curve, 1)]

    def due(self, stage: Stage, plan: Schedule, by_stage: Mapping[str, Columns]) -> Mask:
        """Return the mask of the correctly classified examples, on which the smallest change is searched for."""
        return by_stage["clean"]["correct"] & by_stage["clean"]["eligible"]

    def threat(self, plan: "Plan") -> ThreatModel:
        """Return the threat model of the plan without a limit on the size of changes, because the smallest change is
        searched for.
        """
        return unlimited(plan.threat)
