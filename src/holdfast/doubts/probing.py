"""What is run to measure the doubts, and on which examples.

A probe is a pure function of model, batch, threat and draws, and returns columns. Passes are shared between doubts:
PGD-20 on the cross-entropy serves `scale`, `one-step` and `loss-spread`; margin PGD, two restarts of 20 steps, serves
`black-box` with both and `loss-spread` with its first. All probes are given the same draws, so that two losses start
from the same points.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from holdfast.attacks import Square, Transfer
from holdfast.attacks.protocol import Attack
from holdfast.core.batch import Batch
from holdfast.core.constraints import L1, L2, Constraint, Linf, extent
from holdfast.core.draws import Draws
from holdfast.core.errors import BudgetSpent
from holdfast.core.evidence import Columns
from holdfast.core.lookup import Lookup
from holdfast.core.meter import Metered
from holdfast.core.model import VOTES, Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs, Logits, Mask, PerExample, Rows
from holdfast.doubts.slopes import gradients
from holdfast.doubts.steadiness import steadiness
from holdfast.doubts.thresholds import FRESH_ROWS, NOISE_DRAWS, SAMPLE
from holdfast.ops.ascent import ascend
from holdfast.ops.losses import Loss, cross_entropy, likeliest, margin, margin_loss, probability_margin
from holdfast.ops.sampling import sample_rows

Run = Callable[[Model, Batch, ThreatModel, Draws], dict[str, Tensor]]
"""Columns of the batch; attacks return `broken` and the lowest `margin`."""

STEPS = 20
"""Gradient steps of the short passes."""
REACH = 2.5
"""Path length of a pass in multiples of eps, at an even step, as Madry et al. take."""
SMALL = 0.01
"""What `scale` multiplies the logits with."""
SEARCHES = 1000
"""Queries of the black-box search."""
AGAIN = "again"
"""The probe that runs the suite once more."""


@dataclass(frozen=True)
class Probe:
    """Something to run on a few examples."""

    name: str
    needs: Access
    run: Run
    on: Literal["correct", "standing", "closest"] = "correct"
    """a sample of the correct examples, of those that stand, or those that stand with the lowest margin"""
    breaks: bool = True
    """whether its inputs obey the threat model, so that breaking a standing example speaks against the suite"""
    queries: int = 0
    """the most that it asks of an example; 0 where it keeps to the budget of the threat"""
    voted: Run | None = None
    """the same on a model that draws at random: most of the looks at where it ends decide; None where it has no end"""


def title(probe: str) -> str:
    """What a probe is called in a sentence."""
    return "a fresh pass of the suite" if probe == AGAIN else f"the probe {probe}"


def counts(probe: Probe, threat: ThreatModel) -> bool:
    """Whether an adversarial example of the probe lies inside the threat model, its query budget included."""
    return probe.breaks and within_budget(probe.queries, threat) == probe.queries


def fallen(margin: PerExample, x: Inputs) -> dict[str, Tensor]:
    """The columns of an attack: `broken`, the lowest `margin` and its input `x`. Ties and NaN count as broken."""
    return {"broken": ~(margin > 0), "margin": margin, "x": x}


def climbed(
    model: Model, batch: Batch, threat: ThreatModel, rng: Draws, loss: Loss, *, eps: float | None = None
) -> dict[str, Tensor]:
    """One pass of short PGD from a random start inside the threat; `eps` lets it go further."""
    wide = threat.constraint if eps is None else threat.constraint.resized(eps)
    start = threat.constraint.sample(batch, model.bounds, rng.at("start"))
    x, height = ascend(model, batch, start, loss, wide, steps=STEPS, step_size=REACH * wide.eps / STEPS)
    return fallen(height, x)


def _by(loss: Loss) -> Run:
    def run(model: Model, batch: Batch, threat: ThreatModel, rng: Draws) -> dict[str, Tensor]:
        return climbed(model, batch, threat, rng, loss)

    return run


def _lower(known: dict[str, Tensor], found: dict[str, Tensor], rows: Rows) -> None:
    """Put what was `found` on some rows into the columns of all, where its margin is lower."""
    better = ~(found["margin"] >= known["margin"][rows])  # NaN counts as broken
    for name, values in found.items():
        known[name][rows[better]] = values[better]


def small_cross_entropy(logits: Logits, batch: Batch) -> PerExample:
    """Cross-entropy of logits scaled down, whose softmax is nowhere flat."""
    return cross_entropy(SMALL * logits, batch)


def _one_step(model: Model, batch: Batch, threat: ThreatModel, rng: Draws) -> dict[str, Tensor]:
    """FGSM: one step of length eps from the clean input."""
    eps = threat.constraint.eps
    x, height = ascend(model, batch, batch.x, cross_entropy, threat.constraint, steps=1, step_size=eps)
    return fallen(height, x)


def _margin_twice(model: Model, batch: Batch, threat: ThreatModel, rng: Draws) -> dict[str, Tensor]:
    """The margin climbed twice: `broken` by both, `once` by the first."""
    found = climbed(model, batch, threat, rng, margin_loss)
    once = found["broken"].clone()
    left = (~once).nonzero()[:, 0]
    if len(left):
        _lower(found, climbed(model, batch.take(left), threat, rng.at("again"), margin_loss), left)
    return {**found, "once": once}


def _towards_runner_up(model: Model, batch: Batch, threat: ThreatModel, rng: Draws) -> dict[str, Tensor]:
    """Climb towards the likeliest wrong class of the clean input; any wrong class counts."""
    with torch.no_grad():
        target = likeliest(model(batch.x, batch.ids), batch.y, 1)[:, 0]
    lookup = Lookup(batch.ids)

    def loss(logits: Logits, some: Batch) -> PerExample:
        aimed = target[lookup.rows(some.ids)]
        return cross_entropy(logits, some.towards(aimed))

    return climbed(model, batch, threat, rng, loss)


def _whole_box(model: Model, batch: Batch, threat: ThreatModel, rng: Draws) -> dict[str, Tensor]:
    """Climb the margin from a start inside the threat, with every input of the box allowed."""
    eps = extent(threat.constraint, batch.x, model.bounds)
    return climbed(model, batch, threat, rng, margin_loss, eps=eps)


def _noise(model: Model, batch: Batch, threat: ThreatModel, rng: Draws) -> dict[str, Tensor]:
    """Random draws, by turns inside the ball and on its surface; without a gradient."""
    found, every = _nothing(batch), torch.arange(len(batch), device=batch.ids.device)
    with torch.no_grad():
        for draw in range(within_budget(NOISE_DRAWS, threat)):
            x = _drawn(model, batch, threat.constraint, rng.at("noise", draw), surface=draw % 2 == 1)
            height = margin(model(x, batch.ids), batch).nan_to_num(nan=-torch.inf)
            _lower(found, fallen(height, x), every)
    return found


def _nothing(batch: Batch) -> dict[str, Tensor]:
    """The columns of an attack that has not begun: the clean inputs, at an infinite margin."""
    return fallen(torch.full_like(batch.x.flatten(1)[:, 0], torch.inf), batch.x.clone())


def _drawn(model: Model, batch: Batch, constraint: Constraint, rng: Draws, *, surface: bool) -> Inputs:
    if not surface:
        return constraint.sample(batch, model.bounds, rng)
    direction = rng.normal(batch.ids, *batch.x.shape[1:], dtype=batch.x.dtype)
    step = constraint.eps * constraint.steepest(direction, batch.x, model.bounds)
    return constraint.project(batch.x + step, batch.x, model.bounds)


def _judged(
    attack: Attack, model: Model, batch: Batch, threat: ThreatModel, rng: Draws, looks: int
) -> dict[str, Tensor]:
    """Where the attack ends, and the margin there: not above zero where most of the `looks` say so."""
    meter = Metered(model, batch, threat)
    try:
        x_adv = attack(meter, batch, threat, rng=rng)
    except BudgetSpent:
        x_adv = meter.found()

    with torch.no_grad():
        seen = torch.stack([margin(model(x_adv, batch.ids), batch) for _ in range(looks)])
    return fallen(seen.nan_to_num(nan=-torch.inf).sort(0).values[looks // 2], x_adv)


def _black_box(
    model: Model, batch: Batch, threat: ThreatModel, rng: Draws, looks: int = 1
) -> dict[str, Tensor]:
    """Square alone, from a cold start."""
    return _judged(Square(queries=SEARCHES), model, batch, threat, rng.at("search"), looks)


def _transferred(
    model: Model, batch: Batch, threat: ThreatModel, rng: Draws, looks: int = 1
) -> dict[str, Tensor]:
    """Examples made on the surrogates, to be compared with what this model's own gradients do."""
    return _judged(Transfer(), model, batch, threat, rng.at("transfer"), looks)


