"""Parts of probes that several doubts share: short PGD attacks, and tests of slopes."""

import torch
from torch import Tensor

from holdfast.attacks.parts.ascent import ascend, gradient
from holdfast.attacks.parts.losses import Loss, cross_entropy, margin, margin_loss
from holdfast.attacks.protocol import Attack, attacked_inputs
from holdfast.attacks.square import Square
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.errors import BudgetSpent
from holdfast.core.evidence import Doubt
from holdfast.core.meter import Metered
from holdfast.core.model import Model
from holdfast.core.outputs import scale
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Inputs, Logits, Mask, PerExample, Rows
from holdfast.doubts.protocol import P_BY_RIVAL, POINTS_BY_RIVAL, Case, Probe, Run, share, within_budget
from holdfast.statistics.intervals import mcnemar

SLOPE_REACH = 0.05
"""length of the step in multiples of eps: less than half of one step of PGD-20"""
_NEAREST = 1e-3  # share of the magnitude of the input: a point close to the clean one if eps is 0
_RESOLVED = 1e-4  # a predicted change below this share of the logits is within float32 rounding errors


def gradient_properties(model: Model, batch: Batch, threat: ThreatModel, rng: Draws) -> dict[str, Tensor]:
    """Return for each example whether the gradient of the margin is zero, and how well it predicts the effect of a
    small step.

    `dead`: the gradient is zero or not finite at both points. `ratio` (n, 2): measured change along the gradient,
    divided by the predicted one; NaN if the prediction is too small. `flat`: the gradient of the cross-entropy is dead
    at the clean input and that of the margin is not. Cost: 5 forward and 3 backward passes.
    """
    points = (batch.x, threat.constraint.sample(batch, model.bounds, rng.at("point")))
    dead, ratios = torch.ones_like(batch.y, dtype=torch.bool), []
    for x in points:
        grad, logits = gradient(model, batch.at(x), margin_loss, raw=True)
        dead &= _is_dead(grad)
        ratios.append(_ratio(model, batch.at(x), threat, grad.nan_to_num(0.0, 0.0, 0.0), logits))
    flat = _is_dead(gradient(model, batch, cross_entropy, raw=True)[0]) & ~dead
    return {"dead": dead, "flat": flat, "ratio": torch.stack(ratios, dim=1)}


def _is_dead(grad: Inputs) -> Mask:
    """Whether a gradient is zero everywhere, or not finite somewhere."""
    values = grad.flatten(1)
    return (values == 0).all(1) | ~values.isfinite().all(1)


def _ratio(model: Model, batch: Batch, threat: ThreatModel, grad: Inputs, logits: Logits) -> PerExample:
    """Measured to predicted change of the margin along the steepest small step inside the bounds."""
    size = SLOPE_REACH * threat.constraint.eps
    step = size * threat.constraint.steepest(grad, batch.x, model.bounds)
    # the prediction is for the step that remains inside the bounds
    moved = model.bounds.clamp(batch.x + step)
    predicted = ((moved - batch.x) * grad).flatten(1).sum(1)
    with torch.no_grad():
        measured = margin_loss(model(moved, batch.ids), batch) - margin_loss(logits, batch)
    resolved = predicted > _RESOLVED * scale(logits)
    return torch.where(resolved, measured / predicted, torch.nan)


GRADIENTS = Probe(
    "gradients", "gradients", gradient_properties, breaks=False, applies=lambda threat: True, order=1
)


STEPS = 20
"""number of gradient steps of the short attacks"""
REACH = 2.5
"""path length of a short attack in multiples of eps, with a constant step size, as in Madry et al."""


def broken_columns(margin: PerExample, x: Inputs) -> dict[str, Tensor]:
    """Return the result of an attack as columns: the lowest margin of each example, whether it is broken (margin at
    most 0 or NaN), and the input.
    """
    return {"broken": ~(margin > 0), "margin": margin, "x": x}


def unbroken_columns(batch: Batch) -> dict[str, Tensor]:
    """Return the columns of an attack before its start: the clean inputs with an infinite margin."""
    return broken_columns(torch.full_like(batch.x.flatten(1)[:, 0], torch.inf), batch.x.clone())


def update_lower(lowest: dict[str, Tensor], attempt: dict[str, Tensor], rows: Rows) -> None:
    """Update the columns of `rows` in `lowest` with those of `attempt` where the margin is lower."""
    lower = ~(attempt["margin"] >= lowest["margin"][rows])  # NaN counts as broken
    for name, values in attempt.items():
        lowest[name][rows[lower]] = values[lower]


def short_pgd(
    model: Model, batch: Batch, threat: ThreatModel, rng: Draws, loss: Loss, *, eps: float | None = None
) -> dict[str, Tensor]:
    """Return the columns of a short PGD attack from a random start inside the threat model. If `eps` is given, it is
    the radius of the ball for the steps.
    """
    ball = threat.constraint if eps is None else threat.constraint.resized(eps)
    start = threat.constraint.sample(batch, model.bounds, rng.at("start"))
    x, height = ascend(model, batch, start, loss, ball, steps=STEPS, step_size=REACH * ball.eps / STEPS)
    return broken_columns(height, x)


