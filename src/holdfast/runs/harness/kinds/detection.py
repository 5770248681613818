"""Attacks outside the suite that evaluate the detector of a model that rejects inputs."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from holdfast.attacks.pgd import margin_pgd
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.evidence import Columns
from holdfast.core.guard import Aim, score
from holdfast.core.meter import margin
from holdfast.core.names import slug
from holdfast.core.types import Ids, Mask, PerExample
from holdfast.doubts.answering import EVEN
from holdfast.runs.harness.kinds.attack import AttackKind
from holdfast.runs.harness.kinds.passes import FIXED
from holdfast.runs.harness.stage import Against, Member, Outline, Schedule, Stage, Work
from holdfast.runs.harness.verdict import cost_columns, returned, stored_inputs, verdict_of

if TYPE_CHECKING:
    from holdfast.runs.harness.plan import Plan

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

    def due(self, stage: Stage, plan: Schedule, by_stage: Mapping[str, Columns]) -> Mask:
        """Return the mask of the examples for which no earlier attack on the detector has found a misclassified and
        undetected input.
        """
        return undetected(stage.aim, by_stage)

    def piece(self, stage: Stage, work: Work, batch: Batch, rng: Draws, missed: Ids) -> dict[str, Tensor]:
        """Run the attack on one batch, and return as columns its results and the scores of the detector for the
        attacked inputs.

        The score is inf for an attacked input that the network classifies correctly.
        """
        plan, target = work.plan, work.target
        with target.repeatable(rng.at(int(batch.ids[0]))):
            x_adv, spent = returned(stage.attack, plan.threat, target, batch, rng)
            logits, columns = verdict_of(plan, target, batch, x_adv)
        wrong = ~(margin(logits[:, : target.classes], batch) > 0)
        columns |= {
            "score": torch.where(wrong, score(logits), torch.inf),
            **cost_columns(spent),
            **stored_inputs(plan, batch, x_adv, columns["success"], missed),
        }
        return {name: values.cpu() for name, values in columns.items()}

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
