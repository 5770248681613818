"""Gradient ascent on a loss inside a constraint: plain, adaptive (APGD), and of expectations."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from holdfast.attacks.parts.losses import Best, Loss, margin, margin_loss
from holdfast.core.batch import Batch, pick, spread
from holdfast.core.constraints import L1, L2, Constraint, Linf
from holdfast.core.draws import Draws
from holdfast.core.gradients import input_gradient, levelled
from holdfast.core.model import Bounds, Model
from holdfast.core.types import Inputs, Labels, Logits, Mask, PerExample


def unit_noise(batch: Batch, constraint: Constraint, rng: Draws) -> Inputs:
    """Return random noise of length one in the norm of the constraint for each example: uniform for Linf, Gaussian
    otherwise.
    """
    shape, dtype = batch.x.shape[1:], batch.x.dtype
    if isinstance(constraint, Linf):
        noise = 2 * rng.uniform(batch.ids, *shape, dtype=dtype) - 1
    else:
        noise = rng.normal(batch.ids, *shape, dtype=dtype)
    return noise / spread(constraint.distance(noise, torch.zeros_like(noise)).clamp_min(1e-12), noise)


def surface(batch: Batch, constraint: Constraint, bounds: Bounds, rng: Draws) -> Inputs:
    """Return a random starting point on the surface of the ball around each clean input, clipped to valid inputs. For
    L1 it is Gaussian noise projected onto the valid inputs of the ball.
    """
    if isinstance(constraint, L1):
        noise = rng.normal(batch.ids, *batch.x.shape[1:], dtype=batch.x.dtype)
    elif isinstance(constraint, (Linf, L2)):
        noise = constraint.eps * unit_noise(batch, constraint, rng)
    else:
        return constraint.sample(batch, bounds, rng)
    return constraint.project(batch.x + noise, batch.x, bounds)


def near(
    active: Batch, batch: Batch, constraint: Constraint, bounds: Bounds, kind: int, rng: Draws
) -> Inputs:
    """Return a random valid input near each example of `active`, from which an attack learns about the model.

    By `kind` in turn, it is on the surface of the ball, inside it, and on the way to another example of `batch`, which
    every second time is shortened to the ball.
    """
    if kind % 3 == 0:
        return surface(active, constraint, bounds, rng)
    if kind % 3 == 1:
        return constraint.sample(active, bounds, rng)
    others = batch.x[rng.at("other").integers(active.ids, len(batch))]
    share = spread(rng.at("share").uniform(active.ids, 1, dtype=batch.x.dtype)[:, 0], batch.x)
    mixed: Inputs = torch.lerp(active.x, others, share)
    return mixed if kind % 2 else constraint.project(mixed, active.x, bounds)


_TINY = 1e-12  # a mean of zero then gives a step of zero and not NaN


class Adam:
    """The optimiser Adam (Kingma & Ba, "Adam: a method for stochastic optimization", ICLR 2015, arXiv:1412.6980) for
    inputs.
    """

    def __init__(self, like: Inputs, decay: float = 0.9, decay_square: float = 0.999) -> None:
        self._decays = decay, decay_square
        self._mean, self._square = torch.zeros_like(like), torch.zeros_like(like)
        self._steps = 0

    def take(self, rows: torch.Tensor) -> None:
        """Restrict the state of the optimiser to the given rows of the batch, because the other examples are no longer
        attacked.
        """
        self._mean, self._square = self._mean[rows], self._square[rows]

    def __call__(self, gradient: Inputs) -> Inputs:
        """Update the running means with a gradient and return the direction of the next step."""
        mean, scale = self.mean_and_scale(gradient)
        return mean / scale

    def mean_and_scale(self, grad: Inputs) -> tuple[Inputs, Inputs]:
        """Update the running means of Adam with the gradient `grad`, and return the bias-corrected mean and the square
        root of the bias-corrected mean square.
        """
        self._steps += 1
        decay, decay_square = self._decays
        self._mean = torch.lerp(grad, self._mean, decay)
        self._square = torch.lerp(grad**2, self._square, decay_square)
        unbiased = self._square / (1 - decay_square**self._steps)
        return self._mean / (1 - decay**self._steps), unbiased.sqrt() + _TINY


Schedule = Callable[[int, int], float]
"""function `schedule(step, steps)` that returns the factor of the step size"""


def flat(step: int, steps: int) -> float:
    """Return the factor of the step size in a constant schedule, which is 1 in every step."""
    return 1.0


def cosine(step: int, steps: int) -> float:
    """Return the factor of the step size in a cosine schedule, which falls from 2 to 0. The total length of all steps
    is about that of a constant schedule.
    """
    return 1.0 + math.cos(math.pi * step / steps)


def gradient(model: Model, batch: Batch, loss: Loss, *, raw: bool = False) -> tuple[Inputs, Logits]:
    """Return the gradient of the summed loss with respect to the inputs of the batch, and the logits, from one forward
    and one backward pass.

    The gradient is zero where the model cuts the graph, for example with a comparison or a rounding to integers. NaN
    and infinity are replaced by zero, except with `raw`.
    """
    x = batch.x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(x, batch.ids)
        if not logits.requires_grad:
            return torch.zeros_like(x), logits
        return input_gradient(loss(logits, batch), x, raw=raw), logits.detach()


def ascend(
    model: Model,
    batch: Batch,
    start: Inputs,
    loss: Loss,
    constraint: Constraint,
    *,
    steps: int,
    step_size: float,
    schedule: Schedule = flat,
    momentum: float = 0.0,
    drop: bool = True,
    keep: Literal["best", "last"] = "best",
    aim: Labels | None = None,
) -> tuple[Inputs, PerExample]:
    """Maximise a loss by gradient ascent inside a constraint from the points `start`, and return for each example the
    point of lowest margin on its path and this margin.

    The margin of each point comes from the forward pass of its gradient, that of the last point from an additional
    forward pass. With `drop`, broken examples are dropped from the path. `keep="last"` returns the end of the path,
    drops no example and makes no additional forward pass (the margin is then that of the last point but one); it is
    used for training and for transfer. `aim` is the class that the loss targets; any misclassification counts as
    success. Cost: `steps` forwards and backwards, and one forward with `keep="best"`.
    """
    best, remaining, x = Best(batch), batch, start.detach()
    direction = torch.zeros_like(x) if momentum else None
    for step in range(steps):
        grad, logits = gradient(model, remaining.at(x) if aim is None else remaining.at(x).towards(aim), loss)
        margins = margin(logits, remaining)
        if keep == "best":
            best.offer(remaining, x, margins)
            surviving = margins > 0
            if drop and not surviving.all():
                if not surviving.any():
                    return best.x, best.margin
                remaining, x, grad = remaining.take(surviving), x[surviving], grad[surviving]
                direction = None if direction is None else direction[surviving]
                aim = None if aim is None else aim[surviving]
        if direction is not None:
            direction = momentum * direction + levelled(grad)
            grad = direction
        climb = constraint.steepest(grad, x, model.bounds)
        stepped = torch.add(x, climb, alpha=step_size * schedule(step, steps))
        x = constraint.project(stepped, remaining.x, model.bounds)
    if keep == "last":
        return x, margins
    with torch.no_grad():
        best.offer(remaining, x, margin(model(x, remaining.ids), remaining))
    return best.x, best.margin


def descend(
    model: Model,
    batch: Batch,
    start: Inputs,
    constraint: Constraint,
    *,
    steps: int,
    reach: float,
    aim: Labels | None = None,
) -> tuple[Inputs, PerExample]:
    """Minimise the margin by gradient steps from the points `start`, and return the points of lowest margin and these
    margins. The path is `reach` times eps long, with step sizes along a cosine.
    """
    size = reach * constraint.eps / steps
    return ascend(
        model, batch, start, margin_loss, constraint, steps=steps, step_size=size, schedule=cosine, aim=aim
    )


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
        """Run APGD from the points `start` (n, *features), and return the point of highest loss of each example
        (n, *features), from which another run can start. Examples that are broken on the way are not dropped.

        `aim` (n) has the classes that the loss targets. If it is None, the loss uses the labels of the batch, or its
        target classes if it has some.
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


