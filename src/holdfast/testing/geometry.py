"""Tests of properties that every constraint must have. Each function raises `AssertionError` with numbers if a
constraint does not have the property.

A law generates its examples from a seed, so that a property test needs only these lines:

    @given(seed=integers(0, 2**32), eps=floats(0, 3))
    def test_law(seed, eps):
        for law in geometry.CONSTRAINT_LAWS:
            law(MyConstraint(eps), seed)
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.constraints import L0, L1, L2, Constraint, Linf, Norm, allowed
from holdfast.core.draws import Draws
from holdfast.core.model import Bounds
from holdfast.core.types import Inputs, PerExample
from holdfast.testing.fakes import examples

SHAPE = (2, 2, 2)
"""shape of the inputs: eight values in four pixels, few enough to test every set of changes"""
BOUNDS = Bounds()

_RIVALS = 20  # number of random unit steps that the steepest step is compared with


def scene(seed: int, *, n: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Batch, Inputs]:
    """Return random examples, some values of which are at the bounds, and for each example a nearby point that is
    mostly outside the bounds. Tests of constraints use both.
    """
    batch = examples(seed, n=n, shape=SHAPE, dtype=dtype)
    rng = Draws(seed).at("scene")
    away = rng.at("length").uniform(batch.ids, 1, dtype=dtype).view(-1, 1, 1, 1) * 2
    points = batch.x + away * rng.at("direction").normal(batch.ids, *SHAPE, dtype=dtype)
    return batch, points


def projects_inside(constraint: Constraint, seed: int) -> None:
    """Check that the projection of a constraint returns points inside the ball and the bounds, in float64 and in
    float32.
    """
    for dtype in (torch.float64, torch.float32):
        batch, points = scene(seed, dtype=dtype)
        projected = constraint.project(points, batch.x, BOUNDS)
        assert projected.dtype == dtype, f"{constraint}: {projected.dtype} from {dtype}"
        inside = allowed(constraint, projected, batch.x, BOUNDS)
        distance = constraint.distance(projected, batch.x)
        assert inside.all(), f"{constraint}: projected to distance {distance[~inside].tolist()} in {dtype}"


def projection_is_idempotent(constraint: Constraint, seed: int) -> None:
    """Check that projecting a projected point again moves it by no more than rounding."""
    batch, points = scene(seed)
    once = constraint.project(points, batch.x, BOUNDS)
    shift = float((constraint.project(once, batch.x, BOUNDS) - once).abs().max())
    assert shift <= 1e-9, f"{constraint}: a second projection moves a point by {shift}"


def does_not_change_feasible_points(constraint: Constraint, seed: int) -> None:
    """Check that the projection does not change a point well inside the ball and the bounds, not even by rounding,
    whatever the other examples of the batch are.
    """
    batch, points = scene(seed)
    smaller = constraint.resized(
        int(constraint.eps / 2) if isinstance(constraint, L0) else constraint.eps / 2
    )
    feasible = smaller.sample(batch, BOUNDS, Draws(seed))
    assert torch.equal(constraint.project(feasible, batch.x, BOUNDS), feasible), (
        f"{constraint}: a projection moves a feasible point"
    )
    mixed = torch.where((torch.arange(len(batch)) % 2 == 0).view(-1, 1, 1, 1), feasible, points)
    projected = constraint.project(mixed, batch.x, BOUNDS)[::2]
    assert torch.equal(projected, feasible[::2]), (
        f"{constraint}: a feasible point moves beside infeasible ones"
    )


def projects_to_the_nearest(constraint: Constraint, seed: int) -> None:
    """Check that the projection of a constraint returns the nearest allowed point, by comparison with a slow exact
    search, for the norms Linf, L2, L1 and L0.
    """
    if not isinstance(constraint, (Linf, L2, L1, L0)):
        return
    batch, points = scene(seed)
    projected = constraint.project(points, batch.x, BOUNDS)
    best = _nearest(constraint, points.flatten(1), batch.x.flatten(1))
    away = (projected - points).flatten(1).norm(dim=1)
    worse = away - (best - points.flatten(1)).norm(dim=1)
    assert (worse <= 1e-7).all(), f"{constraint}: {worse.tolist()} farther than the nearest point"


def steps_along_the_steepest(constraint: Constraint, seed: int) -> None:
    """Check that the steepest direction of a constraint has length at most one, and that no other unit step inside the
    bounds increases a linear function more.

    For L0 only the sign of the gain is checked.
    """
    batch, _ = scene(seed)
    gradient = Draws(seed).at("gradient").normal(batch.ids, *SHAPE, dtype=batch.x.dtype)
    step = constraint.steepest(gradient, batch.x, BOUNDS)
    gain = (step * gradient).flatten(1).sum(1)
    assert (gain >= 0).all(), f"{constraint}: the steepest step descends, {gain.tolist()}"
    if isinstance(constraint, L0):
        return
    length = constraint.distance(batch.x + step, batch.x)
    assert (length <= 1 + 1e-9).all(), f"{constraint}: the steepest step has length {length.tolist()}"
    low, high = BOUNDS.like(batch.x)
    for k in range(_RIVALS):
        rival = Draws(seed).at("rival", k).normal(batch.ids, *SHAPE, dtype=batch.x.dtype)
        rival = rival.masked_fill(torch.where(rival > 0, batch.x >= high, batch.x <= low), 0)
        size = constraint.distance(batch.x + rival, batch.x).clamp_min(1e-12).view(-1, 1, 1, 1)
        rival_gain = (rival / size * gradient).flatten(1).sum(1)
        assert (rival_gain <= gain + 1e-9).all(), (
            f"{constraint}: a random step climbs {rival_gain.tolist()}, it {gain.tolist()}"
        )


def samples_inside(constraint: Constraint, seed: int) -> None:
    """Check that the random points of a constraint are inside the ball and the bounds, and that the point of an example
    does not depend on the rest of the batch.
    """
    for dtype in (torch.float64, torch.float32):
        batch, _ = scene(seed, dtype=dtype)
        points = constraint.sample(batch, BOUNDS, Draws(seed))
        assert points.dtype == dtype, f"{constraint}: {points.dtype} from {dtype}"
        assert allowed(constraint, points, batch.x, BOUNDS).all(), f"{constraint}: a sample is outside"
        rows = torch.tensor([4, 1])
        subset_points = constraint.sample(batch.take(rows), BOUNDS, Draws(seed))
        assert torch.equal(subset_points, points[rows]), f"{constraint}: samples depend on the batch"


def radii_apply_to_each_example(constraint: Constraint, seed: int) -> None:
    """Check that a projection with a different radius for each example equals separate projections of the examples."""
    if not isinstance(constraint, Norm):
        return
    batch, points = scene(seed)
    share = Draws(seed).at("radii").uniform(batch.ids, 1, dtype=batch.x.dtype)[:, 0]
    radii = (share * constraint.eps).floor() if isinstance(constraint, L0) else share * constraint.eps
    together = constraint.within(points, batch.x, BOUNDS, radii)
    for k, radius in enumerate(radii.tolist()):
        alone = constraint.resized(radius).project(points[k : k + 1], batch.x[k : k + 1], BOUNDS)
        worst = float((together[k] - alone[0]).abs().max())
        assert worst <= 1e-9, f"{constraint}: radius {radius} among others moves the projection by {worst}"


CONSTRAINT_LAWS: tuple[Callable[[Constraint, int], None], ...] = (
    projects_inside,
    projection_is_idempotent,
    does_not_change_feasible_points,
    projects_to_the_nearest,
    steps_along_the_steepest,
    samples_inside,
    radii_apply_to_each_example,
)
"""all laws of constraints, for `pytest.mark.parametrize`"""


def _nearest(norm: Linf | L2 | L1 | L0, points: Tensor, clean: Tensor) -> Tensor:
    """Nearest feasible point: by bisection of the multiplier of the ball, or for L0 by trying every set of changes."""
    change = points - clean
    match norm:
        case Linf():
            return BOUNDS.clamp(clean + change.clamp(-norm.eps, norm.eps))
        case L2():
            return _bisected(norm, clean, lambda share: clean + share * change)
        case L1():
            largest = change.abs().amax(1, keepdim=True)
            return _bisected(
                norm,
                clean,
                lambda share: clean + change.sign() * (change.abs() - (1 - share) * largest).clamp_min(0),
            )
        case L0():
            return _best_of_all_sets(norm, points, clean)


def _bisected(norm: L2 | L1, clean: Tensor, at: Callable[[Tensor], Tensor]) -> Tensor:
    """Point at the largest share up to 1 whose distance is within eps. The distance must increase with the share."""
    low, high = clean.new_zeros(len(clean), 1), clean.new_ones(len(clean), 1)
    unclipped = norm.distance(BOUNDS.clamp(at(high)), clean) <= norm.eps
    low = torch.where(unclipped[:, None], high, low)
    for _ in range(60):
        share = (low + high) / 2
        inside = (norm.distance(BOUNDS.clamp(at(share)), clean) <= norm.eps)[:, None]
        low, high = torch.where(inside, share, low), torch.where(inside, high, share)
    return BOUNDS.clamp(at(low))


def _best_of_all_sets(norm: L0, points: Tensor, clean: Tensor) -> Tensor:
    """Best point over all sets of units that may change."""
    units = torch.arange(clean.shape[1]).view(SHAPE[0], -1) if norm.per == "pixel" else None
    groups = list(units.T) if units is not None else list(torch.arange(clean.shape[1])[:, None])
    clamped, best = BOUNDS.clamp(points), clean.clone()
    away: PerExample = (clean - points).norm(dim=1)
    for chosen in itertools.combinations(groups, int(min(norm.eps, len(groups)))):
        x = clean.clone()
        for group in chosen:
            x[:, group] = clamped[:, group]
        nearer = (x - points).norm(dim=1) < away
        best[nearer], away[nearer] = x[nearer], (x - points).norm(dim=1)[nearer]
    return best