def again(attacks: tuple[Attack, ...]) -> Probe:
    """A fresh pass of the suite over the standing examples closest to the boundary."""

    def run(model: Model, batch: Batch, threat: ThreatModel, rng: Draws, looks: int = 1) -> dict[str, Tensor]:
        found = _nothing(batch)
        for place, attack in enumerate(attacks):
            left = (~found["broken"]).nonzero()[:, 0]
            if not len(left):
                break
            _lower(
                found, _judged(attack, model, batch.take(left), threat, rng.at("again", place), looks), left
            )
        return found

    return Probe(AGAIN, "none", run, on="closest", voted=partial(run, looks=VOTES))


PROBES: tuple[Probe, ...] = (
    Probe("steadiness", "none", steadiness, breaks=False),
    Probe("gradients", "gradients", gradients, breaks=False),
    Probe("cross-entropy", "gradients", _by(cross_entropy), queries=STEPS + 1),
    Probe("small-cross-entropy", "gradients", _by(small_cross_entropy), queries=STEPS + 1),
    Probe("one-step", "gradients", _one_step, queries=2),
    Probe("margin", "gradients", _margin_twice, queries=2 * (STEPS + 1)),
    Probe("probability-margin", "gradients", _by(probability_margin), queries=STEPS + 1),
    Probe("runner-up", "gradients", _towards_runner_up, queries=STEPS + 2),
    Probe("whole-box", "gradients", _whole_box, breaks=False),
    Probe("noise", "labels", _noise, on="standing"),
    Probe("search", "scores", _black_box, voted=partial(_black_box, looks=VOTES)),
    Probe("transfer", "gradients", _transferred, voted=partial(_transferred, looks=VOTES)),
)
"""Everything but the fresh pass, which `again` makes of a suite's attacks."""


