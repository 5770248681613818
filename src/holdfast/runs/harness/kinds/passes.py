"""Stages on every example: the clean inputs, fixed attacks outside the suite, and those on a detector."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from holdfast.attacks.parts.ascent import flat
from holdfast.attacks.parts.losses import cross_entropy
from holdfast.attacks.pgd import PGD, margin_pgd
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.evidence import Columns, Cost
from holdfast.core.guard import Aim, score
from holdfast.core.meter import Spent, for_label, margin
from holdfast.core.names import slug
from holdfast.core.pieces import Pieces, in_pieces
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Logits, Mask, PerExample
from holdfast.doubts.answering import EVEN
from holdfast.runs.harness.kinds.attack import AttackKind, unlimited
from holdfast.runs.harness.stage import (
    Against,
    Member,
    Outline,
    Stage,
    StageKind,
    Work,
    evaluations,
)
from holdfast.runs.harness.target import Target
from holdfast.runs.harness.verdict import digests, votes

if TYPE_CHECKING:
    from holdfast.runs.harness.plan import Plan


class Clean(StageKind):
    """Kind of the first stage of a measurement, which evaluates the model on the clean inputs."""

    name = "clean"
    named = "clean"

    def stages(self, plan: "Plan") -> list[Stage]:
        """Return the stage that evaluates the model on the clean inputs, which every plan contains."""
        return [Stage("clean", self)]

    def due(self, stage: Stage, plan: "Plan", by_stage: Mapping[str, Columns]) -> None:
        """Return None, which means all examples, because the model is evaluated on every clean input."""

    def run(self, stage: Stage, work: Work) -> Columns:
        """Evaluate the model on the clean inputs of a shard, and return its predictions and the digests of the inputs
        as columns.
        """
        rng = Draws(work.plan.seed).at("stage", stage.name)
        return in_pieces(lambda piece: _clean(work, piece, rng), work.batch, work.room)

    def columns(self, clean: Columns) -> dict[str, Tensor]:
        """Return the measured columns `clean`, because no example is left out of the clean stage."""
        return dict(clean)

    def as_if_broken(self, stage: Stage, work: Work) -> Columns:
        """Return the measured columns of the clean stage, with every example correct and eligible. The few examples of
        the check may all be misclassified or ineligible, while others in the data are not.
        """
        columns = self.run(stage, work)
        every = torch.ones_like(columns["correct"])
        return {**columns, "correct": every, "eligible": every.clone()}

    def cost(self, columns: Columns, *, randomised: bool) -> Cost:
        """Return the cost of the clean stage: one query for each example, and further forward passes for the votes of a
        randomised model.
        """
        n = len(columns["id"])
        return Cost(n * evaluations(randomised=randomised), 0, n)


def _clean(work: Work, batch: Batch, rng: Draws) -> dict[str, Tensor]:
    target, goal = work.target, work.plan.threat.goal
    with target.repeatable(rng.at(int(batch.ids[0]))):
        logits, right, _ = votes(target, batch, batch.x, lambda logits: logits)
    class_logits = logits[:, : target.classes]
    probabilities = class_logits.softmax(1)
    height = margin(logits, batch.towards(None))
    prediction = target.predicted(logits)
    eligible = torch.ones_like(prediction, dtype=torch.bool)
    if goal is not None:
        eligible = (batch.y != goal) & (prediction != goal)
    columns = {
        "id": batch.ids,
        "y": batch.y,
        "digest": digests(batch),
        "prediction": prediction,
        "margin": height,
        "confidence": probabilities.amax(1),
        "entropy": torch.special.entr(probabilities).sum(1),
        "probability_margin": margin(probabilities, batch.towards(None)),
        "correct": right > 0.5,
        "right": right,
        "eligible": eligible,
        "nan": logits.isnan().any(1),
        # the tolerance allows for the rounding of a sum in float32
        "is_probability": ((class_logits.sum(1) - 1).abs() < 1e-4) & (class_logits >= 0).all(1),
    }
    if target.rejects:
        columns["rejected"] = target.rejected(logits)
        columns["score"], columns["class_margin"] = score(logits), margin(class_logits, batch.towards(None))
    return {name: values.cpu() for name, values in columns.items()}


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

    def due(self, stage: Stage, plan: "Plan", by_stage: Mapping[str, Columns]) -> Mask:
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

    def further(self, target: Target, batch: Batch, logits: Logits, spent: Spent) -> dict[str, Tensor]:
        """Return confidence, entropy and margin of the class probabilities of the attacked inputs."""
        probabilities = for_label(logits[:, : target.classes], batch.y).softmax(1)
        return {
            "confidence": probabilities.amax(1),
            "entropy": torch.special.entr(probabilities).sum(1),
            "probability_margin": margin(probabilities, batch.towards(None)),
        }

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

    def due(self, stage: Stage, plan: "Plan", by_stage: Mapping[str, Columns]) -> Mask:
        """Return the mask of the correctly classified examples, on which the smallest change is searched for."""
        return by_stage["clean"]["correct"] & by_stage["clean"]["eligible"]

    def threat(self, plan: "Plan") -> ThreatModel:
        """Return the threat model of the plan without a limit on the size of changes, because the smallest change is
        searched for.
        """
        return unlimited(plan.threat)


FALSE_POSITIVES = (0.5, 0.05, 0.01, 0.001)
"""False positive rates at which a detector is attacked, in order of increasing threshold.

