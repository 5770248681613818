"""The first stage of a measurement, which evaluates the model on the clean inputs."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.evidence import Columns, Cost
from holdfast.core.guard import score
from holdfast.core.meter import margin
from holdfast.core.pieces import in_pieces
from holdfast.runs.harness.stage import Schedule, Stage, StageKind, Work, evaluations
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

    def due(self, stage: Stage, plan: Schedule, by_stage: Mapping[str, Columns]) -> None:
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
