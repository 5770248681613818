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


WHOLE_BOX = Probe("whole-box", "gradients", whole_box, breaks=False, order=8)


def conclude(case: Case) -> Doubt:
    """Return the doubt from the examples that survive."""
    broken = case.broken(WHOLE_BOX)
    if broken is None:
        return case.absent(WHOLE_BOX)
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
    probes=(WHOLE_BOX,),
    thresholds=(THRESHOLD,),
    of_strength=True,
    answered_by=("bypass", "search"),
    unanswered_if="dead",
)
