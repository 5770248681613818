"""Square: its schedule, its patterns, its budget, and that it only ever gets closer."""

import math

import pytest
import torch

from holdfast.attacks import Square
from holdfast.attacks.parts.random_search import as_image, pattern, window, window_share
from holdfast.core.constraints import L1, L2, Linf, allowed
from holdfast.core.draws import Draws
from holdfast.core.meter import Metered, margin
from holdfast.core.threat import ThreatModel
from holdfast.testing.fakes import examples, labelled, linear_problem, network

RNG = Draws(9)
NORMS = [Linf(0.1), L2(0.5), L1(2.0)]


def test_the_share_of_the_pixels_halves_as_in_the_paper():
    assert [
        window_share(0.8, step, None) * 2**k / 0.8 for k, step in enumerate((10, 50, 200, 500, 1000))
    ] == [1.0] * 5
    assert window_share(0.8, 11, None) == 0.4
    assert window_share(0.8, 4999, None) == 0.8 / 128
    assert window_share(0.8, 499, 500) == 0.8 / 512
    assert window_share(0.8, 30, 5000) == window_share(0.8, 60, None)


@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 3), (4, 7), (13, 13)])
@pytest.mark.parametrize("norm", [L2(), L1()])
def test_a_pattern_is_two_heaps_of_opposite_sign_and_length_one(norm, rows, columns):
    heaps = pattern(rows, columns, norm, torch.zeros((), dtype=torch.float64))
    assert heaps.shape == (rows, columns)
    torch.testing.assert_close(
        norm.distance(heaps[None], 0 * heaps[None]), torch.ones(1, dtype=torch.float64)
    )
    assert (heaps[: rows // 2] > 0).all()
    assert (heaps[rows // 2 :] < 0).all()
    lower = -heaps[rows // 2 :]
    assert lower.max() == lower[len(lower) // 2, columns // 2]


def test_windows_are_squares_where_they_fit():
    assert window(0.8, 28, 28, odd=False) == (25, 25)
    assert window(0.8, 28, 28, odd=True) == (25, 25)
    assert window(0.0001, 28, 28, odd=False) == (1, 1)
    assert window(0.0001, 28, 28, odd=True) == (3, 3)
    assert window(0.5, 1, 20, odd=False) == (1, 10)
    assert window(0.9, 2, 2, odd=True) == (2, 2)


def test_anything_is_laid_out_as_an_image():
    shapes = [(3, 8, 9), (20,), (4, 5), (2, 3, 4, 5), ()]
    laid = [as_image(torch.Size(shape)) for shape in shapes]
    assert laid == [(3, 8, 9), (1, 1, 20), (1, 4, 5), (2, 12, 5), (1, 1, 1)]


@pytest.mark.parametrize("norm", NORMS, ids=repr)
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 5, 9), (20,), (4, 6), (2, 3, 4, 5), (1, 1, 3)])
def test_every_shape_stays_in_ball_and_box(norm, shape):
    model = network(shape=shape)
    for dtype in (torch.float64, torch.float32):
        batch = examples(n=6, shape=shape, dtype=dtype)
        batch = labelled(model.to(dtype), batch)
        x_adv = Square(queries=150)(model, batch, ThreatModel(norm), rng=RNG)
        assert x_adv.dtype == dtype
        assert allowed(norm, x_adv, batch.x, model.bounds).all()
        assert (x_adv != batch.x).any()


@pytest.mark.parametrize("norm", NORMS, ids=repr)
def test_more_queries_never_lose(norm):
    model = network()
    batch = labelled(model, examples())
    before = torch.full((len(batch),), math.inf, dtype=torch.float64)
    for queries in (1, 2, 30, 64, 65, 200):
        x_adv = Square(queries=queries, scale_schedule=False)(model, batch, ThreatModel(norm), rng=RNG)
        after = margin(model(x_adv), batch)
        assert (after <= before + 1e-12).all()
        before = after


@pytest.mark.parametrize(
    "queries, budget", [(1, None), (100, None), (100, 37), (37, 100), (64, 64), (65, 65)]
)
@pytest.mark.parametrize("norm", [Linf(1e-7), L2(1e-7), L1(1e-7)], ids=repr)
def test_a_standing_example_costs_exactly_the_smaller_budget(norm, queries, budget):
    model = network()
    batch = labelled(model, examples(n=3))
    threat = ThreatModel(norm, access="scores", queries=budget)
    metered = Metered(model, batch, threat)
    Square(queries=queries)(metered, batch, threat, rng=RNG)
    assert (metered.spent.queries == min(queries, budget or queries)).all()
    assert (metered.spent.backwards == 0).all()


@pytest.mark.parametrize("norm", [Linf, L2, L1])
def test_breaks_well_beyond_the_exact_distance_and_never_within(norm):
    model, batch = linear_problem(1)
    exact = model.distance(batch.x, batch.y, norm())
    eps = exact.median().item()
    x_adv = Square(queries=600)(model, batch, ThreatModel(norm(eps)), rng=RNG)
    broken = margin(model(x_adv), batch) <= 0
    assert not broken[exact > 1.001 * eps].any()
    assert broken[exact < 0.5 * eps].all()


def test_a_broken_example_leaves():
    model = network()
    batch = labelled(model, examples())
    threat = ThreatModel(Linf(0.5), access="scores")
    metered = Metered(model, batch, threat)
    x_adv = Square(queries=300)(metered, batch, threat, rng=RNG)
    broken = margin(model(x_adv), batch) <= 0
    assert broken.any()
    assert (metered.spent.queries[broken] == metered.spent.first_success[broken]).all()


@pytest.mark.parametrize("norm", NORMS, ids=repr)
def test_results_of_an_example_do_not_depend_on_its_batch(norm):
    model = network()
    batch = labelled(model, examples())
    whole = Square(queries=100)(model, batch, ThreatModel(norm), rng=RNG)
    rows = torch.tensor([11, 2, 5])
    torch.testing.assert_close(
        Square(queries=100)(model, batch.take(rows), ThreatModel(norm), rng=RNG), whole[rows]
    )


def test_a_goal_is_what_it_aims_at():
    model = network()
    batch = labelled(model, examples(n=12))
    batch = batch.towards((batch.y + 1) % 4)
    x_adv = Square(queries=500)(model, batch, ThreatModel(Linf(0.9)), rng=RNG)
    assert (model(x_adv).argmax(1) == batch.target).double().mean() > 0.7
