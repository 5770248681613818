"""Fitting a learned attack: several times from other draws, of which the best on examples apart is taken."""

import torch
from torch import Tensor

from holdfast.attacks.protocol import Attack, Learned, Placed, Refitted
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.meter import margin
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Mask

_CHOOSE = 2  # one in so many examples chooses among the fits: with few, chance would choose
_LEAST = 8  # examples; fewer are all learned on, and choose too


def best_fit(
    attack: Learned, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws
) -> tuple[Tensor, int, Mask]:
    """What is learned, of how many fits it is the best, and which examples chose it.

    The best breaks most of the choosing examples; of several, it is the one with the lowest mean margin.
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
