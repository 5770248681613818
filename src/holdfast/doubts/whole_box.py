"""The doubt `whole-box` is raised if the attack fails even if every input inside the bounds is allowed, so it does
not work.
"""

from torch import Tensor

from holdfast.attacks.parts.losses import margin_loss
from holdfast.core.batch import Batch
from holdfast.core.constraints import extent
from holdfast.core.draws import Draws
from holdfast.core.evidence import Doubt
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Mask
from holdfast.doubts.protocol import Case, DoubtTest, Probe, percent
from holdfast.doubts.short_attacks import short_pgd
from holdfast.statistics.intervals import clopper_pearson

THRESHOLD = 0.05
"""largest fraction of examples that may survive if every input inside the bounds is allowed, by the lower end of its
confidence interval"""


def whole_box(model: Model, batch: Batch, threat: ThreatModel, rng: Draws) -> dict[str, Tensor]:
    """Return the columns of PGD on the margin from a start inside the threat model, with every input inside the bounds
    allowed.
    """
    # the diagonal of the box does not depend on the batch, as the largest distance of an example would
    eps = extent(threat.constraint, batch.x, model.bounds)
    return short_pgd(model, batch, threat, rng, margin_loss, eps=eps)


FEW = Probe("whole-box-few", "gradients", whole_box, breaks=False, most=32, order=8)
WHOLE_BOX = Probe("whole-box", "gradients", whole_box, breaks=False, order=9)


def settled(case: Case) -> Doubt | None:
    """Return the doubt as clear if the attack breaks all of a few examples.

    If 13 of 128 survive, the smallest number that raises the doubt, none of them is among 32 with a probability of 2 %.
    """
    few = case.broken(FEW)
    return None if few is None or not few.all() else _judged(case, few)


def conclude(case: Case) -> Doubt:
    """Return the doubt from the examples that survive."""
    broken = case.broken(WHOLE_BOX)
    if broken is None:
        return case.absent(WHOLE_BOX)
    return _judged(case, broken)


def _judged(case: Case, broken: Mask) -> Doubt:
    surviving, n = int((~broken).sum()), len(broken)
    low, _ = clopper_pearson(surviving, n)
    text = f"with every legal input allowed, {surviving} of {n} examples survive (at least {percent(low)})"
    return case.judged(low, THRESHOLD, n, text)


TEST = DoubtTest(
    title="Unlimited changes do not break the model",
    meaning="With unlimited changes an attack should always succeed. Here it does not, so the attack does not work on "
    "this model.",
    advice="Check that the output depends on the input, and that gradients reach the input.",
    conclude=conclude,
    settled=settled,
    probes=(FEW, WHOLE_BOX),
    thresholds=(THRESHOLD,),
    of_strength=True,
    answered_by=("bypass", "search"),
    unanswered_if="dead",
)
