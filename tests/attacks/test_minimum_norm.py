"""What the minimum-norm attacks share: the way back to the boundary, and what they return with and without an eps."""

import math

import pytest
import torch

import cases
from holdfast.attacks import DDN, FAB, FMN, CarliniWagner, DeepFool
from holdfast.attacks.parts.boundaries import to_boundary
from holdfast.attacks.parts.losses import Closest, firmly_broken
from holdfast.core.batch import Batch
from holdfast.core.constraints import L0, L1, L2, Linf, allowed
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.meter import Metered
from holdfast.core.threat import ThreatModel
from holdfast.testing.fakes import examples, labelled, linear_problem, network
from holdfast.testing.laws import broken, problem, run

ATTACKS = [
    (DeepFool(), L2),
    (CarliniWagner(searches=3, steps=20), L2),
    (DDN(steps=20), L2),
    (FMN(steps=20), Linf),
    (FMN(steps=20), L1),
]

WITHIN_EPS = [case for case in cases.ATTACKS if not (case.smallest or isinstance(case.attack, FAB))]


def name(value):
    """The same in every process, unlike a setting that is a function."""
    return value.__name__ if isinstance(value, type) else type(value).__name__


def far_points(model, batch):
    """For each example another one that the model calls something else."""
    labels = model(batch.x).argmax(1)
    other = [int((labels != label).nonzero()[0]) for label in labels]
    return batch.x[other]


@pytest.mark.parametrize("norm", [Linf(), L2(), L1(), L0()])
def test_the_way_back_stays_broken_gets_closer_and_costs_at_most_ten_forwards(norm):
    model = network()
    batch = labelled(model, examples())
    far = far_points(model, batch)
    metered = Metered(model, batch, ThreatModel(norm))
    near = to_boundary(metered, batch, far, norm)
    assert metered.spent.queries.max() <= 10
    assert (norm.distance(near, batch.x) < norm.distance(far, batch.x)).all()
    assert broken(model, batch, near).all()
    for size in (1, 4):
        parts = zip(batch.split(size), near.split(size), strict=True)
        assert all(broken(model, part, x).all() for part, x in parts)


def test_the_way_back_ends_at_the_boundary_of_a_line():
    model, batch = linear_problem(0, classes=2)
    far = far_points(model, batch)
    direction = far - batch.x
    gap, fall = (
        model(batch.x).diff(dim=1)[:, 0].abs(),
        (model(far) - model(batch.x)).diff(dim=1)[:, 0].abs(),
    )
    exact = gap / fall * direction.norm(dim=1)  # the logits are linear along the segment
    near = L2().distance(to_boundary(model, batch, far, L2()), batch.x)
    assert (near >= exact * (1 - 1e-9)).all()
    assert ((near - exact) <= direction.norm(dim=1) / 2**8).all()


@pytest.mark.parametrize("norm", [Linf, L2, L1])
def test_what_ends_beyond_a_ball_is_brought_down_inside_it(norm):
    model, batch = linear_problem(2, classes=2)
    exact = model.distance(batch.x, batch.y, norm())
    within = norm(exact[exact < math.inf].median().item())
    far = far_points(model, batch)
    # well inside, because rounding may place a point of the surface on either side
    far[::5] = within.resized(0.99 * within.eps).project(far, batch.x, model.bounds)[::5]
    beyond = within.distance(far, batch.x) > within.eps
    metered = Metered(model, batch, ThreatModel(within))
    near = to_boundary(metered, batch, far, within, refine=30)
    assert allowed(within, near, batch.x, model.bounds).all()
    assert broken(model, batch, near)[beyond & (exact < 0.9 * within.eps)].all()
    assert not broken(model, batch, near)[exact > 1.001 * within.eps].any()
    assert not broken(model, batch, within.project(far, batch.x, model.bounds))[beyond].all()
    assert (metered.spent.queries <= 31).all()
    assert (~beyond).any() and (metered.spent.queries[~beyond] == 0).all()
    assert torch.equal(near[~beyond], far[~beyond])


def test_without_a_ball_there_is_nothing_to_bring_down():
    model = network()
    batch = labelled(model, examples())
    far = far_points(model, batch)
    assert torch.equal(to_boundary(model, batch, far, L2(), refine=10), to_boundary(model, batch, far, L2()))


def test_what_does_not_break_the_model_is_not_pulled():
    model = network()
    batch = labelled(model, examples())
    still = (batch.x + 1e-6).clamp(0, 1)
    assert torch.equal(to_boundary(model, batch, still, L2()), still)
    assert torch.equal(to_boundary(model, batch, batch.x, L2()), batch.x)