def short_pgd_on(loss: Loss) -> Run:
    """Return a probe function that runs a short PGD attack on a loss."""

    def run(model: Model, batch: Batch, threat: ThreatModel, rng: Draws) -> dict[str, Tensor]:
        return short_pgd(model, batch, threat, rng, loss)

    return run


def _margin_twice(model: Model, batch: Batch, threat: ThreatModel, rng: Draws) -> dict[str, Tensor]:
    """PGD on the margin with two restarts: `broken` by either, `once` by the first."""
    columns = short_pgd(model, batch, threat, rng, margin_loss)
    by_first = columns["broken"].clone()
    surviving = (~by_first).nonzero()[:, 0]
    if len(surviving):
        second = short_pgd(model, batch.take(surviving), threat, rng.at("again"), margin_loss)
        update_lower(columns, second, surviving)
    return {**columns, "once": by_first}


CROSS_ENTROPY = Probe("cross-entropy", "gradients", short_pgd_on(cross_entropy), queries=STEPS + 1, order=2)


MARGIN = Probe("margin", "gradients", _margin_twice, queries=2 * (STEPS + 1), order=5)
MARGIN_TITLE = "PGD on the margin, twice 20 steps,"


def settling_search(model: Model, batch: Batch, threat: ThreatModel, rng: Draws) -> dict[str, Tensor]:
    """Return the columns of a short Square Attack from its own random start."""
    return voted_columns(Square(queries=_SETTLING_QUERIES), model, batch, threat, rng.at("settling"), 1)


_SETTLING_QUERIES = 200
SETTLING = Probe(
    "settling-search",
    "scores",
    settling_search,
    on="undecided",
    applies=lambda threat: threat.constraint.eps != 0 and threat.constraint.bounds_sizes,
    rows=lambda threat, n, passes, votes: (within_budget(_SETTLING_QUERIES, threat) + 1) * passes.once(n),
    order=2,
    most=32,
    settles=True,
)
"""Short search on a random sample of the surviving examples that are not certified, which no search breaks. The last
waves of the suite have only the lowest margins, which are no evidence for the others if the margins of a model
mislead."""


def is_exhausted(case: Case) -> bool:
    """Return whether no example is left that another attack could break, or the last attack of the suite that uses
    gradients broke none of its last wave, and the short search none of a random sample of the surviving examples.
    """
    if case.complete:
        return True
    sampled = case.broken(SETTLING)
    return case.idle() is not None and sampled is not None and not bool(sampled.any())


def missed_by(probe: Probe, case: Case) -> Mask | None:
    """Return the mask of the examples of a probe that the suite broke and the probe did not.

    No other attack is expected to be ahead of the probe on more examples if the suite is exhausted (`is_exhausted`).
    None if it is not, or the probe was not run.
    """
    broken = case.broken(probe)
    if broken is None or not is_exhausted(case):
        return None
    return case.columns["success"][case.results[probe.name].rows] & ~broken


def voted_columns(
    attack: Attack, model: Model, batch: Batch, threat: ThreatModel, rng: Draws, votes: int
) -> dict[str, Tensor]:
    """Return the result of an attack as columns, with the median margin of its inputs over `votes` forward passes."""
    meter = Metered(model, batch, threat)
    try:
        x_adv = attacked_inputs(attack, meter, batch, threat, rng=rng)
    except BudgetSpent:
        x_adv = meter.adversarial()

    with torch.no_grad():
        margins = torch.stack([margin(model(x_adv, batch.ids), batch) for _ in range(votes)])
    # the median: the worst of several passes would break any example of a model that errs now and then
    return broken_columns(margins.nan_to_num(nan=-torch.inf).sort(0).values[votes // 2], x_adv)


def compared(case: Case, weak: tuple[Probe, str], strong: tuple[Probe, str]) -> Doubt:
    """Return a doubt that is raised if a weaker attack breaks more than a stronger one on the same sample. Each attack
    is a probe and its name in a sentence.
    """
    weak_broken, strong_broken = case.broken(weak[0]), case.broken(strong[0])
    if weak_broken is None or strong_broken is None:
        return case.absent(strong[0], weak[0])
    test, n = mcnemar(weak_broken, strong_broken), len(weak_broken)
    ahead = (test.only_first - test.only_second) / n
    text = (
        f"{weak[1]} breaks {share(weak_broken)} of the sample, {strong[1]} "
        f"{share(strong_broken)} (exact McNemar p = {test.p:.2g})"
    )
    return case.judged(ahead, POINTS_BY_RIVAL, n, text, more=test.p < P_BY_RIVAL)
