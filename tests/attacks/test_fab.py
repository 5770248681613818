"""FAB: exact on linear models, inside eps or nowhere, and what it costs."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from holdfast.attacks import FAB
from holdfast.attacks.parts.boundaries import to_plane
from holdfast.core.constraints import L0, L1, L2, Linf, allowed
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.meter import Metered, margin
from holdfast.core.model import Bounds
from holdfast.core.threat import ThreatModel
from holdfast.testing.fakes import LinearOracle, examples, labelled, linear_problem, network

RNG = Draws(5)


@pytest.mark.parametrize("norm", [Linf, L2, L1])
@given(seed=st.integers(0, 10**6), bias=st.floats(-6, 6))
def test_the_way_to_the_plane_is_the_shortest_in_the_box(norm, seed, bias):
    draw = torch.Generator().manual_seed(seed)
    x = (torch.rand(7, 9, generator=draw, dtype=torch.float64) * 1.4 - 0.2).clamp(0, 1)
    normal = torch.randn(9, generator=draw, dtype=torch.float64)
    normal[::4] = 0
    oracle = LinearOracle(torch.stack((normal, 0 * normal)), torch.tensor([bias, 0.0], dtype=torch.float64))
    height = x @ normal + bias
    exact = oracle.distance(x, (height < 0).long(), norm())
    (step,), (length,) = to_plane(x[None], normal.expand(7, 9), height[None], norm(), Bounds())
    assert ((x + step >= -1e-12) & (x + step <= 1 + 1e-12)).all()
    room = torch.where(normal * height[:, None] > 0, x, 1 - x)
    beyond = (normal.abs() * room).sum(1) - height.abs()
    # a plane through a corner of the box is reached or not, depending on rounding
    clear = beyond.abs() > 1e-9
    reached = (beyond > 0) & clear
    assert (reached == (exact < math.inf))[clear].all()
    torch.testing.assert_close(length, norm().distance(x + step, x))
    torch.testing.assert_close(length[reached], exact[reached], rtol=1e-4, atol=1e-9)
    end = (x + step) @ normal + bias
    assert (end[reached].abs() <= 2e-5 * height[reached].abs() + 1e-9).all()
    corner = torch.where(normal * height[:, None] > 0, 0.0, 1.0).to(x) * normal
    torch.testing.assert_close(end[~reached], (corner.sum(1) + bias)[~reached])


@pytest.mark.parametrize(
    "attack", [FAB(steps=30), FAB(steps=30, targets=0), FAB(steps=15, restarts=2)], ids=repr
)
@pytest.mark.parametrize("norm", [Linf, L2, L1])
def test_finds_the_exact_distance_of_a_linear_model(attack, norm):
    model, batch = linear_problem(2, classes=4)
    exact = model.distance(batch.x, batch.y, norm())
    x_adv = attack(model, batch, ThreatModel(norm()), rng=RNG)
    broken = margin(model(x_adv), batch) <= 0
    found = torch.where(broken, norm().distance(x_adv, batch.x), torch.inf)
    assert (found >= exact * (1 - 1e-6)).all()
    near = exact < math.inf
    assert broken[near].all()
    assert (found[near] <= 1.03 * exact[near] + 1e-4).all()


@pytest.mark.parametrize("norm", [Linf, L2, L1])
def test_with_an_eps_it_breaks_what_can_be_broken_inside(norm):
    model, batch = linear_problem(3)
    exact = model.distance(batch.x, batch.y, norm())
    eps = exact.median().item()
    x_adv = FAB(steps=20)(model, batch, ThreatModel(norm(eps)), rng=RNG)
    assert allowed(norm(eps), x_adv, batch.x, model.bounds).all()
    broken = margin(model(x_adv), batch) <= 0
    assert broken[exact < 0.99 * eps].all()
    assert not broken[exact > 1.001 * eps].any()


def test_an_example_broken_inside_eps_leaves():
    model, batch = linear_problem(4)
    threat = ThreatModel(Linf(1.0))
    metered = Metered(model, batch, threat)
    FAB(steps=50)(metered, batch, threat, rng=RNG)
    spent = metered.spent
    assert (spent.first_success > 0).all()
    assert (spent.queries <= spent.first_success + 1).all()


def test_a_run_that_will_not_come_inside_eps_ends_after_two_looks_back():
    model, batch = linear_problem(4)
    exact = model.distance(batch.x, batch.y, L2())
    eps = exact.median().item()
    spent, results = [], []
    for attack in (FAB(steps=60, targets=1), FAB(steps=60, targets=1, patience=10)):
        metered = Metered(model, batch, ThreatModel(L2(eps)))
        results.append(attack(metered, batch, ThreatModel(L2(eps)), rng=RNG))
        spent.append(metered.spent.backwards)
    full, short = spent
    surviving = full == 60
    assert surviving.any() and (~surviving).any()
    assert (short[surviving] <= 20).all()
    assert torch.equal(short[~surviving], full[~surviving])
    assert torch.equal(results[0][~surviving], results[1][~surviving])
    everything = [
        attack(model, batch, ThreatModel(L2()), rng=RNG)
        for attack in (FAB(steps=30), FAB(steps=30, patience=5))
    ]
    assert torch.equal(*everything)


def test_a_run_that_is_not_broken_at_a_look_ends():
    model, batch = linear_problem(4)
    threat = ThreatModel(L2(1e9))
    steady = LinearOracle(model.weight, torch.tensor([100.0, 0.0, 0.0]).to(model.weight))
    zeros = batch.__class__(batch.x, torch.zeros_like(batch.y), batch.ids)
    metered = Metered(steady, zeros, threat)
    FAB(steps=50, targets=1, patience=10)(metered, zeros, threat, rng=RNG)
    assert (metered.spent.backwards == 10).all()


def test_a_result_near_the_ball_is_the_start_of_the_next_attack(monkeypatch):
    model = network(rippled=True)
    batch, threat = labelled(model, examples(n=200)), ThreatModel(L1(0.2))
    attack = FAB(steps=3, targets=1, eta=1.6, refine=2)

    def broken():
        return int((margin(model(attack(model, batch, threat, rng=RNG)), batch) <= 0).sum())

    found = broken()
    monkeypatch.setattr(FAB, "_from_near", lambda *_: None)
    assert found > broken()


def test_going_on_is_for_what_is_near_alone_and_keeps_to_its_steps():
    model, batch = linear_problem(4)
    exact = model.distance(batch.x, batch.y, L2())
    threat = ThreatModel(L2(exact.median().item()))
    beyond = exact / threat.constraint.eps
    spent = []
    for refine in (0, 6):
        metered = Metered(model, batch, threat)
        FAB(steps=10, targets=1, refine=refine)(metered, batch, threat, rng=RNG)
        spent.append(metered.spent.backwards)
    more = spent[1] - spent[0]
    near, far = (beyond > 1.01) & (beyond < 1.3), beyond > 1.4
    assert near.any() and far.any()
    assert (more[near] == 12 + 6).all()  # twice the steps from there, and inside the ball
    assert (more[far] == 6).all()
    assert torch.equal(*(FAB(refine=refine)(model, batch, ThreatModel(L2()), rng=RNG) for refine in (0, 6)))


def test_already_wrong_means_distance_zero_at_once():
    model, batch = linear_problem(5)
    wrong = batch.__class__(batch.x, (batch.y + 1) % 3, batch.ids)
    threat = ThreatModel(L2())
    metered = Metered(model, wrong, threat)
    x_adv = FAB()(metered, wrong, threat, rng=RNG)
    assert (x_adv == wrong.x).all()
    assert (metered.spent.queries <= 3).all()


def test_a_pass_is_two_forwards_and_one_gradient_whatever_the_classes():
    model = network(classes=8)
    batch = labelled(model, examples(n=5))
    threat = ThreatModel(Linf(1e-7))
    for attack, runs, gradients in (
        (FAB(steps=4), 7, 1),
        (FAB(steps=4, targets=3), 3, 1),
        (FAB(steps=4, targets=0), 1, 8),
    ):
        metered = Metered(model, batch, threat)
        attack(metered, batch, threat, rng=RNG)
        assert (metered.spent.backwards == runs * 4 * gradients).all()
        ranking, bisection = int(attack.targets > 0), 10
        assert (metered.spent.queries >= runs * 8 + ranking).all()
        assert (metered.spent.queries <= runs * 8 + ranking + bisection).all()


def test_a_goal_is_what_it_aims_at():
    model = network()
    batch = labelled(model, examples(n=12))
    batch = batch.towards((batch.y + 1) % 4)
    x_adv = FAB(steps=30)(model, batch, ThreatModel(L2()), rng=RNG)
    moved = (x_adv != batch.x).flatten(1).any(1)
    assert moved.double().mean() > 0.7
    assert (model(x_adv).argmax(1)[moved] == batch.target[moved]).all()


def test_a_constraint_without_planes_is_refused_by_name():
    model, batch = linear_problem(6)
    with pytest.raises(UsageError, match="FAB.*Linf or L2 or L1.*l0"):
        FAB()(model, batch, ThreatModel(L0(3)), rng=RNG)


@pytest.mark.parametrize("norm", [Linf, L2, L1])
def test_a_point_on_the_plane_is_not_drawn_back(norm):
    """What counts is how near the point is, beside how near the clean one."""
    clean = torch.full((1, 9), 0.5, dtype=torch.float64)
    normal = torch.ones(1, 9, dtype=torch.float64)
    x = clean.clone()
    x[0, 0] = 0.9
    model = network(shape=(9,))
    step = FAB()._step
    on_it = step(x, clean, torch.zeros(1, dtype=torch.float64), normal, norm(), model)
    torch.testing.assert_close(on_it, x, rtol=0, atol=1e-6)
    beside = step(x, clean, torch.full((1,), 0.4, dtype=torch.float64), normal, norm(), model)
    assert (beside - x).abs().max() > 0.01