def test_under_l0_the_changes_that_matter_stay():
    """On a linear model the gradient knows the order, so what is left is the greedy optimum."""
    model, batch = linear_problem(1, classes=2)
    sign = model.weight[1] - model.weight[0]
    sign = torch.where(batch.y[:, None] == 0, sign, -sign)
    corner = torch.where(sign > 0, 1.0, 0.0).double()
    exact = model.distance(batch.x, batch.y, L0())
    reached = exact < math.inf
    found = L0().distance(to_boundary(model, batch, corner, L0()), batch.x)
    assert reached.any()
    assert torch.equal(found[reached], exact[reached])


@pytest.mark.parametrize("attack, kind", ATTACKS, ids=name)
def test_with_an_eps_the_same_point_is_returned_or_one_inside_the_ball(attack, kind):
    model = network()
    batch = labelled(model, examples())
    free = attack(model, batch, ThreatModel(kind(math.inf)), rng=Draws(0))
    distance = kind().distance(free, batch.x)
    eps = float(distance.median())
    held = attack(model, batch, ThreatModel(kind(eps)), rng=Draws(0))
    assert allowed(kind(eps), held, batch.x, model.bounds).all()
    near = distance <= eps
    torch.testing.assert_close(held[near], free[near])
    assert broken(model, batch, held)[near].all()


@pytest.mark.parametrize(
    "attack, constraint", [(DDN(), Linf(0.1)), (CarliniWagner(), L1(1.0)), (DeepFool(), L0(3))], ids=name
)
def test_a_norm_that_an_attack_is_not_made_for_is_refused(attack, constraint):
    model, batch = linear_problem(0)
    with pytest.raises(UsageError, match=rf"{type(attack).__name__} minimises .*; the threat model is l"):
        attack(model, batch, ThreatModel(constraint), rng=Draws(0))


def test_the_closest_broken_point_is_kept_and_nan_counts_as_broken():
    batch = examples(n=3)
    closest = Closest(batch)
    far = torch.tensor([2.0, 2.0, math.nan], dtype=torch.float64)
    closest.offer(batch, batch.x + 1, far, torch.tensor([True, False, True]))
    assert closest.found.tolist() == [True, False, False]
    closest.offer(batch.take(torch.tensor([0])), batch.x[:1] + 2, far[:1] + 1, torch.tensor([True]))
    assert torch.equal(closest.x[0], batch.x[0] + 1)
    assert torch.equal(closest.x[1:], batch.x[1:])
    assert firmly_broken(torch.full((3, 4), math.nan), batch).all()


def test_a_point_of_nan_that_is_no_closer_leaves_the_known_one_alone():
    """A selection by arithmetic would let NaN through: 0 * NaN is NaN."""
    batch = examples(n=2)
    closest = Closest(batch)
    closest.offer(batch, batch.x, torch.zeros(2, dtype=torch.float64), torch.tensor([True, True]))
    unknown = torch.full((2,), math.nan, dtype=torch.float64)
    closest.offer(batch, torch.full_like(batch.x, math.nan), unknown, torch.tensor([True, True]))
    assert torch.equal(closest.x, batch.x)


@pytest.mark.parametrize("scale", [1.0, 255.0])
def test_the_scale_of_the_inputs_does_not_matter(scale):
    """Step sizes are in units of the distance to the boundary: pixels in 0..255 give the same attack."""
    from holdfast.core.model import Bounds
    from holdfast.testing.fakes import LinearOracle

    oracle, batch = linear_problem(4, classes=2)
    model = LinearOracle(oracle.weight / scale, oracle.bias, Bounds(0.0, scale))
    batch = Batch(batch.x * scale, batch.y, batch.ids)
    exact = model.distance(batch.x, batch.y, L2())
    for attack in (DDN(steps=30), FMN(steps=40), DeepFool()):
        found = L2().distance(attack(model, batch, ThreatModel(L2()), rng=Draws(0)), batch.x)
        assert (found <= 1.05 * exact).all(), attack


@pytest.mark.parametrize("case", WITHIN_EPS, ids=repr)
def test_attacks_that_search_for_no_smallest_change_are_refused_without_an_eps(case):
    model, batch, _ = problem(case)
    threat = ThreatModel(case.norm(torch.inf), access=case.attack.needs, queries=50)
    with pytest.raises(UsageError, match="has no eps"):
        run(case, model, batch, threat)
