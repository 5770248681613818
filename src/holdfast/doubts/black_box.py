"""The doubt `black-box` is raised if an attack without gradients breaks more than one with gradients."""

from functools import partial

import torch
from torch import Tensor

from holdfast.attacks.costs import search_queries
from holdfast.attacks.square import Square
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.evidence import Doubt
from holdfast.core.model import VOTES, Model
from holdfast.core.threat import ThreatModel
from holdfast.doubts.protocol import (
    DISCORDANT,
    POINTS_BY_RIVAL,
    SEARCHED,
    SEARCHES,
    Case,
    DoubtTest,
    Probe,
    within_budget,
)
from holdfast.doubts.short_attacks import (
    MARGIN,
    MARGIN_TITLE,
    SETTLING,
    compared,
    is_exhausted,
    voted_columns,
)


def search(model: Model, batch: Batch, threat: ThreatModel, rng: Draws, votes: int = 1) -> dict[str, Tensor]:
    """Return the columns of the Square Attack from its own random start, without gradients."""
    return voted_columns(Square(queries=SEARCHES), model, batch, threat, rng.at("search"), votes)


SEARCH = Probe(
    "search",
    "scores",
    search,
    voted=partial(search, votes=VOTES),
    applies=lambda threat: threat.constraint.eps != 0 and threat.constraint.bounds_sizes,
    rows=lambda threat, n, passes, votes: (within_budget(SEARCHES, threat) + votes) * passes.once(n),
    order=11,
)


def conclude(case: Case) -> Doubt:
    """Return the doubt from the search and PGD on the margin."""
    blind = f"Square with {within_budget(SEARCHES, case.context.threat):,} queries"
    return compared(case, (SEARCH, blind), (MARGIN, MARGIN_TITLE))


def settled(case: Case) -> Doubt | None:
    """Return the doubt as clear if almost all that the suite broke was broken by its attacks that follow gradients and
    do not search, and the suite and a short search have searched without a result, or nothing is left to break.
    """
    searched, success = case.idle(searches=SEARCHED), case.columns["success"]
    by_gradients, by_searches = torch.zeros_like(success), torch.zeros_like(success)
    followed = False
    for outcome in case.context.outcomes:
        if outcome.attack is None:
            continue
        if search_queries(outcome.attack):
            by_searches |= outcome.broken
        elif outcome.attack.needs == "gradients":
            by_gradients |= outcome.broken
            followed = True
    if not followed or not is_exhausted(case):
        return None
    if case.complete:
        # also what neither gradients nor searches broke, such as the inputs of a baseline
        alone = success & ~by_gradients
        text = (
            f"every correct example is broken or certified, and attacks that follow gradients break all but "
            f"{int(alone.sum())} of the {int(success.sum())} broken ones"
        )
    elif searched is not None:
        alone = by_searches & ~by_gradients
        text = (
            f"the search of {searched.name} breaks none of the last {searched.n_last} examples, and searches alone "
            f"break {int(alone.sum())} of {len(alone)} examples in the suite"
        )
    else:
        return None
    if int(alone.sum()) >= DISCORDANT:
        return None
    text += f"; a difference needs {DISCORDANT}"
    return case.judged(int(alone.sum()) / len(alone), POINTS_BY_RIVAL, len(alone), text, more=False)


TEST = DoubtTest(
    title="Search without gradients breaks more",
    meaning="An attack without gradients breaks more examples than one with gradients, so the gradients are "
    "misleading.",
    advice="Add --adaptive, and look for the part of the model that masks gradients.",
    conclude=conclude,
    settled=settled,
    probes=(SETTLING, MARGIN, SEARCH),
    thresholds=(POINTS_BY_RIVAL,),
    of_strength=True,
    answered_by=("bypass", "search"),
)
