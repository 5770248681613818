"""The doubt `black-box` is raised if an attack without gradients breaks more than one with gradients."""

from functools import partial

from torch import Tensor

from holdfast.attacks.square import Square
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.evidence import Doubt
from holdfast.core.model import VOTES, Model
from holdfast.core.threat import ThreatModel
from holdfast.doubts.protocol import POINTS_BY_RIVAL, SEARCHES, Case, DoubtTest, Probe, within_budget
from holdfast.doubts.short_attacks import MARGIN, MARGIN_TITLE, compared, voted_columns


def search(model: Model, batch: Batch, threat: ThreatModel, rng: Draws, votes: int = 1) -> dict[str, Tensor]:
    """Return the columns of the Square Attack from its own random start, without gradients."""
    return voted_columns(Square(queries=SEARCHES), model, batch, threat, rng.at("search"), votes)


SEARCH = Probe(
    "search",
    "scores",
    search,
    voted=partial(search, votes=VOTES),
    applies=lambda threat: threat.constraint.eps != 0 and threat.constraint.in_input_units,
    rows=lambda threat, n, passes, votes: (within_budget(SEARCHES, threat) + votes) * passes.once(n),
    order=10,
)


def conclude(case: Case) -> Doubt:
    """Return the doubt from the search and PGD on the margin."""
    blind = f"Square with {within_budget(SEARCHES, case.context.threat):,} queries"
    return compared(case, (SEARCH, blind), (MARGIN, MARGIN_TITLE))


TEST = DoubtTest(
    title="Search without gradients breaks more",
    meaning="An attack without gradients breaks more examples than one with gradients, so the gradients are "
    "misleading.",
    advice="Add --adaptive, and look for the part of the model that masks gradients.",
    conclude=conclude,
    probes=(MARGIN, SEARCH),
    thresholds=(POINTS_BY_RIVAL,),
    of_strength=True,
    answered_by=("bypass", "search"),
)
