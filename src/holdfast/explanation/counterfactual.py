"""Counterfactuals: the smallest change of an input, under the constraint of the threat model, with which the model
predicts another class.

They are searched for with the attacks for minimum norms, or with the attacks of the suite `fast` under constraints that
are no balls. Every counterfactual is judged again by the original model and by the constraint.
"""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from holdfast.attacks.fmn import FMN
from holdfast.attacks.hop_skip_jump import HopSkipJump
from holdfast.attacks.parts.losses import firmly_broken, margin_loss
from holdfast.attacks.protocol import Attack
from holdfast.attacks.suites import is_possible, suite
from holdfast.core.batch import Batch
from holdfast.core.constraints import Constraint, allowed
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.texts import decoded, encoded
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Inputs, Mask
from holdfast.explanation.attributions import has_gradients
from holdfast.runs.harness.target import Target
from holdfast.threats.domains import TEXT
from holdfast.threats.tables.table import Table, table_of

_HALVINGS = 40
"""halvings of the way to the boundary, after which the rest is below the rounding of float32"""
_SHARES = 65
"""shares of a change of a table that are tried at once, twice, so that the rest is below a thousandth of it"""
_QUERIES = 1000
"""largest number of queries of a search without gradients"""


@dataclass(frozen=True)
class Counterfactual:
    """The result of the search for one example. Inputs have the shape (1, *features)."""

    nearest: Inputs | None
    """input with the smallest change that was found; None if none was found"""
    sparse: Inputs | None
    """input with the fewest changed values that was found inside the constraint; None if none was found"""
    distance: float
    """distance of `nearest` in the constraint; infinite if none was found"""
    inside: bool
    """whether `nearest` is inside the constraint"""
    attack: str
    """name of the attack that found it, or names of those that were tried"""
    predicted: int = -1
    """class that the model predicts for `nearest`"""

    @property
    def shown(self) -> Inputs | None:
        """The sparse input if there is one, else the nearest one."""
        return self.nearest if self.sparse is None else self.sparse


def counterfactual(
    target: Target, batch: Batch, threat: ThreatModel, *, rng: Draws, stored: Inputs | None = None
) -> Counterfactual:
    """Search for the counterfactual of one example, `batch` (1), whose label is the class that is left.

    `stored` is an adversarial input (1, *features) of an earlier run, from which the search starts as well.
    """
    constraint = threat.constraint
    names, candidates = _searched(target, batch, threat, rng)
    if stored is not None:
        candidates, names = [*candidates, stored.to(batch.x)], [*names, "the stored input of the run"]
    best, by, distance = None, ", ".join(names) or "none", math.inf
    for name, x_adv in zip(names, candidates, strict=True):
        if not constraint.is_ball and not bool(allowed(constraint, x_adv, batch.x, target.bare.bounds)[0]):
            continue
        if not bool(broken(target, batch, x_adv)[0]):
            continue
        near = _to_boundary(target, batch, x_adv) if constraint.is_ball else x_adv
        size = float(constraint.distance(near, batch.x)[0])
        if size < distance:
            best, by, distance = near, name, size
    if best is None:
        return Counterfactual(None, None, math.inf, inside=False, attack=by)
    inside = bool(allowed(constraint, best, batch.x, target.bare.bounds)[0])
    sparse = _sparse(target, batch, threat, best) if inside else None
    table = table_of(constraint)
    if sparse is not None and table is not None:
        shrunk = [_shrunk(target, batch, table, point) for point in (sparse, best)]
        sparse = min(shrunk, key=lambda point: float(constraint.distance(point, batch.x)[0]))
    if sparse is not None and not constraint.is_ball:  # with changes undone, it is also nearer
        best, distance = sparse, float(constraint.distance(sparse, batch.x)[0])
    predicted = int(target.predicted(target.logits(best))[0])
    return Counterfactual(best, sparse, distance, inside, by, predicted)


