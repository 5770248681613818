"""The doubt `loss-spread` is raised if the choice of the loss changes the result by more than 15 points (p < 0.01).
Networks without masked gradients reach 9 points after short training, so a smaller difference is clear; each example
that any of the losses breaks counts as broken.
"""

import torch
from torch import Tensor

from holdfast.attacks.parts.losses import cross_entropy, likeliest, probability_margin
from holdfast.core.batch import Batch, Lookup
from holdfast.core.draws import Draws
from holdfast.core.evidence import Doubt
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Logits, PerExample
from holdfast.doubts.protocol import P_BY_RIVAL, Case, DoubtTest, Probe, share
from holdfast.doubts.short_attacks import (
    CROSS_ENTROPY,
    MARGIN,
    SETTLING,
    STEPS,
    missed_by,
    short_pgd,
    short_pgd_on,
)
from holdfast.statistics.intervals import mcnemar

LOSS_SPREAD = 0.15
"""difference between the success rates of the best loss and the worst untargeted one above which the doubt is raised;
networks after short and weak training reach 0.09, and networks whose logits saturate 0.31 and more. A smaller threshold
would find no further model of the gallery: distillation reaches 0.95, resize-and-pad 0.12 (it raises `randomness` and
`whole-box`), and the others at most 0.03, because no loss attacks them"""


def towards_runner_up(model: Model, batch: Batch, threat: ThreatModel, rng: Draws) -> dict[str, Tensor]:
    """Return the columns of PGD towards the most likely wrong class of the clean input; any wrong class counts."""
    with torch.no_grad():
        target = likeliest(model(batch.x, batch.ids), batch.y, 1)[:, 0]
    lookup = Lookup(batch.ids)

    def loss(logits: Logits, part: Batch) -> PerExample:
        aimed = target[lookup.rows(part.ids)]
        return cross_entropy(logits, part.towards(aimed))

    return short_pgd(model, batch, threat, rng, loss)


PROBABILITY_MARGIN = Probe(
    "probability-margin", "gradients", short_pgd_on(probability_margin), queries=STEPS + 1, order=6
)
RUNNER_UP = Probe(
    "runner-up",
    "gradients",
    towards_runner_up,
    queries=STEPS + 2,
    # a threat model with a goal states the class to aim at
    applies=lambda threat: threat.constraint.eps != 0 and threat.goal is None,
    order=7,
)


def conclude(case: Case) -> Doubt:
    """Return the doubt from the best loss and the worst untargeted one, since targeted losses are weaker in general."""
    untargeted = {
        "the cross-entropy": case.broken(CROSS_ENTROPY),
        "the margin": case.broken(MARGIN, "once"),
        "the margin in probability": case.broken(PROBABILITY_MARGIN),
    }
    losses = {name: mask for name, mask in untargeted.items() if mask is not None}
    if len(losses) < len(untargeted):
        return case.absent(CROSS_ENTROPY, MARGIN, PROBABILITY_MARGIN)
    worst = min(losses, key=lambda name: int(losses[name].sum()))
    runner_up = case.broken(RUNNER_UP)
    rivals = losses if runner_up is None else {**losses, "the runner-up": runner_up}
    best = max(rivals, key=lambda name: int(rivals[name].sum()))
    test, n = mcnemar(rivals[best], losses[worst]), len(losses[worst])
    text = (
        f"of PGD-20's losses {best} breaks {share(rivals[best])} and {worst} {share(losses[worst])} "
        f"(exact McNemar p = {test.p:.2g})"
    )
    if best == worst:
        text = f"with each of its untargeted losses PGD-20 breaks {share(losses[worst])}"
    else:
        text += f"; more than {100 * LOSS_SPREAD:.0f} points with p < {P_BY_RIVAL} raise the doubt"
    spread = (test.only_first - test.only_second) / n
    return case.judged(spread, LOSS_SPREAD, n, text, more=test.p < P_BY_RIVAL)


def settled(case: Case) -> Doubt | None:
    """Return the doubt as clear if the whole suite is ahead of the cross-entropy by no more than the losses may be."""
    missed = missed_by(CROSS_ENTROPY, case)
    if missed is None or float(missed.double().mean()) > LOSS_SPREAD:
        return None
    text = (
        f"the suite breaks {share(missed)} of the sample that PGD-20 on the cross-entropy does not, and the losses may "
        f"differ by {100 * LOSS_SPREAD:.0f} points, so the others were not tried"
    )
    return case.judged(float(missed.double().mean()), LOSS_SPREAD, len(missed), text)


TEST = DoubtTest(
    title="The loss decides the result",
    meaning="Attacks that differ only in their loss break very different numbers of examples. At least one loss has "
    "misleading gradients.",
    advice="Use the lowest robust accuracy, and add the losses that broke most to the suite.",
    conclude=conclude,
    settled=settled,
    probes=(SETTLING, CROSS_ENTROPY, MARGIN, PROBABILITY_MARGIN, RUNNER_UP),
    thresholds=(LOSS_SPREAD,),
    of_strength=True,
    answered_by=("bypass",),
)