An input whose score is below the lowest threshold is also below the others.
"""
AWARE = margin_pgd(restarts=3)
"""The attack on the network and the detector together."""
DETECTION = (
    Member("Oblivious", FIXED.attack, against=Against(0.0)),
    *(Member(f"Aware-{100 * rate:g}", AWARE, against=Against(EVEN, rate)) for rate in FALSE_POSITIVES),
    Member("Aware", AWARE, against=Against(EVEN)),
)
"""The passes on a model that rejects inputs: one that ignores the detector, then one for each threshold."""
PASSES = tuple(slug(member.name) for member in DETECTION)
"""Names of the stages of these passes."""


class DetectorPass(AttackKind):
    """Kind of stage that attacks a network together with its detector, to measure the detection rate at each false
    positive rate.
    """

    name = "detection"
    named = "|".join(PASSES)
    title = "the pass {} on the detector"
    listed = "passes on the detector"
    lost = "the evaluation of the detector is"
    aware = True

    def stages(self, plan: "Plan") -> list[Stage]:
        """Return the stage of an attack that ignores the detector, and one stage for each threshold of the detector, if
        the plan contains them.
        """
        return [Stage(slug(m.name), self, m) for m in DETECTION if plan.detection]

    def due(self, stage: Stage, plan: "Plan", by_stage: Mapping[str, Columns]) -> Mask:
        """Return the mask of the examples for which no earlier attack on the detector has found a misclassified and
        undetected input.
        """
        return undetected(stage.aim, by_stage)

    def further(self, target: Target, batch: Batch, logits: Logits, spent: Spent) -> dict[str, Tensor]:
        """Return the scores of the detector for the attacked inputs. The score is inf for an input that the network
        classifies correctly.
        """
        wrong = ~(margin(logits[:, : target.classes], batch) > 0)
        return {"score": torch.where(wrong, score(logits), torch.inf)}

    def columns(self, clean: Columns) -> dict[str, Tensor]:
        """Return the columns for examples that were not attacked. Their detector score `score` is infinite, since no
        misclassified input was found.
        """
        return super().columns(clean) | {"score": torch.full_like(clean["margin"], torch.inf)}

    def evidence(
        self, outline: Outline, by_stage: Mapping[str, Columns], worst: Columns
    ) -> Mapping[str, Tensor]:
        """Return for each example the lowest detector score of an attacked input, for the attack that ignores the
        detector and for those that evade it.
        """
        if not set(PASSES) <= set(by_stage):
            return {}
        # an example that an attack broke is misclassified with a score below the threshold
        broken_score = torch.where(worst["success"], 0.0, torch.inf)
        return {
            "oblivious_score": by_stage[PASSES[0]]["score"],
            "aware_score": torch.minimum(lowest(by_stage), broken_score),
        }


def undetected(aim: Aim, by_stage: Mapping[str, Columns]) -> Mask:
    """Return the mask of the examples for which no earlier attack found a misclassified input with a detector score
    below the attacked threshold.

    For the pass that ignores the detector, these are all examples that the network classifies correctly.
    """
    if aim.beyond == torch.inf:
        return by_stage["clean"]["class_margin"] > 0
    return lowest(by_stage) > aim.beyond


def lowest(by_stage: Mapping[str, Columns]) -> PerExample:
    """Return for each example the lowest detector score among the misclassified inputs that were found, or infinity if
    there is none.

    The clean input and the inputs of all passes are included.
    """
    clean = by_stage["clean"]
    least = torch.where(clean["class_margin"] > 0, torch.inf, clean["score"])
    for name, columns in by_stage.items():
        if name in PASSES:
            least = torch.minimum(least, columns["score"])
    return least
