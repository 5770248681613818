"""The doubt `transfer` is raised if examples from the surrogates (`--surrogate`) break more than the attack on the
model itself: exact McNemar p < 0.01 and at least 2 points.
"""

from functools import partial

from torch import Tensor

from holdfast.attacks.transfer import Transfer
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.evidence import Doubt
from holdfast.core.model import VOTES, Model
from holdfast.core.threat import ThreatModel
from holdfast.doubts.protocol import POINTS_BY_RIVAL, Case, DoubtTest, Probe
from holdfast.doubts.short_attacks import MARGIN, MARGIN_TITLE, compared, voted_columns


def transferred(
    model: Model, batch: Batch, threat: ThreatModel, rng: Draws, votes: int = 1
) -> dict[str, Tensor]:
    """Return the columns of inputs that are computed on the surrogates."""
    return voted_columns(Transfer(), model, batch, threat, rng.at("transfer"), votes)


TRANSFER = Probe(
    "transfer",
    "gradients",
    transferred,
    voted=partial(transferred, votes=VOTES),
    applies=lambda threat: threat.constraint.eps != 0 and bool(threat.surrogates),
    order=12,
)


def settled(case: Case) -> Doubt | None:
    """Return the doubt as not measured without a surrogate."""
    if case.context.threat.surrogates:
        return None
    message = "no surrogate was declared; name one with --surrogate MODEL"
    return Doubt(case.name, "not measured", message=message)


def conclude(case: Case) -> Doubt:
    """Return the doubt from the inputs of the surrogates and PGD on the margin."""
    return compared(case, (TRANSFER, "a transfer attack from the surrogates"), (MARGIN, MARGIN_TITLE))


TEST = DoubtTest(
    title="Transferred examples break more",
    meaning="Examples computed on another model break this one more often than examples computed on it directly.",
    advice="Use attacks on the surrogate, and find the part of this model that masks its gradient.",
    conclude=conclude,
    settled=settled,
    probes=(MARGIN, TRANSFER),
    thresholds=(POINTS_BY_RIVAL,),
    of_strength=True,
    needs_surrogate=True,
)
