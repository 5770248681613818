"""Counterfactuals, the smallest change of an input, and attributions: the contribution of each input
value to a logit.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, product

import numpy as np
import torch
from torch import Tensor

from holdfast.attacks.fmn import FMN
from holdfast.attacks.hop_skip_jump import HopSkipJump
from holdfast.attacks.parts.losses import firmly_broken, margin_loss
from holdfast.attacks.protocol import Attack, attacked_inputs
from holdfast.attacks.suites import is_possible, suite
from holdfast.core.batch import Batch, decoded, decoded_files, encoded, encoded_files, spread
from holdfast.core.constraints import Constraint, allowed
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.meter import batch_size_for
from holdfast.core.model import Classifier, Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Inputs, Labels, Logits, Mask, PerExample
from holdfast.runs.harness.target import PreparedModel
from holdfast.threats.byte_changes import ByteChanges
from holdfast.threats.byte_differences import applied, edits_of
from holdfast.threats.domains import TEXT
from holdfast.threats.tables import Table, table_of

_ROWS = 128
"""largest number of inputs in one pass; fewer if they are large"""
GAP = 0.01
"""sum of the completeness gaps of the segments, as a fraction of the difference of the logits, at which they suffice.
Those of the segments have both signs, so that the gap of the whole path is smaller."""
MOST_NODES = 1024
"""largest number of nodes for one example, since the gap of a ReLU network falls slowly"""
_SEGMENTS, _RULE = 8, 4
"""first number of segments, and nodes in each of them; a network with ReLUs is linear between its breakpoints"""


def _at_once(x: Inputs) -> int:
    """The number of inputs like those of `x` (n, *features) in one pass."""
    return min(_ROWS, batch_size_for(math.prod(x.shape[1:]), x.device.type))


def of_class(logits: Logits, classes: Labels) -> PerExample:
    """Return the logit of one class in each row; of two classes, minus that of the other one."""
    own = logits.gather(1, classes[:, None])[:, 0]
    return own - logits.gather(1, 1 - classes[:, None])[:, 0] if logits.shape[1] == 2 else own


def logits_of_class(model: Model, x: Inputs, classes: Labels) -> PerExample:
    """Return what is explained for each input, as `of_class` does, computed without gradients."""
    with torch.no_grad():
        rows = zip(torch.split(x, _at_once(x)), torch.split(classes, _at_once(x)), strict=True)
        return torch.cat([of_class(model(some), of) for some, of in rows])


def has_gradients(model: Classifier, x: Inputs) -> bool:
    """Return whether the logits of a model depend on its inputs in a way that torch can differentiate."""
    if model.access != "gradients":
        return False
    with torch.enable_grad():
        logits: Tensor = model(x[:1].detach().clone().requires_grad_())
    return logits.requires_grad


def gradient(model: Model, x: Inputs, classes: Labels) -> Inputs:
    """Return the gradient of `of_class` for each example's class with respect to its input `x` (n, *features)."""
    parts = []
    for some, of in zip(torch.split(x, _at_once(x)), torch.split(classes, _at_once(x)), strict=True):
        points = some.detach().clone().requires_grad_()
        with torch.enable_grad():
            total = of_class(model(points), of).sum()
        (grad,) = torch.autograd.grad(total, points)
        parts.append(grad)
    return torch.cat(parts)


def smooth_gradient(model: Model, x: Inputs, classes: Labels, noise: Tensor) -> Inputs:
    """Return the mean gradient at the inputs plus each of the given noises (draws, n, *features)."""
    total = torch.zeros_like(x)
    for drawn in noise:
        total = total + gradient(model, x + drawn, classes)
    return total / len(noise)


@dataclass(frozen=True)
class Integrated:
    """Integrated gradients, and how well they sum to the difference of the logits."""

    values: Inputs
    gap: PerExample
    """|sum of the attributions - difference of the logits| / |difference of the logits|, for each example"""
    nodes: int


