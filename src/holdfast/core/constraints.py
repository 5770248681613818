"""Constraints: sets of inputs that an attacker may use in place of a clean input, such as balls of a norm.

Each constraint is a dataclass with the four functions that attacks need, so that an attack is written once for all
norms: `distance`, `project` (the exact nearest point of ball *and* box), `steepest` (the best step of length one) and
`sample` (a random start). Projections: L2 by the one-dimensional root of its dual; L1 by the sorted breakpoints of its
dual (Croce & Hein, "Mind the box: l1-APGD for sparse adversarial attacks", ICML 2021, arXiv:2103.01208); L0 by the
largest gains (Croce & Hein, "Sparse and imperceivable adversarial attacks", ICCV 2019, arXiv:1909.05040).

A value of a clean input that is NaN is missing. It stays missing: no point of a constraint has a number there, and it
counts as no change.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, Self

import torch
from torch import Tensor

from holdfast.core.batch import Batch, spread
from holdfast.core.draws import Draws
from holdfast.core.model import Bounds
from holdfast.core.names import decibels_text, exact_size, limits_text
from holdfast.core.types import Ids, Inputs, Mask, NonNegative, PerExample

if TYPE_CHECKING:
    from holdfast.threats.domains import Domain

_TINY = 1e-12  # prevents divisions by zero
_ROUNDING = 16  # units in the last place: tolerance of a squared length
_CLOSE = 1e-3  # squared lengths that differ by less than this share of the goal give no reliable slope
_ROUNDINGS = 3  # number of times that an L1 point is shrunk again because of outward rounding in float32
_L1_DENSITY = (
    0.01  # share of the features that one L1 step moves: between a vertex (too slow) and a dense step
)


class Coordinates(Protocol):
    """Protocol of coordinates of a batch in which attacks search for points, each of which stands for an input."""

    @property
    def clean(self) -> Batch:
        """The clean examples."""

    @property
    def batch(self) -> Batch:
        """The clean examples in the coordinates."""

    @property
    def constraint(self) -> "Constraint":
        """The constraint in the coordinates."""

    @property
    def bounds(self) -> Bounds:
        """Range of the coordinates."""

    def inputs(self, points: Inputs, ids: Ids | None = None) -> Inputs:
        """Return the inputs of points (n, *features) of the examples with these ids, by default of all in order. They
        are differentiable, valid, and inside the constraint on inputs if the points are inside the one on points.
        """

    def points(self, x: Inputs) -> Inputs:
        """Return the points of one input `x` (n, *features) for each example. Inputs outside the constraint are
        projected first.
        """


class Constraint(ABC):
    """Base class of a set of allowed inputs around each clean input. `eps` is its size, which may be infinite.

    The facts have the values that hold for a change of any inputs of numbers by an attacker, and a family of
    constraints states those that differ.
    """

    name: ClassVar[str]
    """name on the command line, such as `linf`"""
    is_ball: ClassVar[bool] = False
    """whether the set is the ball of radius eps in a norm"""
    in_input_units: ClassVar[bool] = False
    """whether eps is the size of a change of values, in units of the inputs: a ball of Linf, L2 or L1"""
    bounds_each_value: ClassVar[bool] = False
    """whether eps is the largest change of each value: Linf"""
    in_decibels: ClassVar[bool] = False
    """whether eps is a ratio to the size of each input, which texts state in decibels: a larger number of decibels is a
    smaller eps"""
    counts_changes: ClassVar[bool] = False
    """whether eps is a number of values or pixels that may change: L0"""
    has_size: ClassVar[bool] = False
    """whether eps is a size of changes that can be smaller"""
    changes_inputs: ClassVar[bool] = True
    """whether inputs change, and not the training set"""
    drawn_at_random: ClassVar[bool] = False
    """whether changes are drawn at random, and no attacker chooses them"""
    measures_robustness: ClassVar[bool] = True
    """whether attacks search for a change of inputs, so that runs have a robust accuracy"""
    judges_misclassified: ClassVar[bool] = False
    """whether examples that are misclassified when clean are evaluated as well, because they may be correct when
    changed"""
    provers: ClassVar[tuple[str, ...]] = ()
    """methods of certification for this constraint alone"""
    domain: "ClassVar[Domain | None]" = None
    """kind of the inputs that can be changed like this; None if any inputs of numbers can"""

    @property
    def eps(self) -> float:
        """Radius of the allowed set, in units of the inputs. Under L0 it is a number of values or pixels. It is 1 for a
        constraint with limits in place of a radius, which allows all of them.
        """
        return 1.0

    @property
    def limits(self) -> Mapping[str, float | str]:
        """Limits of a constraint that is no ball, by their names in the threat string, without those that allow no
        change; an `eps` of 1 allows all of it. A constraint whose only limit is `eps` has none.
        """
        return MappingProxyType({})

    @property
    def bounds_sizes(self) -> bool:
        """Whether the set is a ball of Linf, L2 or L1, in units of the inputs or relative to each input."""
        return self.in_input_units or self.in_decibels

    @property
    def counts_pixels(self) -> bool:
        """Whether the distance is a number of pixels, where all channels of a pixel count once, instead of values."""
        return False

    @property
    def goal(self) -> int | None:
        """Target class that the constraint states itself, as a trigger does."""
        return None

    def without_surrogates(self) -> str:
        """Return why surrogates are not used under the constraint; empty if they are."""
        return ""

    def notes(self, bounds: Bounds) -> tuple[str, ...]:
        """Return what a reader needs to know about the constraint for a model whose inputs are within `bounds`."""
        return ()

    def size_text(self, eps: float) -> str:
        """Return an eps as text that is read as the same eps."""
        return decibels_text(eps) if self.in_decibels else exact_size(eps)

    def coordinates(self, batch: Batch, bounds: Bounds) -> "Coordinates | None":
        """Return the coordinates in which attacks on a batch search; None for the values of the inputs."""
        return None

    def as_stored(self, x_adv: Inputs, x: Inputs, bounds: Bounds) -> Inputs:
        """Return inputs around `x` as a file stores them, on which the verdict is made; by default unchanged."""
        return x_adv

    def changeable(self, x: Inputs) -> Tensor:
        """Return the mask of the values that may change; it broadcasts to the inputs `x`. By default all may."""
        return torch.ones(1, dtype=torch.bool, device=x.device)

    def refuse_unfit(self, x: Inputs) -> None:
        """Raise `UsageError` if inputs in the shape of `x` cannot be changed like this. Inputs of numbers can."""
        return

    def in_bounds(self, bounds: Bounds) -> "Constraint":
        """Return the constraint in the units of a model whose inputs are within `bounds`."""
        return self

    @abstractmethod
    def distance(self, x_adv: Inputs, x: Inputs) -> PerExample:
        """Return the distance of each `x_adv` (n, *features) from its clean input `x`, in the unit of the
        constraint.
        """

    @abstractmethod
    def project(self, x_adv: Inputs, x: Inputs, bounds: Bounds) -> Inputs:
        """Return for each `x_adv` the nearest valid input in the ball around `x`, which is `x_adv` itself if it is
        inside.
        """

    @abstractmethod
    def steepest(self, gradient: Inputs, x: Inputs, bounds: Bounds) -> Inputs:
        """Return for each input the direction of length one along which a function with this gradient increases
        most.
        """

    @abstractmethod
    def sample(self, batch: Batch, bounds: Bounds, rng: Draws) -> Inputs:
        """Return for each example a random valid input inside the ball around its clean input."""

    @abstractmethod
    def resized(self, eps: float) -> "Constraint":
        """Return the same constraint with the radius `eps`."""

    def __str__(self) -> str:
        if self.limits:
            return limits_text(self.name, self.limits)
        return self.name if math.isinf(self.eps) else f"{self.name}:{self.size_text(self.eps)}"


@dataclass(frozen=True)
class Norm(Constraint):
    """Base class of the balls of norms, whose radius may differ between examples, as minimum-norm attacks require."""

    is_ball: ClassVar[bool] = True
    in_input_units: ClassVar[bool] = True
    has_size: ClassVar[bool] = True

    eps: NonNegative = math.inf

    @abstractmethod
    def within(self, x_adv: Inputs, x: Inputs, bounds: Bounds, radius: PerExample) -> Inputs:
        """Return for each `x_adv` the nearest valid input in the ball around `x` whose radius for the example is
        `radius`.
        """

    def project(self, x_adv: Inputs, x: Inputs, bounds: Bounds) -> Inputs:
        """Return for each `x_adv` the nearest valid input in the ball of radius eps around `x`."""
        return self.within(x_adv, x, bounds, x.new_full((len(x),), self.eps))

    def resized(self, eps: float) -> Self:
        """Return the ball with the radius `eps`."""
        return replace(self, eps=eps)


def allowed(constraint: Constraint, x_adv: Inputs, x: Inputs, bounds: Bounds) -> Mask:
    """Return for each point whether it is a valid input inside the constraint around `x`, with a tolerance for
    rounding.

    The distance may be at most eps (1 + 1e-6) + 1e-7 plus rounding, which is the largest error of storing the changed
    values: for inputs in [0, 1] at most 1.2e-7 for each value, for inputs up to 255 3e-5, and 0 under L0.
    """
    x_adv64, x64 = x_adv.double(), x.double()
    low, high = bounds.like(x64)
    valid = (x_adv64 >= low - 1e-7) & (x_adv64 <= high + 1e-7)
    inside = torch.where(x64.isnan(), x_adv64.isnan(), valid).flatten(1).all(1)
    tolerance = constraint.eps * 1e-6 + 1e-7 + _rounding(constraint, x_adv, x)
    return inside & (constraint.distance(x_adv64, x64) <= constraint.eps + tolerance)


def _rounding(constraint: Constraint, x_adv: Inputs, x: Inputs) -> PerExample | float:
    if not constraint.in_input_units:
        return 0.0
    size = (torch.maximum(x_adv.abs(), x.abs()).double() * (x_adv != x)).masked_fill(x.isnan(), 0)
    return constraint.distance(torch.finfo(x_adv.dtype).eps * size, torch.zeros_like(size))


def extent(constraint: Constraint, x: Inputs, bounds: Bounds) -> float:
    """Return the largest distance between two valid inputs in the shape of `x`: an eps that allows every input."""
    low, high = bounds.like(x.double())
    corner = x[:1].shape
    return float(constraint.distance(high.expand(corner), low.expand(corner)).max())


def _change(x_adv: Inputs, x: Inputs) -> Inputs:
    """The difference of inputs; 0 where the clean value is missing."""
    return (x_adv - x).masked_fill_(x.isnan(), 0)


def _room(delta: Tensor, x: Tensor, bounds: Bounds) -> Tensor:
    """Distance of each coordinate to the side of the box in the direction of `delta`."""
    low, high = bounds.like(x)
    return torch.where(delta > 0, high - x, x - low).clamp_min(0).masked_fill(x.isnan(), 0)


@dataclass(frozen=True)
class Linf(Norm):
    """Constraint that no input value changes by more than `eps`."""

    name: ClassVar[str] = "linf"
    bounds_each_value: ClassVar[bool] = True

    def distance(self, x_adv: Inputs, x: Inputs) -> PerExample:
        """Return the largest absolute change of each example."""
        return _change(x_adv, x).flatten(1).abs_().amax(1)

    def project(self, x_adv: Inputs, x: Inputs, bounds: Bounds) -> Inputs:
        """Return `x_adv` with each value clamped to within eps of the clean value, and to valid values."""
        return bounds.clamp(torch.clamp(x_adv, x - self.eps, x + self.eps))

    def within(self, x_adv: Inputs, x: Inputs, bounds: Bounds, radius: PerExample) -> Inputs:
        """Return `x_adv` with each value clamped to within its example's `radius` of the clean value, and to valid
        values.
        """
        limit = spread(radius, x)
        return bounds.clamp(torch.minimum(torch.maximum(x_adv, x - limit), x + limit))

    def steepest(self, gradient: Inputs, x: Inputs, bounds: Bounds) -> Inputs:
        """Return the sign of the gradient, which is the direction of steepest increase under Linf."""
        return gradient.sign()

    def sample(self, batch: Batch, bounds: Bounds, rng: Draws) -> Inputs:
        """Return for each example a uniform random point of the Linf ball around its clean input, clamped to valid
        values.
        """
        u = rng.uniform(batch.ids, *batch.x.shape[1:], dtype=batch.x.dtype)
        return self.project(batch.x + self.eps * (2 * u - 1), batch.x, bounds)


@dataclass(frozen=True)
class L2(Norm):
    """Constraint that the Euclidean length of the change of an input is at most `eps`."""

    name: ClassVar[str] = "l2"

    def distance(self, x_adv: Inputs, x: Inputs) -> PerExample:
        """Return the Euclidean length of the change of each example."""
        length: PerExample = torch.linalg.vector_norm(_change(x_adv, x).flatten(1), dim=1)
        return length

    def within(self, x_adv: Inputs, x: Inputs, bounds: Bounds, radius: PerExample) -> Inputs:
        """Return `clamp(x + t (x_adv - x))` with the largest t <= 1 for which its distance from `x` is at most
        `radius`.
        """
        clamped = bounds.clamp(x_adv)
        outside = (self.distance(clamped, x) > radius).nonzero()[:, 0]
        if not len(outside):
            return clamped
        all_outside, clamped_outside = len(outside) == len(x), clamped
        if not all_outside:
            x_adv, x, radius, clamped_outside = x_adv[outside], x[outside], radius[outside], clamped[outside]
        delta = _change(x_adv, x)
        dtype = torch.promote_types(delta.dtype, torch.float32)  # squares leave half precision
        flat, flat_clamped = delta.flatten(1).to(dtype), _change(clamped_outside, x).flatten(1).to(dtype)
        t = _l2_share(flat, flat_clamped, radius.to(dtype)).to(delta.dtype)
        step = _change(bounds.clamp(torch.addcmul(x, spread(t, x), delta)), x)
        shrink = (radius / step.flatten(1).norm(dim=1).clamp_min(_TINY)).clamp_max(1)  # rounding only
        points = bounds.clamp(torch.addcmul(x, spread(shrink, x), step))
        return points if all_outside else clamped.index_copy(0, outside, points)

    def steepest(self, gradient: Inputs, x: Inputs, bounds: Bounds) -> Inputs:
        """Return the gradient of each example divided by its Euclidean length, or zero if the gradient is zero."""
        # divided by its largest entry first, because squares of very small or large gradients leave float32
        largest = gradient.flatten(1).abs().amax(1).clamp_min(torch.finfo(gradient.dtype).tiny)
        scaled = gradient / spread(largest, gradient)
        return scaled / spread(scaled.flatten(1).norm(dim=1).clamp_min(_TINY), gradient)

    def sample(self, batch: Batch, bounds: Bounds, rng: Draws) -> Inputs:
        """Return a uniform random point of the Euclidean ball around each clean input, projected onto valid inputs."""
        shape = batch.x.shape[1:]
        direction = rng.at("direction").normal(batch.ids, *shape, dtype=batch.x.dtype)
        radius = rng.at("radius").uniform(batch.ids, 1, dtype=batch.x.dtype)[:, 0] ** (
            1 / max(shape.numel(), 1)
        )
        step = direction * spread(
            self.eps * radius / direction.flatten(1).norm(dim=1).clamp_min(_TINY), direction
        )
        return self.project(batch.x + step, batch.x, bounds)


def _l2_share(delta: Tensor, clipped: Tensor, eps: PerExample) -> PerExample:
    """The largest t <= 1 at which `t * delta`, each coordinate clipped at that of `clipped`, has length `eps`.

    `clipped` must be longer than `eps`. The squared length is piecewise linear and concave in t², with a breakpoint
    where a coordinate is clipped. The line through two points below the root therefore reaches `eps` squared below the
    root again, and so does the tangent, which needs no difference.
    """
    size, room, goal = delta.square(), clipped.square(), eps.square()
    squared_before, length_before = torch.zeros_like(eps), torch.zeros_like(eps)
    squared = goal / size.sum(1).clamp_min(_TINY**2)
    tolerance = _ROUNDING * torch.finfo(eps.dtype).eps * goal
    for _ in range(2 * size.shape[1] + 2):
        reached = squared[:, None] * size
        length = reached.clamp_max(room).sum(1)
        rising = goal - length > tolerance
        if not rising.any():
            break
        slope, close = (
            (length - length_before) / (squared - squared_before),
            length - length_before < _CLOSE * goal,
        )
        if (rising & close).any():  # the difference of rounded sums is not reliable
            slope = torch.where(close, (size * (reached < room)).sum(1), slope)
        next_squared = (squared + (goal - length) / slope.clamp_min(_TINY**2)).clamp_max(1)
        rising &= next_squared > squared
        # a row that has converged is not changed while others continue
        squared_before, length_before = (
            torch.where(rising, squared, squared_before),
            torch.where(rising, length, length_before),
        )
        squared = torch.where(rising, next_squared, squared)
    return squared.sqrt()


@dataclass(frozen=True)
class L1(Norm):
    """Constraint that the sum of the absolute changes of an input is at most `eps`."""

    name: ClassVar[str] = "l1"

    def distance(self, x_adv: Inputs, x: Inputs) -> PerExample:
        """Return the sum of the absolute changes of each example."""
        return _change(x_adv, x).flatten(1).abs().sum(1)

    def within(self, x_adv: Inputs, x: Inputs, bounds: Bounds, radius: PerExample) -> Inputs:
        """Return for each `x_adv` the nearest valid input in the L1 ball of its `radius`: all changes shrink equally.

        The sum is piecewise linear in this amount, with breakpoints where a coordinate leaves the box's side (size -
        room) or reaches zero (size); the piece that contains the radius is found by sorting them. Distances are
        measured in float64, because thousands of float32 roundings add up to more than the tolerance.
        """
        clamped = bounds.clamp(x_adv)
        outside = self.distance(clamped.double(), x.double()) > radius
        if not outside.any():
            return clamped
        delta, eps, clean = _change(x_adv, x)[outside], radius[outside], x[outside]
        size = delta.abs().flatten(1)
        room = torch.minimum(_room(delta, clean, bounds).flatten(1), size)
        sizes = (size - _l1_shrinkage(size, room, eps)[:, None]).clamp_min(0).minimum(room).view_as(delta)
        points = bounds.clamp(clean + sizes * delta.sign())
        for _ in range(_ROUNDINGS):
            total = self.distance(points.double(), clean.double())
            if (total <= eps).all():
                break
            sizes = sizes * spread((eps / total.clamp_min(_TINY)).clamp_max(1).to(sizes.dtype), sizes)
            points = bounds.clamp(clean + sizes * delta.sign())
        result = clamped.clone()
        result[outside] = points
        return result

    def steepest(self, gradient: Inputs, x: Inputs, bounds: Bounds) -> Inputs:
        """Return a step of equal size in the 1 % of the input values with the largest gradients that can still move."""
        flat = gradient.flatten(1)
        gain = flat.abs() * (_room(gradient, x, bounds).flatten(1) > 0)
        k = max(1, round(_L1_DENSITY * flat.shape[1]))
        values, chosen = gain.topk(k, dim=1)
        share = (values > 0).to(flat.dtype) / k
        return (
            torch.zeros_like(flat).scatter(1, chosen, share * flat.gather(1, chosen).sign()).view_as(gradient)
        )

    def sample(self, batch: Batch, bounds: Bounds, rng: Draws) -> Inputs:
        """Return a uniform random point of the L1 ball around each clean input, projected onto valid inputs in it.

        It is sampled by exponential spacings with random signs.
        """
        shape, dtype = batch.x.shape[1:], batch.x.dtype
        spacings = -torch.log1p(-rng.at("spacing").uniform(batch.ids, shape.numel() + 1, dtype=dtype))
        share = spacings[:, :-1] / spacings.sum(1, keepdim=True).clamp_min(_TINY)
        step = self.eps * share * rng.at("sign").signs(batch.ids, shape.numel(), dtype=dtype)
        return self.project(batch.x + step.view_as(batch.x), batch.x, bounds)


def _l1_shrinkage(size: Tensor, room: Tensor, eps: PerExample) -> Tensor:
    """The amount by which sizes shrink so that `sum(min(max(size - amount, 0), room)) = eps`, row by row.

    In float64, because the running sums cancel; the sum at zero must exceed eps.
    """
    dtype, size, room, eps = size.dtype, size.double(), room.double(), eps.double()
    starts, ends = (size - room).clamp_min(0), size
    points, order = torch.cat((starts, ends), dim=1).sort(dim=1)
    slope_change = torch.cat((torch.ones_like(starts), -torch.ones_like(ends)), dim=1).gather(1, order)
    slope = slope_change.cumsum(1)  # number of coordinates that shrink just after each breakpoint
    steps = slope[:, :-1] * (points[:, 1:] - points[:, :-1])
    total = room.sum(1)
    sums = total[:, None] - torch.cat((torch.zeros_like(total)[:, None], steps.cumsum(1)), dim=1)
    piece = (sums >= eps[:, None]).sum(1, keepdim=True).sub(1).clamp_min(0)
    excess = sums.gather(1, piece)[:, 0] - eps
    amount = points.gather(1, piece)[:, 0] + excess / slope.gather(1, piece)[:, 0].clamp_min(1)
    return amount.to(dtype)


@dataclass(frozen=True)
class L0(Norm):
    """Constraint that at most `eps` values of an input change, or with `per="pixel"` at most `eps` pixels of an
    image.
    """

    name: ClassVar[str] = "l0"
    in_input_units: ClassVar[bool] = False
    counts_changes: ClassVar[bool] = True

    per: Literal["value", "pixel"] = "value"

    @property
    def counts_pixels(self) -> bool:
        """Whether pixels are counted, where all channels of a pixel count once."""
        return self.per == "pixel"

    def grouped(self, values: Tensor) -> Tensor:
        """Return input values grouped by the unit that L0 counts, a value or a pixel: (n, units, values of a unit)."""
        if self.per == "pixel" and values.dim() == 4:
            return values.flatten(2).transpose(1, 2)
        return values.flatten(1)[:, :, None]

    def _ungrouped(self, mask: Tensor, like: Tensor) -> Tensor:
        """Convert a mask (n, units) to a mask of the inputs."""
        if self.per == "pixel" and like.dim() == 4:
            return mask[:, None, :].expand(-1, like.shape[1], -1).reshape(like.shape)
        return mask.view(like.shape)

    def distance(self, x_adv: Inputs, x: Inputs) -> PerExample:
        """Return the number of values or pixels that differ in each example."""
        return (self.grouped(_change(x_adv, x)) != 0).any(2).sum(1).to(x.dtype)

    def within(self, x_adv: Inputs, x: Inputs, bounds: Bounds, radius: PerExample) -> Inputs:
        """Return for each `x_adv` the nearest valid input with at most `radius` changed values or pixels."""
        clamped = bounds.clamp(x_adv)
        outside = self.distance(clamped, x) > radius
        if not outside.any():
            return clamped
        gain = _change(x_adv, x) ** 2 - (x_adv - clamped) ** 2
        chosen = self.largest(gain.masked_fill(x.isnan(), 0), radius)
        return torch.where(chosen | ~spread(outside, x).expand_as(x), clamped, x)

    def largest(self, gain: Tensor, radius: PerExample) -> Tensor:
        """Return a mask of the `radius` values or pixels of each example with the largest `gain`, summed over
        channels.
        """
        units = self.grouped(gain).sum(2)
        n_chosen = radius.clamp(0, units.shape[1]).long()
        order = units.topk(int(n_chosen.max()), dim=1).indices
        chosen = torch.zeros_like(units, dtype=torch.bool)
        chosen.scatter_(1, order, torch.arange(order.shape[1], device=gain.device) < n_chosen[:, None])
        return self._ungrouped(chosen, gain)

    def summed(self, values: Tensor) -> Tensor:
        """Return for each value the sum over the channels of its pixel, or the value itself if L0 counts single
        values.
        """
        if self.per == "pixel" and values.dim() == 4:
            return values.sum(1, keepdim=True).expand_as(values)
        return values

    def steepest(self, gradient: Inputs, x: Inputs, bounds: Bounds) -> Inputs:
        """Return the gradient, scaled so that a step of length eps moves a value on average by twice its valid range.

        Croce & Hein scale to the width once. With twice the width, PGD with 40 steps leaves fewer examples robust (on
        MNIST with 10 values 56 instead of 72 of 100, on CIFAR-10 with 10 values 12 instead of 15 of 40).
        """
        mean = gradient.flatten(1).abs().mean(1).clamp_min(_TINY)
        return gradient * spread(2 * bounds.width / (mean * max(self.eps, 1)), gradient)

    def sample(self, batch: Batch, bounds: Bounds, rng: Draws) -> Inputs:
        """Return the inputs with as many values or pixels as L0 allows replaced by uniform random valid values."""
        u = rng.at("value").uniform(batch.ids, *batch.x.shape[1:], dtype=batch.x.dtype)
        low, high = bounds.like(batch.x)
        units = self.grouped(batch.x).shape[1]
        order = rng.at("place").uniform(batch.ids, units)
        chosen = torch.zeros_like(order, dtype=torch.bool)
        chosen.scatter_(1, order.topk(min(int(min(self.eps, units)), units), dim=1).indices, True)
        present = self._ungrouped(chosen, batch.x) & ~batch.x.isnan()
        return torch.where(present, low + u * (high - low), batch.x)

    def __str__(self) -> str:
        return super().__str__() + ("px" if self.counts_pixels and math.isfinite(self.eps) else "")
