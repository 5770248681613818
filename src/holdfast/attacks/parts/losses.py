"""Losses that attacks maximise, functions that depend on a norm, and records of what an attack has found."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.core.batch import Batch, Lookup, pick
from holdfast.core.constraints import Constraint, Norm
from holdfast.core.errors import UsageError
from holdfast.core.meter import margin
from holdfast.core.model import Bounds, Model
from holdfast.core.outputs import scale
from holdfast.core.types import Inputs, Labels, Logits, Mask, PerExample, Rows

__all__ = [
    "Loss",
    "aims",
    "cross_entropy",
    "dlr",
    "likeliest",
    "margin",
    "margin_loss",
    "probability_margin",
    "scaled_cross_entropy",
]

Loss = Callable[[Logits, Batch], PerExample]
"""function `loss(logits, batch)` that returns one number for each example, which attacks maximise"""

_TINY = 1e-12  # as in the authors' code of DLR
_DIFFERENCE = 4.0  # between the two largest scaled logits: 1, 2 and 4 were tried with PGD on eight networks


def cross_entropy(logits: Logits, batch: Batch) -> PerExample:
    """Return the cross-entropy of the label for each example. With targets, return minus the cross-entropy of the
    target class.
    """
    if batch.target is None:
        return F.cross_entropy(logits, batch.y, reduction="none")
    return -F.cross_entropy(logits, batch.target, reduction="none")


def margin_loss(logits: Logits, batch: Batch) -> PerExample:
    """Return minus the margin of each example, as a loss for attacks (Carlini & Wagner, "Towards evaluating the
    robustness of neural networks", 2017, f6).
    """
    return -margin(logits, batch)


def probability_margin(logits: Logits, batch: Batch) -> PerExample:
    """Return minus the margin between class probabilities instead of logits, as a bounded loss for attacks (Ma et al.,
    arXiv:2411.15210).

    Large logits therefore do not dominate.
    """
    return -margin(logits.softmax(1), batch)


def scaled_cross_entropy(logits: Logits, batch: Batch) -> PerExample:
    """Return the cross-entropy of logits that are scaled so that the two largest ones of each example differ by 4, as a
    loss for attacks (Yu & Xu, "Efficient Loss Function by Minimizing the Detrimental Effect of Floating-Point Errors
    on Gradient-Based Attacks", CVPR 2023).

    The gradient does not vanish where the softmax of a confident model saturates, and unlike that of the margin it
    depends on all classes. The factor is a constant for the gradient. Differs from the paper: the difference is 4
    instead of 1, which breaks more examples of undefended networks.
    """
    highest = logits.detach().topk(2, dim=1).values
    factor = _DIFFERENCE / (highest[:, 0] - highest[:, 1]).clamp_min(_TINY)
    return cross_entropy(logits * factor[:, None], batch)


def dlr(logits: Logits, batch: Batch) -> PerExample:
    """Return the difference of logits ratio (DLR) of each example, a loss for attacks that does not depend on the scale
    of the logits (Croce & Hein, ICML 2020, arXiv:2003.01690).

    It does not depend on the scale of the logits. It needs three classes, or four with targets; with fewer classes it
    is minus the margin, which then ranks points equally.
    """
    classes = logits.shape[1]
    if classes < (3 if batch.target is None else 4):
        return margin_loss(logits, batch)
    ordered, order = logits.sort(dim=1)
    label_logit = logits.gather(1, batch.y[:, None])[:, 0]
    if batch.target is None:
        first = order[:, -1] == batch.y
        best_other = torch.where(first, ordered[:, -2], ordered[:, -1])
        return -(label_logit - best_other) / (ordered[:, -1] - ordered[:, -3] + _TINY)
    target_logit = logits.gather(1, batch.target[:, None])[:, 0]
    return -(label_logit - target_logit) / (ordered[:, -1] - 0.5 * (ordered[:, -3] + ordered[:, -4]) + _TINY)


def likeliest(logits: Logits, y: Labels, k: int) -> Tensor:
    """Return the `k` wrong classes with the largest logits for each example, largest first, int64 (n, min(k, classes -
    1)).
    """
    other_logits = logits.scatter(1, y[:, None], -torch.inf)
    # stable, so that ties are in the order of the classes on every device
    return other_logits.argsort(dim=1, descending=True, stable=True)[:, : min(k, logits.shape[1] - 1)]


def aims(model: Model, batch: Batch, k: int) -> list[Labels | None]:
    """Return the target classes for the runs of a targeted attack, one run after another: the wrong classes with the
    largest logits, in order. The cost is one forward pass.

    The list is [None], for the goal of the batch itself, if k is 0, if the batch has targets, or if it is empty.
    """
    if not k or batch.target is not None or not len(batch):
        return [None]
    with torch.no_grad():
        return list(likeliest(model(batch.x, batch.ids), batch.y, k).unbind(1))


class Best:
    """Best point that an attack has found for each example over all restarts, which is the point with the lowest
    margin.
    """

    def __init__(self, batch: Batch) -> None:
        self._ids = batch.ids
        self._lookup = Lookup(batch.ids)
        self.x: Inputs = batch.x.clone()
        """best point of each example; the clean input until a point with a lower margin is offered"""
        self.margin: PerExample = torch.full_like(batch.x.flatten(1)[:, 0], torch.inf)
        """margin of the best point; positive while the example survives"""

    @property
    def surviving(self) -> Rows:
        """Positions of the examples that the attack has not broken so far."""
        return (self.margin > 0).nonzero()[:, 0]

    def rows(self, subset: Batch) -> Rows:
        """Return the positions in the whole batch of the examples of `subset`, which is a part of it."""
        return self._lookup.rows(subset.ids)

    def offer(self, subset: Batch, x: Inputs, margin: PerExample) -> Mask:
        """Store those points `x` of the examples `subset` whose margin is lower than that of the best point so far (NaN
        is lowest), and return a mask of the stored points.
        """
        # a full batch, as at the start of most attacks, needs no lookup of rows
        if subset.ids is self._ids:
            lower = ~(margin >= self.margin)
            self.x = pick(lower, x, self.x)
            # NaN counts as broken; as minus infinity it can be compared
            self.margin = torch.where(lower, margin, self.margin).nan_to_num_(
                -torch.inf, torch.inf, -torch.inf
            )
            return lower
        rows = self._lookup.rows(subset.ids)
        lower = ~(margin >= self.margin[rows])
        self.x[rows[lower]] = x[lower]
        self.margin[rows[lower]] = margin[lower].nan_to_num(-torch.inf, torch.inf, -torch.inf)
        return lower


def leeway(logits: Logits) -> PerExample:
    """Return a tolerance for margins: below minus this value, a margin is negative for every batch size despite
    rounding. It is about 1e-5 of the largest logit in float32.
    """
    return 100 * torch.finfo(logits.dtype).eps * scale(logits)


def firmly_broken(logits: Logits, batch: Batch) -> Mask:
    """Return a mask of the examples that the model misclassifies by more than rounding. NaN counts as broken."""
    return ~(margin(logits, batch) > -leeway(logits))


class Closest:
    """Closest broken point that an attack has found for each example, with its distance. Without a broken point it is
    the clean input at an infinite distance.
    """

    def __init__(self, batch: Batch) -> None:
        self._ids = batch.ids
        self._lookup = Lookup(batch.ids)
        self.x: Inputs = batch.x.clone()
        """closest broken point of each example"""
        self.distance: PerExample = torch.full_like(batch.x.flatten(1)[:, 0], torch.inf)
        """distance of the closest broken point from the clean input"""

    @property
    def found(self) -> Mask:
        """Mask of the examples for which a broken point was found."""
        return self.distance < torch.inf

    def rows(self, subset: Batch) -> Rows:
        """Return the positions in the whole batch of the examples of `subset`, which is a part of it."""
        return self._lookup.rows(subset.ids)

    def take(self, subset: Batch) -> "Closest":
        """Return a new record that contains only the closest broken points of the examples of `subset`."""
        rows, record = self.rows(subset), Closest(subset)
        record.x, record.distance = self.x[rows], self.distance[rows]
        return record

    def unsolved(self, subset: Batch, eps: float) -> Mask:
        """Return a mask of the examples of `subset` that an attack must still try, because it has found no broken point
        within eps.

        With infinite eps, return whether its clean input is not misclassified, that is whether a closer point may
        exist.
        """
        return self.distance[self.rows(subset)] > (eps if eps < torch.inf else 0.0)

    def offer(self, subset: Batch, x: Inputs, distance: PerExample, broken: Mask) -> Mask:
        """Store the broken points among `x` that are closer to their clean inputs than the stored ones, and return a
        mask of the examples with a new closest point.
        """
        rows = slice(None) if subset.ids is self._ids else self.rows(subset)
        closer = broken & (distance < self.distance[rows])
        new = closer.nonzero()[:, 0]  # usually few: faster than torch.where over all inputs
        targets = new if isinstance(rows, slice) else rows[new]
        self.x[targets], self.distance[targets] = x[new], distance[new]
        return closer


_USUAL = {"linf": "8/255", "l2": "0.5", "l1": "12", "l0": "10"}
"""example eps of each norm for error messages"""


def expect_norm(constraint: Constraint, attack: object, *kinds: type[Norm]) -> Norm:
    """Return the constraint if it is one of the norms that an attack supports. Raises `UsageError` otherwise."""
    for kind in kinds:
        if isinstance(constraint, kind):
            return constraint
    names = " or ".join(kind.__name__ for kind in kinds)
    raise UsageError(
        f"{type(attack).__name__} minimises {names}; the threat model is {constraint}. "
        f"Choose another threat, or leave the attack out"
    )


def expect_eps(constraint: Constraint, attack: object) -> Constraint:
    """Return the constraint if it has a finite eps, for attacks that need one. Raises `UsageError` otherwise."""
    if constraint.eps < torch.inf:
        return constraint
    norm = constraint.name
    raise UsageError(
        f"{type(attack).__name__} searches for any change within eps, and the threat model {norm} has no eps. "
        f"Give one, as in {norm}:{_USUAL.get(norm, '0.5')}, or choose an attack that searches for the smallest change, "
        f"such as FMN"
    )


def farthest(norm: Norm, x: Inputs, bounds: Bounds) -> PerExample:
    """Return the distance from each input to the farthest valid input."""
    low, high = bounds.like(x)
    return norm.distance(torch.where(high - x > x - low, high, low), x)


def length(gradient: Inputs) -> PerExample:
    """Return the Euclidean length of the gradient of each example, without overflow or underflow of the squares in
    float32.
    """
    flat = gradient.flatten(1)
    largest = flat.abs().amax(1)
    scaled = flat / largest.clamp_min(torch.finfo(flat.dtype).tiny)[:, None]
    size: PerExample = largest * torch.linalg.vector_norm(scaled, dim=1)
    return size


def gap(norm: Norm, grad: Inputs, logits: Logits, batch: Batch, bounds: Bounds) -> PerExample:
    """Return the first-order estimate of the distance from each input to the decision boundary, computed from the
    margin and its gradient.
    """
    slope = (grad * norm.steepest(grad, batch.x, bounds)).flatten(1).sum(1).abs()
    # beyond the boundary, because a margin within rounding does not count as broken
    return (margin(logits, batch).abs() + 2 * leeway(logits)) / slope.clamp_min(1e-30)


def free(grad: Inputs, x: Inputs, bounds: Bounds) -> Inputs:
    """Return the gradient with zeros for the input values that are at the limit of their valid range and that a step
    along the gradient would move out of it.
    """
    low, high = bounds.like(x)
    ahead = torch.addcmul(x, grad.sign(), 1e-6 * (high - low))
    return grad * (ahead.clamp(low, high) == ahead)  # four times faster than masked_fill