def integrated_gradients(
    model: Model, x: Inputs, baseline: Inputs, classes: Labels, *, nodes: int | None = None
) -> Integrated:
    """Return integrated gradients along the straight line from `baseline` to `x` (n, *features).

    With `nodes`, one Gauss-Legendre rule with this number of nodes is used. Otherwise the line is divided into segments
    with a rule of `_RULE` nodes each. Each segment has a completeness gap of its own, and those with the largest gaps
    are halved until the gaps of an example sum to at most `GAP`, or `MOST_NODES` were used. Each node costs a forward
    and a backward pass.
    """
    difference = logits_of_class(model, x, classes) - logits_of_class(model, baseline, classes)
    parts = []
    for k in range(len(x)):
        one, start, of = x[k : k + 1], baseline[k : k + 1], classes[k : k + 1]
        if nodes is None:
            parts.append(_refined(model, one, start, of, float(difference[k])))
        else:
            parts.append((_rule(model, one, start, of, [(0.0, 1.0)], nodes)[0][0], nodes))
    values = torch.stack([part for part, _ in parts])
    error = (values.flatten(1).sum(1) - difference).abs()
    gap = error / difference.abs().clamp_min(torch.finfo(x.dtype).eps)
    return Integrated(values, gap, max(used for _, used in parts))