FIRST, LIMIT = 4, 64
"""numbers of draws of a gradient: the first one, and the largest one"""
STABLE = 0.9
"""share of the gradient (by absolute value) in which the signs of the halves must agree; for pure noise it is 0.71"""
_STEPS = 20  # fewest steps for which the budget must suffice, which limits the number of draws
_STABLE_MOMENTUM = 0.5


def stable_ascent(
    model: Model, batch: Batch, constraint: Constraint, passes: int, noise: float, rng: Draws
) -> tuple[Inputs, int]:
    """Maximise the expected margin loss of a randomised model inside a constraint, and return the last points and the
    largest number of draws of a gradient.

    `noise` is the length of the noise that is added to the inputs of a deterministic model, in multiples of eps. At
    most `passes` forward and backward passes are made for each example. Step sizes follow a cosine from eps / 2 to 0.
    """
    x = constraint.sample(batch, model.bounds, rng.at("start"))
    draws, spent, direction, step = min(FIRST, max(2, passes // (2 * _STEPS))), 0, torch.zeros_like(x), 0
    while spent + 2 * draws <= passes:
        halves = [
            _mean_gradient(
                model, batch.at(x), constraint, draws // 2, noise, rng.at("step", step, "half", half)
            )
            for half in range(2)
        ]
        spent, step = spent + 2 * draws, step + 1
        direction = _STABLE_MOMENTUM * direction + levelled(halves[0] + halves[1])
        size = constraint.eps * (1 + math.cos(math.pi * min(spent / passes, 1.0))) / 4
        moved = x + size * constraint.steepest(direction, x, model.bounds)
        x = constraint.project(moved, batch.x, model.bounds)
        if _agreement(*halves) < STABLE and 2 * draws <= min(LIMIT, passes // (2 * _STEPS)):
            draws *= 2
    return x, draws


def _mean_gradient(
    model: Model, batch: Batch, constraint: Constraint, draws: int, noise: float, rng: Draws
) -> Inputs:
    total = torch.zeros_like(batch.x)
    for draw in range(draws):
        x = batch.x
        if noise:
            x = model.bounds.clamp(
                x + noise * constraint.eps * unit_noise(batch, constraint, rng.at(draw)).to(x)
            )
        total += gradient(model, batch.at(x), margin_loss)[0]
    return total / draws


def _agreement(first: Inputs, second: Inputs) -> float:
    """Share of two gradients, by absolute value, in which they have the same sign; the mean over the examples."""
    size = (first + second).abs().flatten(1)
    same = (first.sign() == second.sign()).flatten(1)
    return float(((size * same).sum(1) / size.sum(1).clamp_min(1e-30)).mean())
