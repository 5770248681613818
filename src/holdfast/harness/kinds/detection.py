"""Passes on the detector of a model that rejects."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from holdfast.attacks.pgd import PGD
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.evidence import Columns
from holdfast.core.guard import Aim, score
from holdfast.core.meter import margin
from holdfast.core.names import slug
from holdfast.core.types import Ids, Mask, PerExample
from holdfast.doubts.answering import EVEN
from holdfast.harness.kinds.attack import AttackKind
from holdfast.harness.kinds.passes import FIXED
from holdfast.harness.stage import Against, Member, Outline, Stage, Work
from holdfast.harness.verdict import cost_columns, returned, stored_inputs, verdict_of

if TYPE_CHECKING:
    from holdfast.harness.plan import Plan

FALSE_POSITIVES = (0.5, 0.05, 0.01)
"""False positive rates at which a detector is attacked, in order of increasing threshold: an input below the lowest
threshold is below the others."""
AWARE = PGD(restarts=3)
"""The attack on network and detector together."""
DETECTION = (
    Member("Oblivious", FIXED.attack, against=Against(0.0)),
    *(Member(f"Aware-{100 * rate:g}", AWARE, against=Against(EVEN, rate)) for rate in FALSE_POSITIVES),
    Member("Aware", AWARE, against=Against(EVEN)),
)
"""The passes on a model that rejects: first one that ignores the detector, then one for each threshold."""
PASSES = tuple(slug(member.name) for member in DETECTION)
"""The stages of these passes."""


class DetectorPass(AttackKind):
    """Attacks on network and detector, for the detection rate as a function of the false positive rate."""

    name = "detection"
    title = "the pass {} on the detector"
    listed = "passes on the detector"
    lost = "the evaluation of the detector is"
    aware = True

    def stages(self, plan: "Plan") -> list[Stage]:
        """The pass that ignores the detector, then one for each threshold."""
        return [Stage(slug(m.name), self, m) for m in DETECTION if plan.detection]

    def due(self, stage: Stage, plan: "Plan", by_stage: Mapping[str, Columns]) -> Mask:
        """The examples that no earlier pass has made misclassified and undetected."""
        return undetected(stage.aim, by_stage)

    def piece(self, stage: Stage, work: Work, batch: Batch, rng: Draws, missed: Ids) -> dict[str, Tensor]:
        """The scores of the detector for attacked inputs that the network misclassifies."""
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
        """The columns without attack; `score` is inf, since there is no misclassified input."""
        return super().columns(clean) | {"score": torch.full_like(clean["margin"], torch.inf)}

    def evidence(
        self, outline: Outline, by_stage: Mapping[str, Columns], worst: Columns
    ) -> Mapping[str, Tensor]:
        """The scores of attacked inputs, without and with knowledge of the detector."""
        if not set(PASSES) <= set(by_stage):
            return {}
        # an example that an attack broke is misclassified with a score below the threshold
        known = torch.where(worst["success"], 0.0, torch.inf)
        return {
            "oblivious_score": by_stage[PASSES[0]]["score"],
            "aware_score": torch.minimum(lowest(by_stage), known),
        }


def undetected(aim: Aim, by_stage: Mapping[str, Columns]) -> Mask:
    """Examples that no earlier pass has made both misclassified and below the threshold of `aim`.

    For the pass that ignores the detector: all examples that the network classifies correctly.
    """
    if aim.beyond == torch.inf:
        return by_stage["clean"]["class_margin"] > 0
    return lowest(by_stage) > aim.beyond


def lowest(by_stage: Mapping[str, Columns]) -> PerExample:
    """The lowest score of a misclassified input of each example, over the clean input and all passes; inf if none."""
    clean = by_stage["clean"]
    least = torch.where(clean["class_margin"] > 0, torch.inf, clean["score"])
    for name, columns in by_stage.items():
        if name in PASSES:
            least = torch.minimum(least, columns["score"])
    return least
