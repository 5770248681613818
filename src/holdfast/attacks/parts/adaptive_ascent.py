"""APGD (auto-PGD): gradient ascent that adapts its step size to the progress of the loss and restarts from the best
point so far.

Croce & Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks",
ICML 2020, arXiv:2003.01690; for L1: Croce & Hein, "Mind the box: l1-APGD for sparse adversarial attacks", ICML 2021,
arXiv:2103.01208. Constants that are not settings are those of the papers.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from holdfast.attacks.parts.best import Best
from holdfast.attacks.parts.losses import Loss, margin
from holdfast.core.batch import Batch
from holdfast.core.constraints import L1, L2, Constraint, Linf
from holdfast.core.gradients import input_gradient
from holdfast.core.model import Bounds, Model
from holdfast.core.per_example import pick, spread
from holdfast.core.types import Inputs, Labels, Mask, PerExample

_MOMENTUM = 0.75  # alpha of the paper: weight of the new step; the rest is that of the last one
# gaps between checkpoints as shares of the steps: first, decrease from one to the next, smallest; and the gap under L1
_FIRST_CHECK, _CHECK_SHRINKS, _LAST_CHECK = 0.22, 0.03, 0.06
_L1_CHECK = 0.04  # share of the steps between two checks, as in the authors' code
_L1_START, _L1_SPREAD = 0.2, 1.5  # share of features that a step moves at first; changed over moved ones
_L1_SLOWER, _L1_SLOWEST = 1.5, 10.0  # divisor of the step size at stable sparsity; eps over smallest step


@dataclass(frozen=True)
class _Point:
    """One point of each path: the input, gradient and loss at this point, and the margin."""

    x: Inputs
    grad: Inputs
    loss: PerExample
    margin: PerExample

    def take(self, rows: Mask) -> "_Point":
        return _Point(self.x[rows], self.grad[rows], self.loss[rows], self.margin[rows])

    def where(self, chosen: Mask, other: "_Point") -> "_Point":
        """Return these points for the examples for which `chosen` is true, and the points of `other` for the rest."""
        return _Point(
            pick(chosen, self.x, other.x),
            torch.where(spread(chosen, self.grad), self.grad, other.grad),  # unbounded: not for `pick`
            torch.where(chosen, self.loss, other.loss),
            torch.where(chosen, self.margin, other.margin),
        )


class _Pace(Protocol):
    """Computes the steps of the paths; there is one implementation for Linf and L2 and one for L1."""

    def step(self, current: _Point, clean: Inputs, bounds: Bounds) -> Inputs:
        """Return the next point of each example on its path of gradient ascent."""

    def check(self, current: _Point, best: _Point, clean: Inputs) -> _Point:
        """Adapt the step size of each example to the progress of its loss, and return the points from which the paths
        continue.
        """

    def take(self, rows: Mask) -> None:
        """Restrict the state of the step sizes to the examples of the mask `rows`, because the others are no longer
        attacked.
        """


class _Halving:
    """Steps with momentum; the step size halves if too few steps raised the loss since the last checkpoint."""

    def __init__(self, start: _Point, constraint: Constraint, steps: int, rho: float) -> None:
        self._constraint, self._rho = constraint, rho
        self._gap, self._shrinks, self._min_gap = (
            max(int(share * steps), 1) for share in (_FIRST_CHECK, _CHECK_SHRINKS, _LAST_CHECK)
        )
        self._since = 0
        self._size = torch.full_like(start.loss, 2 * constraint.eps)
        self._previous: Inputs | None = None
        self._corners: tuple[Inputs, ...] | None = None
        self._last, self._best_at_check = start.loss, start.loss
        self._rises = torch.zeros_like(start.loss)
        self._reduced = torch.ones_like(start.loss, dtype=torch.bool)

    def step(self, current: _Point, clean: Inputs, bounds: Bounds) -> Inputs:
        direction = self._constraint.steepest(current.grad, current.x, bounds)
        x = self._project(torch.addcmul(current.x, spread(self._size, current.x), direction), clean, bounds)
        if self._previous is not None:
            mixed = (
                (_MOMENTUM * x)
                .add_(current.x, alpha=2 * (1 - _MOMENTUM))
                .sub_(self._previous, alpha=1 - _MOMENTUM)
            )
            x = self._project(mixed, clean, bounds)
        self._previous = current.x
        return x

    def _project(self, x: Inputs, clean: Inputs, bounds: Bounds) -> Inputs:
        """Project onto ball and box; the box around each input under Linf is computed once for the whole path."""
        if isinstance(self._constraint, L2):
            # as in the paper: first onto the ball, then into the box; the result stays in the ball
            delta = x - clean
            # clamped, because the length of an unchanged input is zero
            length = torch.linalg.vector_norm(delta.flatten(1), dim=1).clamp_min(1e-12)
            # slightly inside the ball, as room for rounding
            shrink = (self._constraint.eps * (1 - 1e-6) / length).clamp_max(1)
            return bounds.clamp(torch.addcmul(clean, delta, spread(shrink, x)))
        if not isinstance(self._constraint, Linf):
            return self._constraint.project(x, clean, bounds)
        if self._corners is None:
            eps = self._constraint.eps
            self._corners = tuple(
                self._constraint.project(clean + side * eps, clean, bounds) for side in (-1, 1)
            )
        return torch.clamp(x, *self._corners)

    def check(self, current: _Point, best: _Point, clean: Inputs) -> _Point:
        self._rises = self._rises + (current.loss > self._last)
        self._last, self._since = current.loss, self._since + 1
        if self._since < self._gap:
            return current
        # the paper's second condition, which holds only if the last check did not reduce the step size
        unimproved = ~self._reduced & (self._best_at_check >= best.loss)
        stuck = (self._rises <= self._rho * self._gap) | unimproved
        self._size = torch.where(stuck, self._size / 2, self._size)
        self._reduced, self._best_at_check = stuck, best.loss
        self._rises, self._since = torch.zeros_like(self._rises), 0
        self._gap = max(self._gap - self._shrinks, self._min_gap)
        return best.where(stuck, current)

    def take(self, rows: Mask) -> None:
        self._size, self._rises, self._reduced = self._size[rows], self._rises[rows], self._reduced[rows]
        self._last, self._best_at_check = self._last[rows], self._best_at_check[rows]
        self._previous = None if self._previous is None else self._previous[rows]
        self._corners = None if self._corners is None else tuple(side[rows] for side in self._corners)


class _Sparse:
    """Sign steps on the features with the largest gradients; their number follows the sparsity of the best point."""

    def __init__(self, start: _Point, clean: Inputs, constraint: L1, steps: int, *, fresh: bool) -> None:
        self._constraint, self._features = constraint, clean[0].numel()
        self._gap, self._since = max(int(_L1_CHECK * steps), 1), 0
        self._size = torch.full_like(start.loss, constraint.eps)
        changed = _changed(start.x, clean)
        self._changed = torch.full_like(changed, self._features) if fresh else changed
        self._share = torch.full_like(changed, _L1_START) if fresh else self._share_of(changed)

    def _share_of(self, changed: PerExample) -> PerExample:
        return changed / self._features / _L1_SPREAD

    def step(self, current: _Point, clean: Inputs, bounds: Bounds) -> Inputs:
        magnitude = current.grad.flatten(1).abs()
        rank = ((1 - self._share) * self._features).clamp(0, self._features - 1).long()
        threshold = magnitude.sort(dim=1)[0].gather(1, rank[:, None])
        signs = current.grad.flatten(1).sign() * (magnitude >= threshold)
        length = self._size / (signs.abs().sum(1) + 1e-10)
        stepped = current.x + (signs * length[:, None]).view_as(current.x)
        return self._constraint.project(stepped, clean, bounds)

    def check(self, current: _Point, best: _Point, clean: Inputs) -> _Point:
        self._since += 1
        if self._since < self._gap:
            return current
        eps, changed = self._constraint.eps, _changed(best.x, clean)
        sparser = changed < 0.95 * self._changed
        self._share, self._changed, self._since = self._share_of(changed), changed, 0
        self._size = torch.where(sparser, eps, self._size / _L1_SLOWER).clamp(eps / _L1_SLOWEST, eps)
        return best.where(sparser, current)

    def take(self, rows: Mask) -> None:
        self._size, self._share, self._changed = self._size[rows], self._share[rows], self._changed[rows]


def _changed(x: Inputs, clean: Inputs) -> PerExample:
    """Number of features of each example that differ, in the data type of the inputs."""
    return (x != clean).flatten(1).sum(1).to(x.dtype)


@dataclass(frozen=True)
class Climb:
    """Settings of one run of APGD. A run costs `steps + 1` forward passes and `steps` backward passes, each repeated
    `draws` times.
    """

    loss: Loss
    """loss that is maximised"""
    steps: int
    rho: float = 0.75
    """fraction of the steps since the last check that must raise the loss; if fewer do, the step size is halved"""
    draws: int = 1
    """number of forward passes over which a gradient is averaged"""
    sure: float = 0.5
    """a point counts as broken if more than this fraction of its forward passes misclassifies it"""
    fresh: bool = True
    """whether the start is noise, so that under L1 the number of changed features carries no information"""

    def __call__(
        self, model: Model, batch: Batch, aim: Labels | None, start: Inputs, constraint: Constraint
    ) -> tuple[Inputs, PerExample]:
        """Return for each path its result and the margin of the result.

        The result is the point of lowest margin if it is broken, else the point of highest loss. `aim` is the class
        that the loss targets; any misclassification counts as success. Broken examples are dropped.
        """
        best, remaining = Best(batch), batch
        current = best_point = self._evaluated(model, remaining, aim, start)
        pace = self._pace(current, batch, constraint)
        for step in range(self.steps + 1):
            surviving = current.margin > 0
            if not surviving.all():
                best.offer(remaining, current.x, current.margin)
                if not surviving.any():
                    return best.x, best.margin
                remaining, current, best_point = (
                    remaining.take(surviving),
                    current.take(surviving),
                    best_point.take(surviving),
                )
                aim = None if aim is None else aim[surviving]
                pace.take(surviving)
            if step:
                best_point = current.where(current.loss > best_point.loss, best_point)
                current = pace.check(current, best_point, remaining.x)
            if step < self.steps:
                x = pace.step(current, remaining.x, model.bounds)
                # no step follows the last point, so its gradient is not needed
                current = self._evaluated(model, remaining, aim, x, climbs=step + 1 < self.steps)
        best.offer(remaining, best_point.x, best_point.margin)
        return best.x, best.margin

    def highest(
        self, model: Model, batch: Batch, aim: Labels | None, start: Inputs, constraint: Constraint
    ) -> Inputs:
        """Run APGD and return the point of highest loss of each example, from which another run can start. Examples
        that are broken on the way are not dropped.
        """
        current = best_point = self._evaluated(model, batch, aim, start)
        pace = self._pace(current, batch, constraint)
        for step in range(self.steps):
            x = pace.step(current, batch.x, model.bounds)
            current = self._evaluated(model, batch, aim, x, climbs=step + 1 < self.steps)
            best_point = current.where(current.loss > best_point.loss, best_point)
            current = pace.check(current, best_point, batch.x)
        return best_point.x

    def _pace(self, start: _Point, batch: Batch, constraint: Constraint) -> _Pace:
        if isinstance(constraint, L1):
            return _Sparse(start, batch.x, constraint, self.steps, fresh=self.fresh)
        return _Halving(start, constraint, self.steps, self.rho)

    def _evaluated(
        self, model: Model, batch: Batch, aim: Labels | None, x: Inputs, *, climbs: bool = True
    ) -> _Point:
        """Loss, margin and gradient at `x`; with `climbs=False` no backward pass is made and the gradient is zero."""
        draws = [self._evaluated_once(model, batch, aim, x, climbs=climbs) for _ in range(self.draws)]
        if self.draws == 1:
            return draws[0]
        grad = torch.stack([draw.grad for draw in draws]).mean(0)
        loss = torch.stack([draw.loss for draw in draws]).mean(0)
        # in ascending order, the margin at this rank is not positive if more than this fraction of them are not
        rank = min(int(self.sure * self.draws), self.draws - 1)
        margins = torch.stack([draw.margin for draw in draws]).sort(dim=0)[0]
        return _Point(x, grad, loss, margins[rank])

    def _evaluated_once(
        self, model: Model, batch: Batch, aim: Labels | None, x: Inputs, *, climbs: bool
    ) -> _Point:
        leaf = x.detach().requires_grad_(climbs)
        with torch.set_grad_enabled(climbs):
            logits = model(leaf, batch.ids)
            loss = self.loss(logits, batch if aim is None else batch.towards(aim))
        grad = input_gradient(loss, leaf)
        return _Point(x, grad, loss.detach(), margin(logits.detach(), batch))
