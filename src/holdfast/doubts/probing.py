"""The probes, which are measurements that test doubts, and the selection of the examples on which each probe is run.

A probe is a pure function of model, batch, threat model and random stream, and returns columns. Doubts share probes:
PGD-20 on the cross-entropy is used by `scale`, `one-step` and `loss-spread`; margin PGD, two restarts of 20 steps, is
used by `black-box` and, with its first restart, by `loss-spread`. All probes use the same random stream, so that two
losses start from the same points.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from holdfast.attacks.protocol import Attack
from holdfast.attacks.square import Square
from holdfast.attacks.transfer import Transfer
from holdfast.core.batch import Batch
from holdfast.core.constraints import Constraint, extent
from holdfast.core.draws import Draws
from holdfast.core.errors import BudgetSpent
from holdfast.core.evidence import Columns
from holdfast.core.lookup import Lookup
from holdfast.core.meter import Metered
from holdfast.core.model import VOTES, Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs, Logits, Mask, PerExample, Rows
from holdfast.doubts.slopes import gradient_properties
from holdfast.doubts.thresholds import FRESH_ROWS, NOISE_DRAWS, SAMPLE
from holdfast.ops.ascent import ascend
from holdfast.ops.logits import change
from holdfast.ops.losses import Loss, cross_entropy, likeliest, margin, margin_loss, probability_margin
from holdfast.ops.sampling import sample_rows


def steadiness(model: Model, batch: Batch, threat: ThreatModel, rng: Draws) -> dict[str, Tensor]:
    """Return how much the logits of each example change, relative to their size, if the model is called again, in
    another order or with a smaller batch.

    `repeat` is the change in a second call, `order` with the batch in reverse order, `batch` with a divided batch, and
    `history` after the other calls, with the same seed of torch. Cost: 6 forward passes. The random state of torch is
    restored.
    """
    backwards = torch.arange(len(batch) - 1, -1, -1, device=batch.ids.device)
    halves = batch.split(max(1, len(batch) // 2))
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        reference = model(batch.x, batch.ids)
        repeated = model(batch.x, batch.ids)
        reversed_order = model(batch.x[backwards], batch.ids[backwards])[backwards]
        parts = torch.cat([model(part.x, part.ids) for part in halves])
        torch.manual_seed(0)
        # the same seed as for `reference`, so that only the calls in between can make a difference
        reseeded = model(batch.x, batch.ids)
    return {
        "repeat": change(reference, repeated),
        "order": change(reference, reversed_order),
        "batch": change(reference, parts),
        "history": change(reference, reseeded),
    }


Run = Callable[[Model, Batch, ThreatModel, Draws], dict[str, Tensor]]
"""function that returns the columns of a probe for a batch; attacks return `broken`, the lowest `margin`, and its input
`x`"""

STEPS = 20
"""number of gradient steps of the short attacks"""
REACH = 2.5
"""path length of a short attack in multiples of eps, with a constant step size, as in Madry et al."""
SMALL = 0.01
"""factor by which logits are multiplied for the doubt `scale`"""
SEARCHES = 1000
"""number of queries of the black-box search"""
AGAIN = "again"
"""name of the probe that runs the suite once more"""


@dataclass(frozen=True)
class Probe:
    """A measurement or attack on a small number of examples, whose result decides whether doubts are raised."""

    name: str
    needs: Access
    run: Run
    on: Literal["correct", "surviving", "closest"] = "correct"
    """examples that the probe runs on: a sample of the correct ones (`correct`), a sample of the surviving ones
    (`surviving`), or the surviving ones with the lowest margin (`closest`)"""
    breaks: bool = True
    """whether the inputs of the probe are inside the threat model, so that a broken example counts against the suite"""
    queries: int = 0
    """largest number of queries for an example; 0 if the probe respects the budget of the threat model"""
    voted: Run | None = None
    """variant for a randomised model, in which a majority of votes decides whether a final input is adversarial; None
    if the probe has no final inputs"""


def probe_title(probe: str) -> str:
    """Return a description of a probe for use in a sentence, such as `the probe noise`."""
    return "a fresh pass of the suite" if probe == AGAIN else f"the probe {probe}"


def counts(probe: Probe, threat: ThreatModel) -> bool:
    """Return whether adversarial examples that a probe finds are inside the threat model, including its limit on
    queries.
    """
    return probe.breaks and within_budget(probe.queries, threat) == probe.queries


def fallen(margin: PerExample, x: Inputs) -> dict[str, Tensor]:
    """Return the result of an attack as columns: the lowest margin of each example, whether it is broken (margin at
    most 0 or NaN), and the input.
    """
    return {"broken": ~(margin > 0), "margin": margin, "x": x}


def short_pgd(
    model: Model, batch: Batch, threat: ThreatModel, rng: Draws, loss: Loss, *, eps: float | None = None
) -> dict[str, Tensor]:
    """Return the columns of a short PGD attack from a random start inside the threat model. If `eps` is given, it is
    the radius of the ball for the steps.
    """
    ball = threat.constraint if eps is None else threat.constraint.resized(eps)
    start = threat.constraint.sample(batch, model.bounds, rng.at("start"))
    x, height = ascend(model, batch, start, loss, ball, steps=STEPS, step_size=REACH * ball.eps / STEPS)
    return fallen(height, x)


def _by(loss: Loss) -> Run:
    def run(model: Model, batch: Batch, threat: ThreatModel, rng: Draws) -> dict[str, Tensor]:
        return short_pgd(model, batch, threat, rng, loss)

    return run


def _lower(lowest: dict[str, Tensor], attempt: dict[str, Tensor], rows: Rows) -> None:
    """Update the columns of `rows` in `lowest` with those of `attempt` where the margin is lower."""
    lower = ~(attempt["margin"] >= lowest["margin"][rows])  # NaN counts as broken
    for name, values in attempt.items():
        lowest[name][rows[lower]] = values[lower]


def small_cross_entropy(logits: Logits, batch: Batch) -> PerExample:
    """Return the cross-entropy of logits that are multiplied by 0.01, so that a saturated softmax does not cause zero
    gradients.
    """
    return cross_entropy(SMALL * logits, batch)


def _one_step(model: Model, batch: Batch, threat: ThreatModel, rng: Draws) -> dict[str, Tensor]:
    """FGSM: one step of length eps from the clean input."""
    eps = threat.constraint.eps
    x, height = ascend(model, batch, batch.x, cross_entropy, threat.constraint, steps=1, step_size=eps)
    return fallen(height, x)


def _margin_twice(model: Model, batch: Batch, threat: ThreatModel, rng: Draws) -> dict[str, Tensor]:
    """PGD on the margin with two restarts: `broken` by either, `once` by the first."""
    columns = short_pgd(model, batch, threat, rng, margin_loss)
    by_first = columns["broken"].clone()
    surviving = (~by_first).nonzero()[:, 0]
    if len(surviving):
        _lower(
            columns, short_pgd(model, batch.take(surviving), threat, rng.at("again"), margin_loss), surviving
        )
    return {**columns, "once": by_first}


def _towards_runner_up(model: Model, batch: Batch, threat: ThreatModel, rng: Draws) -> dict[str, Tensor]:
    """PGD towards the most likely wrong class of the clean input; any wrong class counts."""
    with torch.no_grad():
        target = likeliest(model(batch.x, batch.ids), batch.y, 1)[:, 0]
    lookup = Lookup(batch.ids)

    def loss(logits: Logits, part: Batch) -> PerExample:
        aimed = target[lookup.rows(part.ids)]
        return cross_entropy(logits, part.towards(aimed))

    return short_pgd(model, batch, threat, rng, loss)


def _whole_box(model: Model, batch: Batch, threat: ThreatModel, rng: Draws) -> dict[str, Tensor]:
    """PGD on the margin from a start inside the threat model, with every input inside the bounds allowed."""
    # the diagonal of the box does not depend on the batch, as the largest distance of an example would
    eps = extent(threat.constraint, batch.x, model.bounds)
    return short_pgd(model, batch, threat, rng, margin_loss, eps=eps)


def _noise(model: Model, batch: Batch, threat: ThreatModel, rng: Draws) -> dict[str, Tensor]:
    """Random inputs, alternately inside the ball and on its surface, without gradients."""
    columns, all_rows = _nothing(batch), torch.arange(len(batch), device=batch.ids.device)
    with torch.no_grad():
        for draw in range(within_budget(NOISE_DRAWS, threat)):
            # every second point is on the surface, where more examples break than inside
            x = _drawn(model, batch, threat.constraint, rng.at("noise", draw), surface=draw % 2 == 1)
            height = margin(model(x, batch.ids), batch).nan_to_num(nan=-torch.inf)
            _lower(columns, fallen(height, x), all_rows)
    return columns


def _nothing(batch: Batch) -> dict[str, Tensor]:
    """The columns of an attack before its start: the clean inputs with an infinite margin."""
    return fallen(torch.full_like(batch.x.flatten(1)[:, 0], torch.inf), batch.x.clone())


def _drawn(model: Model, batch: Batch, constraint: Constraint, rng: Draws, *, surface: bool) -> Inputs:
    if not surface:
        return constraint.sample(batch, model.bounds, rng)
    direction = rng.normal(batch.ids, *batch.x.shape[1:], dtype=batch.x.dtype)
    step = constraint.eps * constraint.steepest(direction, batch.x, model.bounds)
    return constraint.project(batch.x + step, batch.x, model.bounds)


def _judged(
    attack: Attack, model: Model, batch: Batch, threat: ThreatModel, rng: Draws, votes: int
) -> dict[str, Tensor]:
    """The result of an attack, with its median margin over `votes` forward passes."""
    meter = Metered(model, batch, threat)
    try:
        x_adv = attack(meter, batch, threat, rng=rng)
    except BudgetSpent:
        x_adv = meter.adversarial()

    with torch.no_grad():
        margins = torch.stack([margin(model(x_adv, batch.ids), batch) for _ in range(votes)])
    # the median: the worst of several passes would break any example of a model that errs now and then
    return fallen(margins.nan_to_num(nan=-torch.inf).sort(0).values[votes // 2], x_adv)


def _black_box(
    model: Model, batch: Batch, threat: ThreatModel, rng: Draws, votes: int = 1
) -> dict[str, Tensor]:
    """Square Attack from its own random start, without gradients."""
    return _judged(Square(queries=SEARCHES), model, batch, threat, rng.at("search"), votes)


def _transferred(
    model: Model, batch: Batch, threat: ThreatModel, rng: Draws, votes: int = 1
) -> dict[str, Tensor]:
    """Examples computed on the surrogates, for a comparison with attacks that use the gradients of the model."""
    return _judged(Transfer(), model, batch, threat, rng.at("transfer"), votes)


def again(attacks: tuple[Attack, ...]) -> Probe:
    """Return the probe that runs the attacks of the suite a second time, on the surviving examples with the lowest
    margin.
    """

    def run(model: Model, batch: Batch, threat: ThreatModel, rng: Draws, votes: int = 1) -> dict[str, Tensor]:
        columns = _nothing(batch)
        for place, attack in enumerate(attacks):
            surviving = (~columns["broken"]).nonzero()[:, 0]
            if not len(surviving):
                break
            _lower(
                columns,
                _judged(attack, model, batch.take(surviving), threat, rng.at("again", place), votes),
                surviving,
            )
        return columns

    return Probe(AGAIN, "none", run, on="closest", voted=partial(run, votes=VOTES))


PROBES: tuple[Probe, ...] = (
    Probe("steadiness", "none", steadiness, breaks=False),
    Probe("gradients", "gradients", gradient_properties, breaks=False),
    Probe("cross-entropy", "gradients", _by(cross_entropy), queries=STEPS + 1),
    Probe("small-cross-entropy", "gradients", _by(small_cross_entropy), queries=STEPS + 1),
    Probe("one-step", "gradients", _one_step, queries=2),
    Probe("margin", "gradients", _margin_twice, queries=2 * (STEPS + 1)),
    Probe("probability-margin", "gradients", _by(probability_margin), queries=STEPS + 1),
    Probe("runner-up", "gradients", _towards_runner_up, queries=STEPS + 2),
    Probe("whole-box", "gradients", _whole_box, breaks=False),
    Probe("noise", "labels", _noise, on="surviving"),
    Probe("search", "scores", _black_box, voted=partial(_black_box, votes=VOTES)),
    Probe("transfer", "gradients", _transferred, voted=partial(_transferred, votes=VOTES)),
)
"""all probes except the new run of the suite, which `again` returns"""


def probes_for(threat: ThreatModel, attacks: tuple[Attack, ...] = ()) -> tuple[Probe, ...]:
    """Return the probes that are possible under a threat model. If eps is 0, these are only the ones that do not change
    inputs.
    """
    probes = (*PROBES, again(attacks)) if attacks else PROBES
    if threat.constraint.eps == 0:
        probes = tuple(probe for probe in probes if probe.name in {"steadiness", "gradients"})
    if not threat.constraint.in_input_units:
        probes = tuple(probe for probe in probes if probe.name != "search")
    if threat.goal is not None:
        # the threat model states the class to aim at
        probes = tuple(probe for probe in probes if probe.name != "runner-up")
    if not threat.surrogates:
        probes = tuple(probe for probe in probes if probe.name != "transfer")
    return tuple(probe for probe in probes if threat.gives(probe.needs))


def probing_threat(threat: ThreatModel, columns: Columns) -> ThreatModel:
    """Return the threat model of a run. An infinite radius eps is replaced by a finite one, which probes need.

    For a minimum-norm run, it is the median distance of the adversarial examples.
    """
    constraint = threat.constraint
    if constraint.eps == torch.inf:
        distances = columns["distance"][columns["correct"] & columns["distance"].isfinite()]
        constraint = constraint.resized(float(distances.median()) if len(distances) else 0.0)
    return replace(threat, constraint=constraint)


def limit(threat: ThreatModel, access: Access, needed: Access) -> str:
    """Return in words why a probe lacks the access that it needs, such as gradients: the model or the threat model does
    not provide it.
    """
    if not replace(threat, access=access).gives(needed):
        return f"the model gives {access} only"
    return f"the threat model allows {('no access' if threat.access == 'none' else f'access to {threat.access} only')}"


def within_budget(n: int, threat: ThreatModel) -> int:
    """Return `n` queries, or the largest number of queries that the threat model permits if that is smaller."""
    return n if threat.queries is None else min(n, threat.queries)


def surviving_examples(columns: Columns, threat: ThreatModel) -> Mask:
    """Return the mask of the examples that survive all attacks of the suite.

    For a minimum-norm run, these are the examples that were not broken within 1.05 times the eps of the probes. The
    factor allows for inaccurate distances: a probe that breaks an example just inside its known distance is no evidence
    against the run.
    """
    surviving = columns["correct"] & columns.get("eligible", torch.ones_like(columns["correct"]))
    if threat.constraint.eps < torch.inf:
        return surviving & ~columns["success"]
    return surviving & (columns["distance"] > 1.05 * probing_threat(threat, columns).constraint.eps)


def rows_for(
    probe: Probe, columns: Columns, threat: ThreatModel, rng: Draws, most: int | None = None
) -> Rows:
    """Return the row indices of the examples on which a probe is run, at most `most`, in the order of the data.

    A sample depends on ids only, so that shards have no influence.
    """
    n = SAMPLE if most is None else min(most, SAMPLE)
    if probe.on == "correct":
        among = columns["correct"] & columns.get("eligible", torch.ones_like(columns["correct"]))
        return sample_rows(columns, among, rng, n)
    surviving = surviving_examples(columns, threat)
    if probe.on == "surviving":
        return sample_rows(columns, surviving, rng, n)
    n = FRESH_ROWS if most is None else min(most, FRESH_ROWS)
    # a margin in probability is at least -1, so that examples with NaN are among the first
    closeness = columns.get("attacked_probability_margin", columns["margin"]).double().nan_to_num(nan=-1.0)
    rows = surviving.nonzero()[:, 0]
    return rows[closeness[rows].argsort(stable=True)[:n]].sort().values


@dataclass(frozen=True)
class Probed:
    """The result of a probe: its columns, and the row indices of the examples on which it was run."""

    rows: Rows
    columns: Columns


ProbeResults = Mapping[str, Probed]
"""examples and returned columns of each probe, by name of the probe"""
