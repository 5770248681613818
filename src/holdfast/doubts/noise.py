"""The doubt `noise` is raised if random points of the ball break examples that survived the attacks; not tested for a
randomised model.
"""

import torch
from torch import Tensor

from holdfast.attacks.parts.losses import margin
from holdfast.core.batch import Batch
from holdfast.core.constraints import Constraint
from holdfast.core.draws import Draws
from holdfast.core.evidence import Doubt
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Inputs
from holdfast.doubts.protocol import SEARCHED, Case, DoubtTest, Probe, within_budget
from holdfast.doubts.short_attacks import (
    SETTLING,
    broken_columns,
    is_exhausted,
    unbroken_columns,
    update_lower,
)

THRESHOLD = 0.005
"""fraction of the surviving examples that random inputs may break without raising the doubt"""
DRAWS = 100
"""number of random inputs for each example"""


def noise(model: Model, batch: Batch, threat: ThreatModel, rng: Draws) -> dict[str, Tensor]:
    """Return the columns of random inputs, alternately inside the ball and on its surface, without gradients."""
    columns, all_rows = unbroken_columns(batch), torch.arange(len(batch), device=batch.ids.device)
    with torch.no_grad():
        for draw in range(within_budget(DRAWS, threat)):
            # every second point is on the surface, where more examples break than inside
            x = _drawn(model, batch, threat.constraint, rng.at("noise", draw), surface=draw % 2 == 1)
            height = margin(model(x, batch.ids), batch).nan_to_num(nan=-torch.inf)
            update_lower(columns, broken_columns(height, x), all_rows)
    return columns


def _drawn(model: Model, batch: Batch, constraint: Constraint, rng: Draws, *, surface: bool) -> Inputs:
    if not surface:
        return constraint.sample(batch, model.bounds, rng)
    direction = rng.normal(batch.ids, *batch.x.shape[1:], dtype=batch.x.dtype)
    step = constraint.eps * constraint.steepest(direction, batch.x, model.bounds)
    return constraint.project(batch.x + step, batch.x, model.bounds)


NOISE = Probe(
    "noise",
    "labels",
    noise,
    on="surviving",
    rows=lambda threat, n, passes, votes: within_budget(DRAWS, threat) * passes.once(n),
    order=10,
)


def conclude(case: Case) -> Doubt:
    """Return the doubt from the random inputs; it is not applicable to a randomised model."""
    broken = case.broken(NOISE)
    if broken is None:
        return case.absent(NOISE)
    if case.context.randomised:
        return case.inapplicable(
            "the model is randomised, so that one of many outputs may be wrong for any input"
        )
    draws = within_budget(DRAWS, case.context.threat)
    text = f"{draws} random inputs break {int(broken.sum())} of {len(broken)} surviving examples"
    return case.judged(float(broken.double().mean()), THRESHOLD, len(broken), text)


def settled(case: Case) -> Doubt | None:
    """Return the doubt as clear if a random search of the suite, which is stronger than random inputs, breaks none."""
    searched = case.idle(searches=SEARCHED)
    if searched is None or not is_exhausted(case):
        return None
    text = (
        f"the random search of {searched.name} breaks none of the last {searched.n_last} examples that it was run on, "
        "and a short search none of a random sample, so random inputs were not tried"
    )
    return case.judged(0.0, THRESHOLD, searched.n_last, text)


TEST = DoubtTest(
    title="Random noise breaks examples that attacks did not",
    meaning="Random perturbations inside the threat model break examples that survived the suite.",
    advice="The suite is too weak: add attacks, steps or restarts.",
    conclude=conclude,
    settled=settled,
    probes=(SETTLING, NOISE),
    thresholds=(THRESHOLD,),
    of_strength=True,
    answered_by=("bypass", "search"),
    served_probe=NOISE.name,
)
