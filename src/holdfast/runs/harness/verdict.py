"""Runs an attack on a batch, and judges the inputs that it returns with the original model."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from holdfast.attacks.protocol import Attack, Itemised, ThresholdAttack
from holdfast.certifiers.smoothing.smoothing import SmoothedVotes
from holdfast.core.batch import Batch
from holdfast.core.constraints import L0, L1, L2, Constraint, Linf, allowed
from holdfast.core.draws import Draws
from holdfast.core.errors import BudgetSpent, HoldfastError
from holdfast.core.evidence import Columns
from holdfast.core.meter import Metered, Spent, margin
from holdfast.core.model import VOTES
from holdfast.core.per_example import with_missing, without_missing
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Ids, Inputs, Logits, Mask
from holdfast.runs.harness.target import Target

if TYPE_CHECKING:
    from holdfast.runs.harness.plan import Plan

GALLERY = 12
"""Largest number of broken examples that are stored for the report."""

NORMS: Mapping[str, Constraint] = {"linf": Linf(), "l2": L2(), "l1": L1(), "l0": L0()}
"""Norms in which distances are measured under all threat models; for `l0`, see `distance_norms`."""

DISTANCES = ("distance", *(f"distance_{norm}" for norm in NORMS))
"""Names of the columns with the size of the change of each example."""


def distance_norms(threat: Constraint) -> Mapping[str, Constraint]:
    """Return the norms in which sizes of changes are measured. For L0, changed pixels are counted if the threat model
    counts pixels, otherwise changed values.
    """
    return {**NORMS, "l0": L0(per="pixel")} if threat.counts_pixels else NORMS


def unattacked(clean: Columns) -> dict[str, Tensor]:
    """Return the columns of an attack for examples that were not attacked. The distance is 0 for a misclassified clean
    input, otherwise infinite.
    """
    n = len(clean["id"])
    zeros = torch.zeros(n, dtype=torch.int64)
    distance = torch.where(clean["correct"], torch.inf, 0.0).float()
    return {
        # copies, because the kinds of stages write results into these columns
        "id": clean["id"].clone(),
        "ran": torch.zeros(n, dtype=torch.bool),
        "success": torch.zeros(n, dtype=torch.bool),
        "prediction": clean["prediction"].clone(),
        "right": clean["right"].clone(),
        "right_fresh": clean["right"].clone(),
        "height": clean["margin"].clone(),
        "distance": distance.clone(),
        **{f"distance_{norm}": distance.clone() for norm in NORMS},
        "queries": zeros.clone(),
        "first_success": zeros.clone(),
        "backwards": zeros.clone(),
        "dead": torch.zeros(n, dtype=torch.bool),
    }


def judge_inputs(plan: "Plan", target: Target, batch: Batch, x_adv: Inputs, rng: Draws) -> dict[str, Tensor]:
    """Judge inputs that were found outside the stages of a plan, for example by probes, and return the results as the
    columns of an attack.
    """
    batch, x_adv = aimed(batch, plan.threat), with_missing(x_adv, batch.x)
    with target.repeatable(rng.at(int(batch.ids[0]))):
        _, columns = verdict_of(plan, target, batch, x_adv)
    zeros = torch.zeros_like(batch.ids)
    columns |= {"queries": zeros, "first_success": zeros, "backwards": zeros}
    columns |= stored_inputs(plan, batch, x_adv, columns["success"], batch.ids)
    return {name: values.cpu() for name, values in columns.items()}


def verdict_of(plan: "Plan", target: Target, batch: Batch, x_adv: Inputs) -> tuple[Logits, dict[str, Tensor]]:
    """Evaluate the original model on attacked inputs, and return its logits and the results as columns, such as
    `success` and the distances.

    `success` is true for a wrong prediction inside the threat model.
    """
    logits, right, right_fresh = votes(
        target, batch, x_adv, lambda logits: target.judged_logits(logits, batch.y)
    )
    if target.smoothed is not None:
        right = right_fresh = _unless_shown(target.smoothed, batch, x_adv, right)
    # a tie counts against the model
    wrong, constraint = ~(right > 0.5), plan.threat.constraint
    distance = constraint.distance(x_adv, batch.x)
    infinite = torch.full_like(distance, torch.inf)
    return logits, {
        "id": batch.ids,
        "ran": torch.ones_like(wrong),
        "success": wrong & allowed(constraint, x_adv, batch.x, target.bare.bounds),
        "prediction": target.predicted(logits),
        "right": right,
        "right_fresh": right_fresh,
        "height": margin(target.judged_logits(logits, batch.y), batch),
        "distance": torch.where(wrong, distance, infinite).float(),
        **{
            f"distance_{name}": torch.where(wrong, norm.distance(x_adv, batch.x), infinite).float()
            for name, norm in distance_norms(constraint).items()
        },
    }


def _unless_shown(smoothed: SmoothedVotes, batch: Batch, x_adv: Inputs, right: Tensor) -> Tensor:
    """The shares of correct evaluations, in which a smoothed classifier counts as correct unless new draws of the noise
    show that it is wrong.
    """
    rows = (~(right > 0.5)).nonzero()[:, 0]
    shown = smoothed.refuted(batch.take(rows).at(x_adv[rows]))
    right = right.clone()
    right[rows] = (~shown).to(right.dtype)
    return right


def cost_columns(spent: Spent) -> dict[str, Tensor]:
    """Return the cost of an attack as columns: for each example the numbers of queries and of backward passes, and the
    first successful query.
    """
    return {"queries": spent.queries, "first_success": spent.first_success, "backwards": spent.backwards}


def stored_inputs(plan: "Plan", batch: Batch, x_adv: Inputs, success: Mask, missed: Ids) -> dict[str, Tensor]:
    """Return the adversarial inputs of an attack that are stored: a few for the report or, if the plan requires it, all
    of them.

    If the plan runs only the attacks, all inputs are included, even unsuccessful ones.
    """
    stored = (success & torch.isin(batch.ids, missed)).nonzero()[:, 0]
    shown = stored[: GALLERY if plan.shown else 0]
    columns = {"gallery.id": batch.ids[shown], "gallery.x": batch.x[shown], "gallery.x_adv": x_adv[shown]}
    if plan.keep_adversarial:
        columns |= {"adversarial.id": batch.ids[stored], "adversarial.x": x_adv[stored]}
    if plan.alone:
        columns |= {"adversarial.id": batch.ids, "adversarial.x": x_adv}
    return columns


def aimed(batch: Batch, threat: ThreatModel) -> Batch:
    """Return the batch with the target class of a targeted threat model, or unchanged if the threat model is
    untargeted.
    """
    return batch if threat.goal is None else batch.towards(torch.full_like(batch.y, threat.goal))


def returned(
    attack: Attack, threat: ThreatModel, target: Target, batch: Batch, rng: Draws
) -> tuple[Inputs, Spent]:
    """Run an attack on a batch, and return the resulting inputs and the cost. Raises `HoldfastError` if an input
    violates the threat model.

    If the query budget of the attack ran out, the inputs are the best ones that it had found before.
    """
    if isinstance(attack, ThresholdAttack):
        attack = _reading(attack, target)
    attacked = without_missing(batch, target.bare.bounds)
    meter = Metered(target.queried(target.quick, batch), attacked, threat)
    items: Mapping[str, Tensor] = {}
    try:
        if isinstance(attack, Itemised):
            x_adv, items = attack.itemised(meter, attacked, threat, rng=rng)
        else:
            x_adv = attack(meter, attacked, threat, rng=rng)
    except BudgetSpent:
        x_adv = meter.adversarial()
    if x_adv.shape != batch.x.shape or x_adv.dtype != batch.x.dtype:
        raise HoldfastError(
            f"{type(attack).__name__} returned {x_adv.dtype} of shape {tuple(x_adv.shape)} for inputs "
            f"{batch.x.dtype} of shape {tuple(batch.x.shape)}; an attack must return inputs of the same type and shape"
        )
    x_adv = with_missing(x_adv, batch.x)
    legal = allowed(threat.constraint, x_adv, batch.x, target.bare.bounds)
    if not legal.all():
        worst = int((~legal).nonzero()[0, 0])
        distance = float(threat.constraint.distance(x_adv[worst : worst + 1], batch.x[worst : worst + 1]))
        raise HoldfastError(
            f"{type(attack).__name__} left the threat model on example {int(batch.ids[worst])}: "
            f"distance {distance:.6g}, allowed {threat.constraint.eps:.6g} inside the bounds; "
            f"report it as a bug of the attack"
        )
    return x_adv.detach(), replace(meter.spent, items=items)


def _reading(attack: ThresholdAttack, target: Target) -> Attack:
    """Return the attack with the thresholds of the model, if it is a tree ensemble whose thresholds can be read."""
    from holdfast.certifiers.trees.reading import has_trees, inner_values

    if not has_trees(target.bare):
        return attack
    return attack.reading(target.once("thresholds", lambda: inner_values(target.bare)))


def votes(
    target: Target, batch: Batch, x: Inputs, judged_logits: Callable[[Logits], Tensor]
) -> tuple[Logits, Tensor, Tensor]:
    """Return the logits of the original model, and two independent estimates of the fraction of forward passes in which
    each input is classified correctly.

    The second fraction is computed from new votes. `judged_logits` computes the logits that are judged. A deterministic
    model is evaluated once. Ties and NaN count as wrong.
    """

    def is_correct(logits: Logits) -> Mask:
        return margin(judged_logits(logits), batch) > 0

    logits = target.logits(x)
    if not target.randomised:
        right = is_correct(logits).float()
        return logits, right, right

    def share() -> Tensor:
        return torch.stack([is_correct(target.logits(x)).double() for _ in range(VOTES)]).mean(0)

    # the worst case is chosen by the first estimate, so that only the second one is unbiased for it
    return logits, share(), share()


def digests(batch: Batch) -> Tensor:
    """Return the SHA-256 of each example's input and label, (n, 32) uint8, by which comparisons of runs
    pair examples.
    """
    rows = zip(batch.x.detach().cpu().contiguous().flatten(1).numpy(), batch.y.tolist(), strict=True)
    digests = b"".join(
        hashlib.sha256(row.tobytes() + label.to_bytes(8, "little", signed=True)).digest()
        for row, label in rows
    )
    return torch.frombuffer(bytearray(digests), dtype=torch.uint8).view(-1, 32)