def broken(target: Target, batch: Batch, x: Inputs) -> Mask:
    """Return whether the original model predicts another class than the label, or the target class under a goal."""
    judged = target.judged_logits(target.logits(x), batch.y)
    return firmly_broken(judged, batch)


def changes(x_adv: Inputs, x: Inputs) -> Mask:
    """Return the mask of the values that differ. A value that is missing in both does not."""
    return (x_adv != x) & ~(x_adv.isnan() & x.isnan())


def _searched(
    target: Target, batch: Batch, threat: ThreatModel, rng: Draws
) -> tuple[list[str], list[Inputs]]:
    """Names of the attacks that were tried, and the point that each of them returned."""
    constraint, names, points = threat.constraint, [], []
    model = target.queried(target.quick, batch)
    for name, attack, free in _attacks(constraint, threat, target):
        names.append(name)
        limits = replace(threat, constraint=constraint.resized(math.inf)) if free else threat
        points.append(attack(model, batch, limits, rng=rng.at("counterfactual", name)))
        if bool(broken(target, batch, points[-1])[0]):
            break
    return names, points


def _attacks(constraint: Constraint, threat: ThreatModel, target: Target) -> list[tuple[str, Attack, bool]]:
    """Attacks to try, and whether each searches for the smallest change instead of any change within eps."""
    access = "labels" if threat.access == "labels" else target.bare.access
    if constraint.is_ball and access == "gradients" and threat.access == "gradients":
        return [("FMN", FMN(), True)]
    first: list[tuple[str, Attack, bool]] = []
    if constraint.is_ball and is_possible("black-box", constraint, "labels") and threat.gives("labels"):
        first = [("HopSkipJump", HopSkipJump(queries=_QUERIES), True)]
    names = ("fast",) if access == "gradients" else ("black-box", "fast")
    for name in names:
        with suppress(UsageError):  # there is no such suite for this constraint
            members = suite(name, constraint, access).attacks
            return [
                *first,
                *((label, attack, False) for label, attack in members if threat.gives(attack.needs)),
            ]
    return first


def _to_boundary(target: Target, batch: Batch, x_adv: Inputs) -> Inputs:
    """The point nearest to the clean input on the line to `x_adv` that is broken, found by bisection."""
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if bool(broken(target, batch, batch.x + middle * (x_adv - batch.x))[0]):
            high = middle
        else:
            low = middle
    near = batch.x + high * (x_adv - batch.x)
    return near if bool(broken(target, batch, near)[0]) else x_adv


def _sparse(target: Target, batch: Batch, threat: ThreatModel, x_adv: Inputs) -> Inputs | None:
    """An input inside the constraint with fewer changes, which is broken; None if none was found."""
    if threat.constraint.is_ball:
        return _largest(target, batch, threat, x_adv)
    if threat.constraint.domain is TEXT:
        undoing = _words_undone(batch.x, x_adv)
    else:
        order = _order(target, batch, x_adv).tolist()
        changed = changes(x_adv, batch.x).flatten().tolist()
        undoing = [partial(_value_undone, batch.x, place) for place in order if changed[place]]
    point = x_adv
    for undo in undoing:
        undone = undo(point)
        if bool(allowed(threat.constraint, undone, batch.x, target.bare.bounds)[0]) and bool(
            broken(target, batch, undone)[0]
        ):
            point = undone
    return point


