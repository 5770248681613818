"""Fits learned attacks: several times with different random streams; the best fit on separate examples is used."""

import torch
from torch import Tensor

from holdfast.attacks.protocol import Attack, Learned, Placed, Refitted
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.evidence import Columns
from holdfast.core.meter import Metered, margin
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Mask
from holdfast.harness.plan import Plan, Stage
from holdfast.harness.stages import aimed, digests
from holdfast.harness.target import Target

_CHOOSE = 2  # one in this many examples selects among the fits
_LEAST = 8  # with fewer examples than this, all are used both for fitting and for the selection


def run_fit(stage: Stage, plan: Plan, target: Target, batch: Batch, clean: Columns) -> Columns:
    """Columns of a stage that fits an attack on `batch`, without examples that are judged.

    `learned.x` is the fitted perturbation; the other columns are costs. Raises `UsageError` if no example is left.
    """
    assert stage.member is not None
    attack, rng = stage.member.attack, Draws(plan.seed).at("stage", stage.name)
    assert isinstance(attack, Learned)
    judged = {row.numpy().tobytes() for row in clean["digest"]}
    apart = [row.numpy().tobytes() not in judged for row in digests(batch)]
    batch = aimed(batch.take(torch.tensor(apart, device=batch.ids.device)), plan.threat)
    if batch.target is not None:
        batch = batch.take(batch.y != batch.target)
    batch = batch.take(rng.at("examples").bits(batch.ids).argsort()[: attack.examples])
    if not len(batch):
        raise UsageError(
            f"there is no example to fit {stage.member.name} to that is not judged; name others with --fit DATA"
        )
    meter = Metered(target.asked(target.quick, batch), batch, plan.threat)
    with target.repeatable(rng):
        learned, fits, chose = best_fit(attack, meter, batch, plan.threat, rng=rng)
    columns = {
        "id": batch.ids,
        "ran": torch.zeros_like(batch.ids, dtype=torch.bool),
        "queries": meter.spent.queries,
        "backwards": meter.spent.backwards,
        "fits": torch.full_like(batch.ids, fits),
        "chose": chose,
        "learned.x": learned.detach(),
    }
    return {name: values.cpu() for name, values in columns.items()}


def best_fit(
    attack: Learned, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws
) -> tuple[Tensor, int, Mask]:
    """The best fit, the number of fits, and the mask of the examples that selected it.

    The best fit breaks most of the selecting examples; among equals, it has the lowest mean margin.
    """
    fits = attack.fits if isinstance(attack, Refitted) else 1
    if fits == 1:
        return attack.fit(model, batch, threat, rng=rng), 1, torch.zeros_like(batch.ids, dtype=torch.bool)
    drawn = rng.at("choose").bits(batch.ids).argsort()
    n = len(batch) // _CHOOSE
    apart = len(batch) >= _LEAST
    chooses = batch.take(drawn[:n].sort().values) if apart else batch
    learns = batch.take(drawn[n:].sort().values) if apart else batch
    assert isinstance(attack, Refitted)
    found = [attack.refit(k, model, learns, threat, rng=rng) for k in range(fits)]
    scores = [_score(attack.fitted(one), model, chooses, threat, rng) for one in found]
    chose = torch.zeros_like(batch.ids, dtype=torch.bool)
    chose[drawn[:n] if apart else drawn] = True
    return found[scores.index(max(scores))], fits, chose


def _score(attack: Attack, model: Model, batch: Batch, threat: ThreatModel, rng: Draws) -> tuple[int, float]:
    """How many examples a fitted attack breaks, and the negative mean margin of all."""
    place = rng.at("chosen")
    if isinstance(attack, Placed):
        x_adv = attack.at_random(model, batch, threat, rng=place)
    else:
        x_adv = attack(model, batch, threat, rng=place)
    with torch.no_grad():
        heights = margin(model(x_adv, batch.ids), batch)
    return int((~(heights > 0)).sum()), -float(heights.nan_to_num(-torch.inf).mean())