def probes_for(threat: ThreatModel, attacks: tuple[Attack, ...] = ()) -> tuple[Probe, ...]:
    """The probes that the threat model allows. With eps 0 there is no ball to probe, only the model itself."""
    probes = (*PROBES, again(attacks)) if attacks else PROBES
    if threat.constraint.eps == 0:
        probes = tuple(probe for probe in probes if probe.name in {"steadiness", "gradients"})
    if not isinstance(threat.constraint, (Linf, L2, L1)):
        probes = tuple(probe for probe in probes if probe.name != "search")
    if threat.goal is not None:
        probes = tuple(probe for probe in probes if probe.name != "runner-up")
    if not threat.surrogates:
        probes = tuple(probe for probe in probes if probe.name != "transfer")
    return tuple(probe for probe in probes if threat.gives(probe.needs))


def probing_threat(threat: ThreatModel, columns: Columns) -> ThreatModel:
    """The threat model that probes work under: one with an eps.

    A minimum-norm run has none; its probes work at the median of the distances that it found.
    """
    constraint = threat.constraint
    if constraint.eps == torch.inf:
        found = columns["distance"][columns["correct"] & columns["distance"].isfinite()]
        constraint = constraint.resized(float(found.median()) if len(found) else 0.0)
    return replace(threat, constraint=constraint)


def limit(threat: ThreatModel, access: Access, needed: Access) -> str:
    """Who keeps what is needed from being seen: the model, which gives no more than `access`, or the threat model."""
    if not replace(threat, access=access).gives(needed):
        return f"the model gives {access} only"
    return f"the threat model allows {'nothing to be seen' if threat.access == 'none' else f'{threat.access} only'}"


def within_budget(n: int, threat: ThreatModel) -> int:
    """So many queries, or what the threat model allows if that is fewer."""
    return n if threat.queries is None else min(n, threat.queries)


def standing(columns: Columns, threat: ThreatModel) -> Mask:
    """Who is right and was not broken; of a minimum-norm run, by nothing within 1.05 times the probes' eps.

    The margin is for the last bisections: a probe that breaks an example just inside its known distance says nothing
    against it.
    """
    held = columns["correct"] & columns.get("eligible", torch.ones_like(columns["correct"]))
    if threat.constraint.eps < torch.inf:
        return held & ~columns["success"]
    return held & (columns["distance"] > 1.05 * probing_threat(threat, columns).constraint.eps)


def rows_for(
    probe: Probe, columns: Columns, threat: ThreatModel, rng: Draws, most: int | None = None
) -> Rows:
    """Which examples a probe runs on, in source order; drawn by their ids, so that shards do not matter.

    With `most` they are at most so many of those.
    """
    n = SAMPLE if most is None else min(most, SAMPLE)
    if probe.on == "correct":
        among = columns["correct"] & columns.get("eligible", torch.ones_like(columns["correct"]))
        return sample_rows(columns, among, rng, n)
    held = standing(columns, threat)
    if probe.on == "standing":
        return sample_rows(columns, held, rng, n)
    n = FRESH_ROWS if most is None else min(most, FRESH_ROWS)
    closeness = columns.get("attacked_probability_margin", columns["margin"]).double().nan_to_num(nan=-1.0)
    rows = held.nonzero()[:, 0]
    return rows[closeness[rows].argsort(stable=True)[:n]].sort().values


@dataclass(frozen=True)
class Probed:
    """What a probe returned, and on which rows."""

    rows: Rows
    columns: Columns


Found = Mapping[str, Probed]
"""What each probe returned, by its name."""