def _shrunk(target: Target, batch: Batch, constraint: Table, x_adv: Inputs) -> Inputs:
    """The row with the smallest changes of its numbers, towards the clean row, that the rules allow and that is broken:
    of all numbers together, and then of each, those that matter least first.

    A budget of the norm l1 is the sum of the changes, so that only each is shrunk.
    """
    movable = ~(constraint.tensors.category | constraint.tensors.grouped).to(x_adv.device)
    order = _order(target, batch, x_adv).tolist()
    changed = changes(x_adv, batch.x)[0] & movable
    each = [torch.arange(len(changed), device=x_adv.device) == place for place in order if changed[place]]
    point = x_adv
    for columns in each if constraint.rules.budget.norm == "l1" else [changed, *each]:
        low, high = 0.0, 1.0
        full = point
        for _ in range(2):
            shares = torch.linspace(low, high, _SHARES, dtype=torch.float64, device=point.device)
            rows = torch.where(columns, batch.x + shares[:, None] * (full - batch.x), full.double()).to(point)
            copies = batch.take(torch.zeros(_SHARES, dtype=torch.int64))
            rows = constraint.project(rows, copies.x, target.bare.bounds)
            good = allowed(constraint, rows, copies.x, target.bare.bounds) & broken(target, copies, rows)
            good &= constraint.distance(rows, copies.x) <= constraint.distance(point, batch.x)
            if not good.any():
                break
            first = int(good.nonzero()[0])
            point, high = rows[first : first + 1], float(shares[first])
            low = float(shares[max(first - 1, 0)])
    return point


def _value_undone(x: Inputs, place: int, point: Inputs) -> Inputs:
    undone = point.clone().flatten()
    undone[place] = x.flatten()[place]
    return undone.view_as(point)


def _words_undone(x: Inputs, x_adv: Inputs) -> list[Callable[[Inputs], Inputs]]:
    """For each changed word, a function that returns a text with this word as it was in `x`."""
    old, new = (decoded(row)[0].split(" ") for row in (x, x_adv))
    if len(old) != len(new):  # words were appended
        return []

    def undo(place: int, point: Inputs) -> Inputs:
        words = decoded(point)[0].split(" ")
        return encoded([" ".join([*words[:place], old[place], *words[place + 1 :]])], x.shape[1]).to(x)

    return [partial(undo, place) for place, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]


def _largest(target: Target, batch: Batch, threat: ThreatModel, x_adv: Inputs) -> Inputs | None:
    """The change restricted to its most important values, in the full size of eps, with the fewest of them."""
    constraint = threat.constraint
    size = constraint.distance(x_adv, batch.x)[0]
    grown = constraint.in_input_units and math.isfinite(constraint.eps)
    factor = float(constraint.eps / size) if grown and size > 0 else 1.0
    order = _order(target, batch, x_adv).flip(0)
    delta = (x_adv - batch.x).nan_to_num(0)
    low, high, best = 0, int((delta != 0).sum()), None
    while low < high:
        k = (low + high) // 2
        mask = torch.zeros_like(delta).flatten(1)
        mask[0, order[:k]] = 1.0
        kept = mask.view_as(delta) * delta
        # the full size of eps in each value that changes, since fewer of them are then needed
        step = kept.sign() * constraint.eps if constraint.bounds_each_value and grown else kept * factor
        length = constraint.distance(batch.x + step, batch.x)[0].clamp_min(1e-12)
        if grown and not constraint.bounds_each_value:
            step = step * (constraint.eps / length)
        point = constraint.project(batch.x + step, batch.x, target.bare.bounds)
        if bool(broken(target, batch, point)[0]):
            best, high = point, k
        else:
            low = k + 1
    good = best is not None and bool(allowed(constraint, best, batch.x, target.bare.bounds)[0])
    return best if good else None


def _order(target: Target, batch: Batch, x_adv: Inputs) -> Tensor:
    """Positions of the input values, those that matter least for the broken point first."""
    change = (x_adv - batch.x).abs().nan_to_num(0)
    if not has_gradients(target.bare, x_adv):
        return change.flatten().argsort(stable=True)
    point = x_adv.detach().clone().requires_grad_()
    with torch.enable_grad():
        loss = margin_loss(target.bare(point), batch).sum()
    (grad,) = torch.autograd.grad(loss, point, materialize_grads=True, allow_unused=True)
    return (change * grad.abs().nan_to_num(0) + 1e-12 * change).flatten().argsort(stable=True)