def _refined(model: Model, x: Inputs, baseline: Inputs, classes: Labels, total: float) -> tuple[Tensor, int]:
    """The attributions of one example, with segments that are halved where their gap is large, and the nodes used."""
    edges = [k / _SEGMENTS for k in range(_SEGMENTS + 1)]
    new = list(pairwise(edges))
    segments: list[tuple[float, float]] = []
    values = x.new_zeros(0, *x.shape[1:])
    gaps, used = x.new_zeros(0), 0
    while new:
        more, rest = _rule(model, x, baseline, classes, new, _RULE)
        segments, values, gaps = segments + new, torch.cat((values, more)), torch.cat((gaps, rest))
        used += _RULE * len(new)
        allowed = GAP * abs(total)
        if float(gaps.sum()) <= allowed:
            break
        order = gaps.argsort(descending=True, stable=True)
        # enough of the largest gaps that the others are half of what is allowed
        left = gaps.sum() - gaps[order].cumsum(0)
        split = order[: int((left > allowed / 2).sum()) + 1][: (MOST_NODES - used) // (2 * _RULE)].tolist()
        halves = [(a, b, (a + b) / 2) for a, b in (segments[k] for k in split)]
        new = [half for a, b, middle in halves for half in ((a, middle), (middle, b))]
        if not new:
            break
        kept = [k for k in range(len(segments)) if k not in set(split)]
        segments, values, gaps = [segments[k] for k in kept], values[kept], gaps[kept]
    return values.sum(0), used


def _rule(
    model: Model,
    x: Inputs,
    baseline: Inputs,
    classes: Labels,
    segments: Sequence[tuple[float, float]],
    nodes: int,
) -> tuple[Inputs, PerExample]:
    """The attributions of one example on each segment of the line (segments, *features), and their gaps (segments)."""
    n_segments = max(1, _at_once(x) // nodes)
    if len(segments) > n_segments:  # the points of all of them may not fit into memory
        starts = range(0, len(segments), n_segments)
        parts = [_rule(model, x, baseline, classes, segments[k : k + n_segments], nodes) for k in starts]
        return torch.cat([values for values, _ in parts]), torch.cat([gaps for _, gaps in parts])
    places, weights = np.polynomial.legendre.leggauss(nodes)
    at = np.concatenate([(a + b) / 2 + (b - a) / 2 * places for a, b in segments])
    weight = np.concatenate([(b - a) / 2 * weights for a, b in segments])
    delta = x - baseline
    grads = gradient(model, baseline + spread(torch.from_numpy(at).to(x), x) * delta, classes.expand(len(at)))
    weighted = delta * spread(torch.from_numpy(weight).to(x), grads) * grads
    values = weighted.view(len(segments), nodes, *x.shape[1:]).sum(1)
    sides = torch.tensor([side for pair in segments for side in pair]).to(x)
    logits = logits_of_class(model, baseline + spread(sides, x) * delta, classes.expand(len(sides)))
    return values, (values.flatten(1).sum(1) - (logits[1::2] - logits[::2])).abs()


def occlusion(
    model: Model, x: Inputs, baseline: Inputs, classes: Labels, window: Sequence[int], stride: Sequence[int]
) -> Inputs:
    """Return for each input value the mean fall of the logit over the windows that contain it, when the values in a
    window are replaced by those of `baseline`.

    `window` and `stride` have one number for each dimension of an input. The last window of a dimension is cut off at
    its end. Costs one forward pass for each window.
    """
    shape = x.shape[1:]
    clean = logits_of_class(model, x, classes)
    total, count = torch.zeros_like(x), torch.zeros(shape, dtype=x.dtype, device=x.device)
    starts = [
        range(0, step * (1 + max(0, math.ceil((size - width) / step))), step)
        for size, width, step in zip(shape, window, stride, strict=True)
    ]
    masks = []
    for corner in product(*starts):
        mask = torch.zeros(shape, dtype=torch.bool, device=x.device)
        mask[tuple(slice(at, at + width) for at, width in zip(corner, window, strict=True))] = True
        masks.append(mask)
    for mask in masks:
        count += mask
    for place in range(len(x)):
        for some in torch.split(torch.stack(masks), _at_once(x)):
            points = torch.where(some, baseline[place], x[place])
            fall = clean[place] - logits_of_class(model, points, classes[place : place + 1].expand(len(some)))
            total[place] += (spread(fall, points) * some).sum(0)
    return total / count.clamp_min(1)


def default_window(shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return window and stride of `occlusion` for inputs of a shape: squares of about a seventh of an image with half
    of it as stride, and single values otherwise.
    """
    if len(shape) != 3:
        return (1,) * len(shape), (1,) * len(shape)
    side = max(2, round(min(shape[1:]) / 7))
    return (shape[0], side, side), (shape[0], max(1, side // 2), max(1, side // 2))


def top_overlap(first: Tensor, second: Tensor, share: float = 0.05) -> float:
    """Return the fraction of the largest absolute attributions of one input that are among the largest of the other.

    `share` is the fraction of the input values that count as largest.
    """
    k = max(1, round(share * first.numel()))
    top = [set(values.flatten().abs().topk(k).indices.tolist()) for values in (first, second)]
    return len(top[0] & top[1]) / k


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Return Spearman's rank correlation of two attributions; 0 if one of them is constant.

    Input values to which one of them attributes nothing are left out, such as a background on which integrated
    gradients are zero: their order would be that of their positions. Other equal values get their mean rank.
    """
    attributed = (first.flatten() != 0) & (second.flatten() != 0)
    ranks = [_mean_ranks(values.flatten()[attributed]) for values in (first, second)]
    a, b = (rank - rank.mean() for rank in ranks)
    size = float(a.norm() * b.norm())
    return float((a * b).sum()) / size if size > 0 else 0.0


def _mean_ranks(values: Tensor) -> Tensor:
    """The rank of each value (n), and for equal values the mean of their ranks."""
    ordered = values.sort().values.contiguous()
    return (
        torch.searchsorted(ordered, values) + torch.searchsorted(ordered, values, right=True)
    ).double() / 2


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
    target: PreparedModel, batch: Batch, threat: ThreatModel, *, rng: Draws, stored: Inputs | None = None
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
        if not constraint.is_ball and not bool(
            allowed(constraint, x_adv, batch.x, target.original.bounds)[0]
        ):
            continue
        if not bool(broken(target, batch, x_adv)[0]):
            continue
        near = _to_boundary(target, batch, x_adv) if constraint.is_ball else x_adv
        size = float(constraint.distance(near, batch.x)[0])
        if size < distance:
            best, by, distance = near, name, size
    if best is None:
        return Counterfactual(None, None, math.inf, inside=False, attack=by)
    inside = bool(allowed(constraint, best, batch.x, target.original.bounds)[0])
    sparse = _sparse(target, batch, threat, best) if inside else None
    table = table_of(constraint)
    if sparse is not None and table is not None:
        shrunk = [_shrunk(target, batch, table, point) for point in (sparse, best)]
        sparse = min(shrunk, key=lambda point: float(constraint.distance(point, batch.x)[0]))
    if sparse is not None and not constraint.is_ball:  # with changes undone, it is also nearer
        best, distance = sparse, float(constraint.distance(sparse, batch.x)[0])
    predicted = int(target.predicted(target.logits(best))[0])
    return Counterfactual(best, sparse, distance, inside, by, predicted)


def broken(target: PreparedModel, batch: Batch, x: Inputs) -> Mask:
    """Return whether the original model predicts another class than the label, or the target class under a goal."""
    judged = target.judged_logits(target.logits(x), batch)
    return firmly_broken(judged, batch)


def changes(x_adv: Inputs, x: Inputs) -> Mask:
    """Return the mask of the values that differ. A value that is missing in both does not."""
    return (x_adv != x) & ~(x_adv.isnan() & x.isnan())


def _searched(
    target: PreparedModel, batch: Batch, threat: ThreatModel, rng: Draws
) -> tuple[list[str], list[Inputs]]:
    """Names of the attacks that were tried, and the point that each of them returned."""
    constraint, names, points = threat.constraint, [], []
    model = target.queried(target.optimised, batch)
    for name, attack, free in _attacks(constraint, threat, target):
        names.append(name)
        limits = replace(threat, constraint=constraint.resized(math.inf)) if free else threat
        points.append(attacked_inputs(attack, model, batch, limits, rng=rng.at("counterfactual", name)))
        if bool(broken(target, batch, points[-1])[0]):
            break
    return names, points


def _attacks(
    constraint: Constraint, threat: ThreatModel, target: PreparedModel
) -> list[tuple[str, Attack, bool]]:
    """Attacks to try, and whether each searches for the smallest change instead of any change within eps."""
    access = "labels" if threat.access == "labels" else target.original.access
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


def _to_boundary(target: PreparedModel, batch: Batch, x_adv: Inputs) -> Inputs:
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


def _sparse(target: PreparedModel, batch: Batch, threat: ThreatModel, x_adv: Inputs) -> Inputs | None:
    """An input inside the constraint with fewer changes, which is broken; None if none was found."""
    if threat.constraint.is_ball:
        return _largest(target, batch, threat, x_adv)
    if isinstance(threat.constraint, ByteChanges):
        return _bytes_undone(target, batch, threat.constraint, x_adv)
    if threat.constraint.domain is TEXT:
        undoing = _words_undone(batch.x, x_adv)
    else:
        order = _order(target, batch, x_adv).tolist()
        changed = changes(x_adv, batch.x).flatten().tolist()
        undoing = [partial(_value_undone, batch.x, place) for place in order if changed[place]]
    point = x_adv
    for undo in undoing:
        undone = undo(point)
        if bool(allowed(threat.constraint, undone, batch.x, target.original.bounds)[0]) and bool(
            broken(target, batch, undone)[0]
        ):
            point = undone
    return point


def _shrunk(target: PreparedModel, batch: Batch, constraint: Table, x_adv: Inputs) -> Inputs:
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
            rows = constraint.project(rows, copies.x, target.original.bounds)
            good = allowed(constraint, rows, copies.x, target.original.bounds) & broken(target, copies, rows)
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


def _bytes_undone(target: PreparedModel, batch: Batch, changes: ByteChanges, x_adv: Inputs) -> Inputs:
    """The changed file with as few of its edits as a search finds, which undoes runs of them and then shorter ones."""
    (old,), (new,) = decoded_files(batch.x), decoded_files(x_adv)
    edits = [single for edit in edits_of(changes, new, old) for single in edit.singles()]
    point, length, queries = x_adv, len(edits), _QUERIES
    while length:
        for start in range(len(edits) - length, -1, -length):
            rest = [*edits[:start], *edits[start + length :]]
            undone = encoded_files([applied(rest, old)], x_adv.shape[1]).to(x_adv)
            if not queries:
                return point
            queries -= 1
            if bool(allowed(changes, undone, batch.x, target.original.bounds)[0]) and bool(
                broken(target, batch, undone)[0]
            ):
                point, edits = undone, rest
        length = min(length // 2, len(edits))
    return point


def _largest(target: PreparedModel, batch: Batch, threat: ThreatModel, x_adv: Inputs) -> Inputs | None:
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
        point = constraint.project(batch.x + step, batch.x, target.original.bounds)
        if bool(broken(target, batch, point)[0]):
            best, high = point, k
        else:
            low = k + 1
    good = best is not None and bool(allowed(constraint, best, batch.x, target.original.bounds)[0])
    return best if good else None


def _order(target: PreparedModel, batch: Batch, x_adv: Inputs) -> Tensor:
    """Positions of the input values, those that matter least for the broken point first."""
    change = (x_adv - batch.x).abs().nan_to_num(0)
    if not has_gradients(target.original, x_adv):
        return change.flatten().argsort(stable=True)
    point = x_adv.detach().clone().requires_grad_()
    with torch.enable_grad():
        loss = margin_loss(target.original(point), batch).sum()
    (grad,) = torch.autograd.grad(loss, point, materialize_grads=True, allow_unused=True)
    return (change * grad.abs().nan_to_num(0) + 1e-12 * change).flatten().argsort(stable=True)
