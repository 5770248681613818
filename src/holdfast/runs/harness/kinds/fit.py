"""Fitting of learned attacks: an attack is fitted several times with different random numbers, and the fit that breaks
most of other examples is used.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from holdfast.attacks.protocol import Attack, Learned, Placed, Refitted
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.evidence import Columns
from holdfast.core.meter import Metered, margin
from holdfast.core.missing import without_missing
from holdfast.core.model import Model
from holdfast.core.remedies import OTHER_EXAMPLES
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Mask
from holdfast.runs.harness.stage import Schedule, Stage, StageKind, Work
from holdfast.runs.harness.verdict import aimed, digests, unattacked

if TYPE_CHECKING:
    from holdfast.runs.harness.plan import Plan

_CHOOSE = 2  # one in this many examples selects among the fits
_LEAST = 8  # with fewer examples than this, all are used both for fitting and for the selection


class Fit(StageKind):
    """Kind of stage that fits a learned attack on examples outside the evaluation. It has no shards, so a resumed run
    repeats an unfinished fit.
    """

    name = "fit"
    named = r"fit-\d+-.*"
    sharded = False
    of_attack = True

    def stages(self, plan: "Plan") -> list[Stage]:
        """Return an empty list, because `SuiteAttack.stages` inserts the stage that fits an attack before the stage of
        the attack.
        """
        return []

    def due(self, stage: Stage, plan: Schedule, by_stage: Mapping[str, Columns]) -> None:
        """Return None: the stage uses no example of the evaluation, because attacks are fitted on others."""

    def run(self, stage: Stage, work: Work) -> Columns:
        """Fit a learned attack, and return its perturbation and its cost as columns.

        Raises `UsageError` if there is no example to fit on.
        """
        assert stage.member is not None
        attack, rng, target = stage.member.attack, Draws(work.plan.seed).at("stage", stage.name), work.target
        assert isinstance(attack, Learned)
        batch = _examples(attack, work, rng)
        if not len(batch):
            raise UsageError(
                f"there is no example to fit {stage.member.name} to that is not judged", OTHER_EXAMPLES
            )
        queried, batch = target.queried(target.quick, batch), without_missing(batch, target.bare.bounds)
        meter = Metered(queried, batch, work.plan.threat)
        with target.repeatable(rng):
            learned, fits, chose = best_fit(attack, meter, batch, work.plan.threat, rng=rng)
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

    def columns(self, clean: Columns) -> dict[str, Tensor]:
        """Return the columns of this stage for the evaluated examples, on which the attack is not fitted."""
        return unattacked(clean)


def fit_stage_of(stage: str) -> str:
    """Return the name of the stage that fits the learned attack of the stage with the name `stage`."""
    return f"fit-{stage}"


def _examples(attack: Learned, work: Work, rng: Draws) -> Batch:
    """The examples to fit an attack to: a random choice of those that are not judged."""
    batch, threat = work.batch, work.plan.threat
    judged = {row.numpy().tobytes() for row in work.clean["digest"]}
    unjudged = [row.numpy().tobytes() not in judged for row in digests(batch)]
    batch = aimed(batch.take(torch.tensor(unjudged, device=batch.ids.device)), threat)
    if batch.target is not None:
        batch = batch.take(batch.y != batch.target)
    return batch.take(rng.at("examples").bits(batch.ids).argsort()[: attack.examples])


def best_fit(
    attack: Learned, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws
) -> tuple[Tensor, int, Mask]:
    """Fit a learned attack several times, and return the best perturbation, the number of fits, and the mask of the
    examples that selected the best one.

    The best fit breaks most of these examples; if several break equally many, it is the one with the lowest mean
    margin.
    """
    fits = attack.fits if isinstance(attack, Refitted) else 1
    if fits == 1:
        return attack.fit(model, batch, threat, rng=rng), 1, torch.zeros_like(batch.ids, dtype=torch.bool)
    drawn = rng.at("choose").bits(batch.ids).argsort()
    n = len(batch) // _CHOOSE
    separate = len(batch) >= _LEAST
    selection_batch = batch.take(drawn[:n].sort().values) if separate else batch
    fit_batch = batch.take(drawn[n:].sort().values) if separate else batch
    assert isinstance(attack, Refitted)
    perturbations = [attack.refit(k, model, fit_batch, threat, rng=rng) for k in range(fits)]
    scores = [
        _score(attack.fitted(perturbation), model, selection_batch, threat, rng)
        for perturbation in perturbations
    ]
    chose = torch.zeros_like(batch.ids, dtype=torch.bool)
    chose[drawn[:n] if separate else drawn] = True
    return perturbations[scores.index(max(scores))], fits, chose


def _score(attack: Attack, model: Model, batch: Batch, threat: ThreatModel, rng: Draws) -> tuple[int, float]:
    """Number of examples that a fitted attack breaks, and the negative mean margin over all examples."""
    place = rng.at("chosen")
    if isinstance(attack, Placed):
        x_adv = attack.at_random(model, batch, threat, rng=place)
    else:
        x_adv = attack(model, batch, threat, rng=place)
    with torch.no_grad():
        heights = margin(model(x_adv, batch.ids), batch)
    return int((~(heights > 0)).sum()), -float(heights.nan_to_num(-torch.inf).mean())
