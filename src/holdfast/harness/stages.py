"""Runs a stage: the attack runs on surviving examples, and the original model judges the results."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from holdfast.attacks.protocol import Attack, Learned, Placed
from holdfast.core.batch import Batch
from holdfast.core.constraints import L0, L1, L2, Constraint, Linf, allowed
from holdfast.core.corruptions import Corruptions
from holdfast.core.draws import Draws
from holdfast.core.errors import BudgetSpent, HoldfastError
from holdfast.core.evidence import PARTIAL, Columns
from holdfast.core.guard import score
from holdfast.core.meter import Metered, Spent, margin
from holdfast.core.model import VOTES, Model
from holdfast.core.patches import counts_pixels
from holdfast.core.refused import for_label
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Ids, Inputs, Logits, Mask
from holdfast.harness.detecting import aim_of
from holdfast.harness.plan import Kind, Plan, Stage, fit_stage_of
from holdfast.harness.target import Target
from holdfast.ops.pieces import Room, in_pieces

GALLERY = 12
"""Number of broken examples that are stored for the report."""

_PLACES, _BROKEN_AT_RANDOM = "places", "broken_at_random"

NORMS: Mapping[str, Constraint] = {"linf": Linf(), "l2": L2(), "l1": L1(), "l0": L0()}
"""Norms in which distances are measured under any threat model; for `l0`, see `distance_norms`."""


def distance_norms(threat: Constraint) -> Mapping[str, Constraint]:
    """Norms for distances under a threat model: `l0` counts pixels if the constraint does, otherwise values."""
    return {**NORMS, "l0": L0(per="pixel")} if counts_pixels(threat) else NORMS


def run_clean(plan: Plan, target: Target, batch: Batch, room: Room) -> Columns:
    """Columns of the first stage: the outputs of the model for the clean inputs."""
    rng = Draws(plan.seed).at("stage", "clean")
    return in_pieces(lambda piece: _clean(plan, target, piece, rng), batch, room)


def run_stage(
    stage: Stage,
    plan: Plan,
    target: Target,
    batch: Batch,
    clean: Columns,
    chosen: Mask,
    room: Room,
    broken: Mask | None = None,
) -> Columns:
    """Columns of a stage after the clean one, on the `chosen` examples; `clean` are the columns of the clean stage.

    Keys that start with one of `PARTIAL` contain only some examples, given by their `id`. A pass outside the suite
    stores no inputs for examples that the suite has already `broken`.
    """
    assert stage.member is not None
    knows = stage.adaptive or stage.kind == "detection"
    target = replace(target, quick=target.view if knows else target.quick, aim=stage.aim)
    missed = batch.ids[~broken.to(batch.ids.device)] if broken is not None else batch.ids
    work = _work(stage, plan, target, missed)
    if stage.kind == "attacked":
        return in_pieces(work, batch, room)
    columns = unattacked(clean, stage.kind)
    if isinstance(stage.member.attack, Placed):
        columns |= {name: torch.zeros_like(columns["queries"]) for name in (_PLACES, _BROKEN_AT_RANDOM)}
    room.progress(int((~chosen).sum()))
    if not chosen.any():
        return columns
    for name, values in in_pieces(work, batch.take(chosen), room).items():
        if name.startswith(PARTIAL):
            columns[name] = values
        else:
            columns[name][chosen] = values
    if isinstance(plan.threat.constraint, Corruptions):
        columns["success"] &= clean["correct"] & clean["eligible"]
    return columns


def _work(stage: Stage, plan: Plan, target: Target, missed: Ids) -> Callable[[Batch], dict[str, Tensor]]:
    """The function that a stage applies to each piece of its examples."""
    assert stage.member is not None
    attack, threat, rng = stage.member.attack, plan.threat, Draws(plan.seed).at("stage", stage.name)
    if stage.kind == "attacked":
        return partial(_attacked, attack, plan, target, rng=rng, missed=missed)
    if stage.kind == "detection":
        return partial(_against, attack, plan, target, rng=rng, missed=missed)
    if stage.kind == "transfer":
        return partial(_transferred, attack, plan, target, rng=rng, missed=missed)
    if stage.kind == "curve" or plan.smallest:
        threat = replace(threat, constraint=threat.constraint.resized(torch.inf))
    return partial(_attack, attack, threat, plan, target, rng=rng, missed=missed)


def ready_stage(stage: Stage, by_stage: Mapping[str, Columns]) -> Stage:
    """The stage with the fitted attack, and with the aim at a detector; unchanged if it needs neither."""
    if stage.member is not None and stage.member.against is not None:
        return replace(stage, aim=aim_of(stage.member.against, by_stage["clean"]))
    learned = learned_for(stage, by_stage)
    return stage if learned is None else with_learned(stage, learned)


def learned_for(stage: Stage, by_stage: Mapping[str, Columns]) -> Tensor | None:
    """What the attack of a stage has learned in an earlier stage; None if it learns nothing."""
    first = fit_stage_of((*stage.earlier, stage.name)[0])
    return by_stage[first]["learned.x"] if stage.kind == "attack" and first in by_stage else None


def with_learned(stage: Stage, learned: Tensor) -> Stage:
    """The stage with the attack that uses what was learned."""
    assert stage.member is not None
    attack = stage.member.attack
    assert isinstance(attack, Learned)
    return replace(stage, member=replace(stage.member, attack=attack.fitted(learned)))


def unattacked(clean: Columns, kind: Kind = "attack") -> dict[str, Tensor]:
    """The columns of examples that were not attacked: distance 0 if the clean prediction is wrong, else inf.

    `score` is inf, since there is no misclassified input.
    """
    n = len(clean["id"])
    zeros = torch.zeros(n, dtype=torch.int64)
    distance = torch.where(clean["correct"], torch.inf, 0.0).float()
    return {
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
        **({"score": torch.full_like(clean["margin"], torch.inf)} if kind == "detection" else {}),
    }


def _clean(plan: Plan, target: Target, batch: Batch, rng: Draws) -> dict[str, Tensor]:
    with target.repeatable(rng.at(int(batch.ids[0]))):
        logits, right, _ = _judged(target, batch, batch.x, lambda logits: logits)
    known = logits[:, : target.classes]
    probabilities = known.softmax(1)
    height = margin(logits, batch.towards(None))
    prediction = target.predicted(logits)
    eligible = torch.ones_like(prediction, dtype=torch.bool)
    if plan.threat.goal is not None:
        eligible = (batch.y != plan.threat.goal) & (prediction != plan.threat.goal)
    columns = {
        "id": batch.ids,
        "y": batch.y,
        "digest": digests(batch),
        "prediction": prediction,
        "margin": height,
        "confidence": probabilities.amax(1),
        "entropy": torch.special.entr(probabilities).sum(1),
        "probability_margin": margin(probabilities, batch.towards(None)),
        "correct": right > 0.5,
        "right": right,
        "eligible": eligible,
        "nan": logits.isnan().any(1),
        "is_probability": ((known.sum(1) - 1).abs() < 1e-4) & (known >= 0).all(1),
    }
    if target.rejects:
        columns["rejected"] = target.rejected(logits)
        columns["score"], columns["class_margin"] = score(logits), margin(known, batch.towards(None))
    return {name: values.cpu() for name, values in columns.items()}


def _attacked(
    attack: Attack, plan: Plan, target: Target, batch: Batch, rng: Draws, missed: Ids
) -> dict[str, Tensor]:
    batch = aimed(batch, plan.threat)
    with target.repeatable(rng.at(int(batch.ids[0]))):
        x_adv, spent = returned(attack, plan.threat, target, batch, rng)
        logits, columns = _verdict(plan, target, batch, x_adv)
    probabilities = for_label(logits[:, : target.classes], batch.y).softmax(1)
    columns |= {
        "confidence": probabilities.amax(1),
        "entropy": torch.special.entr(probabilities).sum(1),
        "probability_margin": margin(probabilities, batch.towards(None)),
        **_asked(spent),
        **_kept(plan, batch, x_adv, columns["success"], missed),
    }
    return {name: values.cpu() for name, values in columns.items()}


def _against(
    attack: Attack, plan: Plan, target: Target, batch: Batch, rng: Draws, missed: Ids
) -> dict[str, Tensor]:
    """The scores of the detector for attacked inputs that the network misclassifies."""
    with target.repeatable(rng.at(int(batch.ids[0]))):
        x_adv, spent = returned(attack, plan.threat, target, batch, rng)
        logits, columns = _verdict(plan, target, batch, x_adv)
    wrong = ~(margin(logits[:, : target.classes], batch) > 0)
    columns |= {
        "score": torch.where(wrong, score(logits), torch.inf),
        **_asked(spent),
        **_kept(plan, batch, x_adv, columns["success"], missed),
    }
    return {name: values.cpu() for name, values in columns.items()}


def _attack(
    attack: Attack,
    threat: ThreatModel,
    plan: Plan,
    target: Target,
    batch: Batch,
    rng: Draws,
    missed: Ids,
) -> dict[str, Tensor]:
    batch = aimed(batch, threat)
    with target.repeatable(rng.at(int(batch.ids[0]))):
        x_adv, spent = returned(attack, threat, target, batch, rng)
        _, columns = _verdict(plan, target, batch, x_adv)
        columns |= _at_random(attack, threat, target, batch, rng)
    columns |= {**_asked(spent), "dead": spent.dead, **_kept(plan, batch, x_adv, columns["success"], missed)}
    return {name: values.cpu() for name, values in columns.items()}


def judge_inputs(plan: Plan, target: Target, batch: Batch, x_adv: Inputs, rng: Draws) -> dict[str, Tensor]:
    """Columns of an attack for inputs that were found outside the stages, judged by the original model."""
    batch = aimed(batch, plan.threat)
    with target.repeatable(rng.at(int(batch.ids[0]))):
        _, columns = _verdict(plan, target, batch, x_adv)
    nothing = torch.zeros_like(batch.ids)
    columns |= {"queries": nothing, "first_success": nothing, "backwards": nothing}
    columns |= _kept(plan, batch, x_adv, columns["success"], batch.ids)
    return {name: values.cpu() for name, values in columns.items()}


def _verdict(plan: Plan, target: Target, batch: Batch, x_adv: Inputs) -> tuple[Logits, dict[str, Tensor]]:
    """Logits of the original model, and its verdict: `success` is a wrong prediction inside the threat model."""
    logits, right, right_fresh = _judged(target, batch, x_adv, lambda logits: target.held(logits, batch.y))
    found, constraint = ~(right > 0.5), plan.threat.constraint
    distance = constraint.distance(x_adv, batch.x)
    far = torch.full_like(distance, torch.inf)
    return logits, {
        "id": batch.ids,
        "ran": torch.ones_like(found),
        "success": found & allowed(constraint, x_adv, batch.x, target.bare.bounds),
        "prediction": target.predicted(logits),
        "right": right,
        "right_fresh": right_fresh,
        "height": margin(target.held(logits, batch.y), batch),
        "distance": torch.where(found, distance, far).float(),
        **{
            f"distance_{name}": torch.where(found, norm.distance(x_adv, batch.x), far).float()
            for name, norm in distance_norms(constraint).items()
        },
    }


def _asked(spent: Spent) -> dict[str, Tensor]:
    """The cost columns of an attack."""
    return {"queries": spent.queries, "first_success": spent.first_success, "backwards": spent.backwards}


def _kept(plan: Plan, batch: Batch, x_adv: Inputs, success: Mask, missed: Ids) -> dict[str, Tensor]:
    """Adversarial inputs of examples in `missed`: a few for the report, and all if the plan stores them.

    If the plan runs only the attacks, all inputs are stored, even unsuccessful ones.
    """
    kept = (success & torch.isin(batch.ids, missed)).nonzero()[:, 0]
    shown = kept[: GALLERY if plan.shown else 0]
    columns = {"gallery.id": batch.ids[shown], "gallery.x": batch.x[shown], "gallery.x_adv": x_adv[shown]}
    if plan.keep_adversarial:
        columns |= {"adversarial.id": batch.ids[kept], "adversarial.x": x_adv[kept]}
    if plan.alone:
        columns |= {"adversarial.id": batch.ids, "adversarial.x": x_adv}
    return columns


def _at_random(
    attack: Attack, threat: ThreatModel, target: Target, batch: Batch, rng: Draws
) -> dict[str, Tensor]:
    """The result at one random place of each image, for an attack that chooses among places; else empty."""
    if not isinstance(attack, Placed):
        return {}
    x_adv = attack.at_random(target.bare, batch, threat, rng=rng)
    _, right, _ = _judged(target, batch, x_adv, lambda logits: target.held(logits, batch.y))
    tried = attack.tried(threat, batch.x.shape[1:])
    return {_PLACES: torch.full_like(batch.ids, tried), _BROKEN_AT_RANDOM: (right <= 0.5).long()}


def _transferred(
    attack: Attack, plan: Plan, target: Target, batch: Batch, rng: Draws, missed: Ids
) -> dict[str, Tensor]:
    """Transfer of examples computed on the target and on each surrogate to all of them; see `Evidence.transfer`.

    The verdict on each example is that of the first source whose input the target misclassifies.
    """
    batch, threat = aimed(batch, plan.threat), replace(plan.threat, queries=None)
    metered = Metered(target.asked(target.quick, batch), batch, threat)

    def holds(x: Inputs, own: Logits) -> Tensor:
        with torch.no_grad():
            others = [model(x, batch.ids) for model in threat.surrogates]
        return torch.stack([margin(logits, batch) > 0 for logits in (own, *others)], 1)

    wrong, columns, x_best = [], dict[str, Tensor](), batch.x
    with target.repeatable(rng.at(int(batch.ids[0]))):
        right = holds(batch.x, target.logits(batch.x))
        for models in makers(metered, threat):
            x_adv, _ = returned(attack, replace(threat, surrogates=models), target, batch, rng)
            logits, found = _verdict(plan, target, batch, x_adv)
            wrong.append(~holds(x_adv, target.held(logits, batch.y)))
            first = found["success"] & ~columns["success"] if columns else torch.ones_like(found["success"])
            x_best = torch.where(first.view(-1, *[1] * (x_adv.dim() - 1)), x_adv, x_best)
            columns = {
                name: torch.where(first, found[name], columns.get(name, found[name])) for name in found
            }
    columns |= {
        **_asked(metered.spent),
        **_kept(plan, batch, x_best, columns["success"], missed),
        "transfer.id": batch.ids,
        "transfer.right": right,
        "transfer.wrong": torch.stack(wrong, 1),
    }
    return {name: values.cpu() for name, values in columns.items()}


def makers(target: Model, threat: ThreatModel) -> list[tuple[Model, ...]]:
    """Models for the transfer matrix: the target if gradients are allowed, each surrogate, and all of these."""
    own, each = [(target,)] if threat.gives("gradients") else [], [(model,) for model in threat.surrogates]
    return [*own, *each, *([threat.surrogates] if len(each) > 1 else [])]


def aimed(batch: Batch, threat: ThreatModel) -> Batch:
    """The batch with the target class of the threat model, if it has one."""
    return batch if threat.goal is None else batch.towards(torch.full_like(batch.y, threat.goal))


def returned(
    attack: Attack, threat: ThreatModel, target: Target, batch: Batch, rng: Draws
) -> tuple[Inputs, Spent]:
    """The inputs that an attack returned, or that it had found when its budget was spent; and its cost.

    Raises `HoldfastError` if they violate the threat model.
    """
    meter = Metered(target.asked(target.quick, batch), batch, threat)
    try:
        x_adv = attack(meter, batch, threat, rng=rng)
    except BudgetSpent:
        x_adv = meter.found()
    if x_adv.shape != batch.x.shape or x_adv.dtype != batch.x.dtype:
        raise HoldfastError(
            f"{type(attack).__name__} returned {x_adv.dtype} of shape {tuple(x_adv.shape)} for inputs "
            f"{batch.x.dtype} of shape {tuple(batch.x.shape)}; an attack must return inputs of the same type and shape"
        )
    legal = allowed(threat.constraint, x_adv, batch.x, target.bare.bounds)
    if not legal.all():
        worst = int((~legal).nonzero()[0, 0])
        distance = float(threat.constraint.distance(x_adv[worst : worst + 1], batch.x[worst : worst + 1]))
        raise HoldfastError(
            f"{type(attack).__name__} left the threat model on example {int(batch.ids[worst])}: "
            f"distance {distance:.6g}, allowed {threat.constraint.eps:.6g} inside the bounds; "
            f"report it as a bug of the attack"
        )
    return x_adv.detach(), meter.spent


def _judged(
    target: Target, batch: Batch, x: Inputs, seen: Callable[[Logits], Tensor]
) -> tuple[Logits, Tensor, Tensor]:
    """Logits of the original model, the share of votes in which it is correct, and the share for new votes.

    `seen` computes the logits that are judged. A deterministic model is evaluated once. Ties and NaN count as wrong.
    """

    def holds(logits: Logits) -> Mask:
        return margin(seen(logits), batch) > 0

    logits = target.logits(x)
    if not target.randomised:
        right = holds(logits).float()
        return logits, right, right

    def share() -> Tensor:
        return torch.stack([holds(target.logits(x)).double() for _ in range(VOTES)]).mean(0)

    return logits, share(), share()


def digests(batch: Batch) -> Tensor:
    """SHA-256 of each input's bytes and label, (n, 32) uint8; `compare` pairs examples by it."""
    rows = zip(batch.x.detach().cpu().contiguous().flatten(1).numpy(), batch.y.tolist(), strict=True)
    digests = b"".join(
        hashlib.sha256(row.tobytes() + label.to_bytes(8, "little", signed=True)).digest()
        for row, label in rows
    )
    return torch.frombuffer(bytearray(digests), dtype=torch.uint8).view(-1, 32)
