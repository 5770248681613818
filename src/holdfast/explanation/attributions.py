"""Attributions: the contribution of each input value to the logit of one class; of two classes, to the difference of
their logits, because one logit alone may be constant, as that of class 0 is in a model with one output.

Sundararajan et al., "Axiomatic attribution for deep networks", ICML 2017, arXiv:1703.01365, for integrated gradients;
Smilkov et al., "SmoothGrad: removing noise by adding noise", 2017, arXiv:1706.03825; Zeiler & Fergus, "Visualizing and
understanding convolutional networks", ECCV 2014, arXiv:1311.2901, for occlusion. Differs from the papers: the path
integral is computed by Gauss-Legendre quadrature, on segments of the path that are halved where their own completeness
gap is large.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
import torch
from torch import Tensor

from holdfast.core.model import Classifier, Model
from holdfast.core.per_example import spread
from holdfast.core.types import Inputs, Labels, Logits, PerExample

_ROWS = 128
"""largest number of inputs in one pass"""
GAP = 0.01
"""sum of the completeness gaps of the segments, as a fraction of the difference of the logits, at which they suffice.
Those of the segments have both signs, so that the gap of the whole path is smaller."""
MOST_NODES = 1024
"""largest number of nodes for one example, since the gap of a ReLU network falls slowly"""
_SEGMENTS, _RULE = 8, 4
"""first number of segments, and nodes in each of them; a network with ReLUs is linear between its breakpoints"""


def of_class(logits: Logits, classes: Labels) -> PerExample:
    """Return the logit of one class in each row; of two classes, minus that of the other one."""
    own = logits.gather(1, classes[:, None])[:, 0]
    return own - logits.gather(1, 1 - classes[:, None])[:, 0] if logits.shape[1] == 2 else own


def logits_of_class(model: Model, x: Inputs, classes: Labels) -> PerExample:
    """Return what is explained for each input, as `of_class` does, computed without gradients."""
    with torch.no_grad():
        rows = zip(torch.split(x, _ROWS), torch.split(classes, _ROWS), strict=True)
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
    for some, of in zip(torch.split(x, _ROWS), torch.split(classes, _ROWS), strict=True):
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
        for some in torch.split(torch.stack(masks), _ROWS):
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
