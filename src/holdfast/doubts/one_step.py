"""The doubt `one-step` is raised if one gradient step breaks more than twenty."""

from functools import partial

from torch import Tensor

from holdfast.attacks.parts.ascent import ascend
from holdfast.attacks.parts.losses import cross_entropy
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.doubts.protocol import POINTS_BY_RIVAL, DoubtTest, Probe
from holdfast.doubts.short_attacks import CROSS_ENTROPY, broken_columns, compared


def one_step(model: Model, batch: Batch, threat: ThreatModel, rng: Draws) -> dict[str, Tensor]:
    """Return the columns of FGSM: one step of length eps from the clean input."""
    eps = threat.constraint.eps
    x, height = ascend(model, batch, batch.x, cross_entropy, threat.constraint, steps=1, step_size=eps)
    return broken_columns(height, x)


ONE_STEP = Probe("one-step", "gradients", one_step, queries=2, order=4)


TEST = DoubtTest(
    title="One step breaks more than many",
    meaning="A single gradient step breaks more examples than twenty smaller ones. This is a sign of gradient "
    "masking: local gradients point in wrong directions.",
    advice="Add restarts and gradient-free attacks. The measured robust accuracy is not reliable.",
    conclude=partial(
        compared, weak=(ONE_STEP, "FGSM alone"), strong=(CROSS_ENTROPY, "PGD-20 on the cross-entropy")
    ),
    probes=(CROSS_ENTROPY, ONE_STEP),
    thresholds=(POINTS_BY_RIVAL,),
    of_strength=True,
    answered_by=("bypass", "search"),
)
