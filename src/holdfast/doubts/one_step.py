"""The doubt `one-step` is raised if one gradient step breaks more than twenty."""

from torch import Tensor

from holdfast.attacks.parts.ascent import ascend
from holdfast.attacks.parts.losses import cross_entropy
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.evidence import Doubt
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.doubts.protocol import POINTS_BY_RIVAL, Case, DoubtTest, Probe
from holdfast.doubts.short_attacks import CROSS_ENTROPY, broken_columns, compared


def one_step(model: Model, batch: Batch, threat: ThreatModel, rng: Draws) -> dict[str, Tensor]:
    """Return the columns of FGSM: one step of length eps from the clean input."""
    eps = threat.constraint.eps
    x, height = ascend(model, batch, batch.x, cross_entropy, threat.constraint, steps=1, step_size=eps)
    return broken_columns(height, x)


def conclude(case: Case) -> Doubt:
    """Return the doubt from the shares that FGSM and a short PGD break."""
    if case.context.task == "regression":
        message = "an error may grow in two directions, and a run from a random start may take the worse one"
        return Doubt(case.name, "not applicable", message=message)
    return compared(
        case, weak=(ONE_STEP, "FGSM alone"), strong=(CROSS_ENTROPY, "PGD-20 on the cross-entropy")
    )


ONE_STEP = Probe("one-step", "gradients", one_step, queries=2, order=4)


TEST = DoubtTest(
    title="One step breaks more than many",
    meaning="A single gradient step breaks more examples than twenty smaller ones. This is a sign of gradient "
    "masking: local gradients point in wrong directions.",
    advice="Add restarts and gradient-free attacks. The measured robust accuracy is not reliable.",
    conclude=conclude,
    probes=(CROSS_ENTROPY, ONE_STEP),
    thresholds=(POINTS_BY_RIVAL,),
    of_strength=True,
    answered_by=("bypass", "search"),
)
