"""The geometry of the norms: laws on random scenes, and what can be said by hand."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from holdfast.core.batch import Batch
from holdfast.core.constraints import L0, L1, L2, Constraint, Linf, Norm, allowed
from holdfast.core.draws import Draws
from holdfast.core.model import Bounds
from holdfast.testing import geometry
from holdfast.threats.transformations import Colour, Corruptions, Patch, Spatial

SEEDS = st.integers(0, 2**31)
KINDS = {"linf": Linf, "l2": L2, "l1": L1, "l0": L0, "l0-pixel": partial(L0, per="pixel")}
BOX = Bounds()


def of(kind, eps):
    return KINDS[kind](float(math.floor(3 * eps)) if kind.startswith("l0") else eps)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("law", geometry.CONSTRAINT_LAWS, ids=lambda law: law.__name__)
@given(seed=SEEDS, eps=st.one_of(st.floats(1e-3, 3), st.just(0.0), st.just(1e-9), st.just(1e6)))
def test_law(kind, law, seed, eps):
    law(of(kind, eps), seed)


@pytest.mark.parametrize("kind", KINDS)
def test_a_norm_is_a_constraint_of_any_radius(kind):
    norm = KINDS[kind]()
    assert isinstance(norm, Constraint) and isinstance(norm, Norm)
    assert norm.eps == math.inf
    assert norm.resized(2.0) == KINDS[kind](2.0)


def test_distances_by_hand():
    x = torch.zeros(1, 2, 1, 2)
    moved = torch.tensor([[[[0.3, 0.0]], [[-0.4, 0.0]]]])
    assert Linf().distance(moved, x).item() == pytest.approx(0.4)
    assert L2().distance(moved, x).item() == pytest.approx(0.5)
    assert L1().distance(moved, x).item() == pytest.approx(0.7)
    assert L0().distance(moved, x).item() == 2
    assert L0(per="pixel").distance(moved, x).item() == 1


def test_the_box_lets_the_others_go_further():
    """Under L2 and L1 a value that stops at the box leaves its share of the radius to the rest."""
    x, far = torch.tensor([[0.9, 0.0]]).double(), torch.tensor([[4.0, 3.0]]).double()
    assert L2(0.5).project(far, x, BOX).tolist()[0] == pytest.approx([1.0, math.sqrt(0.25 - 0.01)])
    assert L1(0.5).project(far, x, BOX).tolist()[0] == pytest.approx([1.0, 0.4])


def test_sides_may_differ_from_feature_to_feature():
    box = Bounds(torch.tensor([0.0, -2.0]), torch.tensor([1.0, 5.0]))
    x, far = torch.tensor([[0.5, 4.0]]), torch.tensor([[-9.0, 9.0]])
    assert Linf(3.0).project(far, x, box).tolist() == [[0.0, 5.0]]
    assert allowed(Linf(3.0), torch.tensor([[0.0, 5.0]]), x, box).item()
    assert not allowed(Linf(3.0), torch.tensor([[0.0, 5.1]]), x, box).item()
    assert not allowed(Linf(3.0), torch.tensor([[0.0, 0.9]]), x, box).item()


def test_allowed_measures_in_float64_and_takes_no_nan():
    x = torch.full((1, 3), 0.1)
    assert allowed(Linf(0.1), x + 0.1, x, BOX).item()
    assert not allowed(Linf(0.1), x + 0.1001, x, BOX).item()
    assert not allowed(Linf(0.1), torch.full((1, 3), torch.nan), x, BOX).item()
    assert not allowed(Linf(torch.inf), torch.full((1, 3), -0.01), x, BOX).item()


def test_allowed_takes_what_rounding_to_the_stored_type_adds_and_no_more():
    x, box = torch.tensor([[200.1, 3.3]]), Bounds(0.0, 255.0)
    for kind, size in ((Linf, 0.3), (L2, 0.3), (L1, 0.3)):
        moved = x + torch.tensor([[0.3, 0.0]])
        assert allowed(kind(size), moved, x, box).item()
        assert not allowed(kind(size), moved + torch.tensor([[1e-4, 0.0]]), x, box).item()
        small = torch.tensor([[200.1, 3.3 + 0.3 + 1e-5]])  # only what changed may have been rounded
        assert not allowed(kind(size), small, x, box).item()
    assert not allowed(L0(1), x + 0.1, x, box).item()


@pytest.mark.parametrize("kind", KINDS)
def test_an_infinite_radius_leaves_only_the_box(kind):
    batch, points = geometry.scene(3)
    assert torch.equal(KINDS[kind]().project(points, batch.x, BOX), points.clamp(0, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_no_argument_is_edited(kind):
    batch, points = geometry.scene(4)
    x, far = batch.x.clone(), points.clone()
    norm = of(kind, 0.5)
    norm.project(points, batch.x, BOX)
    norm.steepest(points, batch.x, BOX)
    norm.sample(batch, BOX, Draws(1))
    assert torch.equal(batch.x, x) and torch.equal(points, far)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch_is_projected_and_sampled(kind):
    none = Batch(torch.zeros(0, 2, 2, 2), torch.zeros(0).long(), torch.zeros(0).long())
    norm = of(kind, 1.0)
    assert norm.project(none.x, none.x, BOX).shape == none.x.shape
    assert norm.sample(none, BOX, Draws(0)).shape == none.x.shape
    assert norm.steepest(none.x, none.x, BOX).shape == none.x.shape
    assert norm.distance(none.x, none.x).shape == (0,)


@pytest.mark.parametrize("kind", ["linf", "l2", "l1"])
def test_samples_reach_the_surface_and_the_middle(kind):
    """Uniform in the ball: under L2 and L1 most of eight dimensions lies near the surface."""
    n = 2000
    batch = Batch(torch.full((n, 8), 0.5), torch.zeros(n).long(), torch.arange(n))
    share = of(kind, 0.1).distance(of(kind, 0.1).sample(batch, BOX, Draws(5)), batch.x) / 0.1
    # the radius of a uniform point in d dimensions has mean d / (d + 1), and deviation about 0.1
    assert share.mean().item() == pytest.approx(8 / 9, abs=0.01)
    assert share.max() <= 1 + 1e-5


def test_l0_keeps_the_changes_that_matter_most():
    x, far = torch.tensor([[0.5, 0.5, 0.5]]), torch.tensor([[0.9, 7.0, 0.6]])
    # cut to the box the second value still moves the point furthest
    assert L0(1.0).project(far, x, BOX).tolist() == [[0.5, 1.0, 0.5]]
    assert L0(2.0).project(far, x, BOX)[0].tolist() == pytest.approx([0.9, 1.0, 0.5])


def test_thousands_of_roundings_do_not_add_up_to_more_than_is_allowed():
    shape = (16, 3, 32, 32)
    draws, ids = Draws(0), torch.arange(16)
    x = draws.at("x").uniform(ids, *shape[1:])
    far = x + draws.at("step").normal(ids, *shape[1:])
    for eps in (1e-3, 3.0, 12.0):
        assert allowed(L1(eps), L1(eps).project(far, x, Bounds()), x, Bounds()).all()


@pytest.mark.parametrize("features", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_l2_ball_is_reached_whatever_the_scales_of_a_few_features(features, dtype):
    draw = torch.Generator().manual_seed(features)
    x = torch.rand(2000, features, generator=draw, dtype=torch.float64).to(dtype)
    scales = 10 ** (torch.rand(2000, features, generator=draw, dtype=torch.float64) * 6 - 3)
    steps = torch.randn(2000, features, generator=draw, dtype=torch.float64) * scales
    moved, radius = x + steps.to(dtype), torch.rand(2000, generator=draw, dtype=torch.float64).to(dtype)
    far = L2().distance(Bounds().clamp(moved), x)
    reached = L2().distance(L2().within(moved, x, Bounds(), radius), x)
    torch.testing.assert_close(reached, far.minimum(radius), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("eps, high", [(1e-3, 1.0), (300.0, 255.0)])
def test_an_l2_ball_holds_in_half_precision(eps, high):
    draw = torch.Generator().manual_seed(1)
    x = (torch.rand(20, 100, generator=draw) * high).half()
    moved = (x + high * torch.randn(20, 100, generator=draw)).half()
    found = L2(eps).project(moved, x, Bounds(0.0, high))
    assert found.isfinite().all()
    reached = (found.double() - x.double()).norm(dim=1)
    assert (reached <= 1.1 * eps).all() and reached.mean() > 0.3 * eps


@pytest.mark.parametrize(
    ("constraint", "name", "is_ball", "in_input_units", "judges_misclassified"),
    [
        (Linf(0.1), "linf", True, True, False),
        (L2(0.1), "l2", True, True, False),
        (L1(1), "l1", True, True, False),
        (L0(2), "l0", True, False, False),
        (Patch(), "patch", False, False, False),
        (Spatial(rotate=3), "spatial", False, False, False),
        (Colour(hue=2), "colour", False, False, False),
        (Corruptions(3), "corruptions", False, False, True),
    ],
)
def test_a_constraint_states_its_name_and_what_it_is(
    constraint, name, is_ball, in_input_units, judges_misclassified
):
    assert isinstance(constraint, Constraint)
    stated = constraint.name, constraint.is_ball, constraint.in_input_units, constraint.judges_misclassified
    assert stated == (name, is_ball, in_input_units, judges_misclassified)
