"""What a recipe's paper says happens does happen, in closed form where a linear network has one."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from holdfast.core.batch import UNLABELLED, Batch
from holdfast.core.constraints import L0, L1, L2, Linf
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Bounds, Classifier
from holdfast.core.threat import ThreatModel
from holdfast.recipes import (
    ATTA,
    HAT,
    IKL,
    MART,
    SCORE,
    TRADES,
    VAT,
    CurriculumTraining,
    EnsembleTraining,
    FreeTraining,
    GradientRegularisation,
    MultiNormTraining,
    PGDTraining,
    SingleStep,
    Standard,
)
from holdfast.recipes.training.augment import augmented, moves
from holdfast.recipes.training.fit import Training, Update
from holdfast.recipes.training.learner import Learner
from holdfast.recipes.training.weights import twin
from holdfast.testing import fakes
from holdfast.testing.recipes import SHORT
from holdfast.threats.transformations import Spatial

STILL = Training(
    epochs=1, batch=4, lr=1e-9, schedule="flat", averaging="none", momentum=0.0, weight_decay=0.0
)
WIDE = Bounds(-10.0, 10.0)


def linear(offset=0.0):
    """Two classes; the second's logit less the first's is (3, -1, 2) x + offset."""
    net = torch.nn.Linear(3, 2).double()
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.0, 0.0, 0.0], [3.0, -1.0, 2.0]]))
        net.bias.copy_(torch.tensor([0.0, offset]))
    return Classifier(net, bounds=WIDE)


W = torch.tensor([3.0, -1.0, 2.0], dtype=torch.float64)


def data(n=8, label=0):
    x = torch.rand(n, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Batch(x, torch.full((n,), label), torch.arange(n))


def learner(net, constraint):
    return Learner(net, twin(net), ThreatModel(constraint))


def update(done=0.0):
    return Update(Draws(0), 0, done, 1.0)


@pytest.mark.parametrize(
    "constraint, expected", [(Linf(0.2), 0.2 * W.sign()), (L2(0.2), 0.2 * W / W.norm())], ids=repr
)
def test_free_moves_the_perturbation_to_where_the_gradient_points(constraint, expected):
    recipe = FreeTraining(replays=2, training=STILL)
    (found,) = recipe(linear(), data(), ThreatModel(constraint), rng=Draws(0))
    torch.testing.assert_close(found.tensors["state.delta"], expected.expand(4, 3))


def test_free_spends_no_length_on_what_the_box_has_cut():
    net = torch.nn.Linear(3, 2).double()
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.0, 0.0, 0.0], [-1.0, -1.0, 1.0]]))
    dark = data(4).at(torch.zeros(4, 3, dtype=torch.float64))  # which two features of three should go below
    recipe = FreeTraining(replays=30, training=STILL)
    (found,) = recipe(Classifier(net), dark, ThreatModel(L2(0.3)), rng=Draws(0))
    moved = found.tensors["state.delta"].clamp_min(0)
    torch.testing.assert_close(moved, torch.tensor([0.0, 0.0, 0.3]).double().expand(4, 3))


def test_a_perturbation_that_was_clipped_is_restored():
    net = torch.nn.Linear(3, 2).double()
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]))
    dark = data(4).at(torch.zeros(4, 3, dtype=torch.float64))
    state = {"delta": torch.full((4, 3), -0.3, dtype=torch.float64)}
    held = replace(learner(Classifier(net), Linf(0.3)), state=state)
    recipe = FreeTraining()
    for _ in range(2):
        recipe.loss(held, dark, recipe.inner(held, dark, update()))[0].backward()
    torch.testing.assert_close(state["delta"], torch.full((4, 3), 0.3, dtype=torch.float64))


def test_free_costs_a_forward_and_a_backward_an_update_and_makes_no_attack():
    passes = []

    class Counted(torch.nn.Linear):
        def forward(self, x):
            out = super().forward(x)
            passes.append("forward")
            if out.requires_grad:
                out.register_hook(lambda grad: passes.append("backward"))
            return out

    net = Classifier(Counted(3, 2).double(), bounds=WIDE)
    list(
        FreeTraining(replays=5, training=replace(STILL, epochs=2))(
            net, data(), ThreatModel(Linf(0.1)), rng=Draws(0)
        )
    )
    assert passes == ["forward", "backward"] * (2 * 2 * 5)


@pytest.mark.slow
def test_free_learns_what_holds_under_its_perturbation():
    model, some = fakes.network(1).requires_grad_(), fakes.labelled(fakes.network(), fakes.examples(n=64))
    how = replace(SHORT, epochs=20, batch=16)
    *_, last = FreeTraining(replays=4, training=how)(model, some, ThreatModel(Linf(0.03)), rng=Draws(0))
    assert last.measured["accuracy"] > 0.8


@pytest.mark.parametrize(
    "constraint, expected", [(Linf(0.2), 0.2 * W.sign()), (L2(0.2), 0.2 * W / W.norm())], ids=repr
)
def test_the_virtual_adversarial_direction_of_a_linear_network_is_its_weight_either_way(constraint, expected):
    some = data().labelled(torch.full((8,), UNLABELLED))
    moved = VAT().inner(learner(linear(-2.0), constraint), some, update()) - some.x
    towards = (moved @ W).sign()
    assert {-1.0, 1.0} == set(towards.tolist())  # it knows no label: random directions decide
    torch.testing.assert_close(moved, towards[:, None] * expected)


@pytest.mark.slow
def test_virtual_adversarial_training_learns_from_examples_without_labels():
    some = fakes.labelled(fakes.network(), fakes.examples(n=26))
    blank = some.labelled(torch.where(torch.arange(26) < 13, some.y, UNLABELLED))
    net, threat = fakes.network(1).requires_grad_(), ThreatModel(L2(0.5))
    held = Learner(net, twin(net), threat)
    x_adv = VAT().inner(held, blank, update())
    value, right = VAT(weight=0.0).labelled_loss(held, blank, x_adv, labelled=0.5)
    few = some.take(torch.arange(13))
    torch.testing.assert_close(value, F.cross_entropy(net(few.x), few.y))
    assert int(right) == int((net(x_adv[:13]).argmax(1) == few.y).sum())
    none = blank.labelled(torch.full((26,), UNLABELLED))
    smooth, right = VAT().labelled_loss(held, none, x_adv, labelled=0.5)
    assert smooth > 0
    assert int(right) == 0
    assert torch.autograd.grad(smooth, net.net[1].weight)[0].abs().sum() > 0
    *_, last = VAT(training=replace(SHORT, epochs=20))(net, blank, threat, rng=Draws(0))
    assert last.measured["loss"] < smooth + value


@pytest.mark.parametrize("n", [0, 1, 3, 26])
def test_a_label_counts_as_much_however_seldom_labels_are(n):
    some, net = fakes.labelled(fakes.network(), fakes.examples(n=26)), fakes.network(1).requires_grad_()
    few = some.take(torch.arange(n))
    part = some.labelled(torch.where(torch.arange(26) < n, some.y, UNLABELLED))
    recipe = VAT(weight=0.0, training=replace(STILL, batch=2))
    (found,) = recipe(net, part, ThreatModel(L2(0.5)), rng=Draws(0))
    exact = F.cross_entropy(net(few.x), few.y).item() if n else 0.0
    assert found.measured["loss"] == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("beyond", [0, 1, 3])
def test_a_friendly_attack_ends_as_many_steps_beyond_the_boundary_as_are_allowed(beyond):
    net, eps, steps = linear(-4.0), 0.5, 20
    size = 2.5 * eps / steps * W.abs().sum()  # what a step adds to the difference of the logits
    recipe = CurriculumTraining(beyond=beyond, steps=steps)
    some = data(200)
    x_adv = recipe.inner(learner(net, Linf(eps)), some, update(done=1 - 1e-9))
    over = x_adv @ W - 4.0
    most = some.x @ W - 4.0 + eps * W.abs().sum()
    start = Linf(eps).sample(some, WIDE, Draws(0).at("start")) @ W - 4.0
    crosses = (start < 0) & (most > (beyond + 1) * size)
    assert crosses.sum() > 20
    # a coordinate at its bound moves no further, so a step adds at most its size
    assert (over[crosses] > 0).all()
    assert (over[crosses] <= (beyond + 1) * size).all()
    assert (over[most < 0] < 0).all()
    torch.testing.assert_close(over[most < 0], most[most < 0])


def test_a_curriculum_begins_with_the_first_error_and_ends_with_all_steps_beyond():
    net, some, recipe = linear(-4.0), data(100), CurriculumTraining(beyond=3, steps=20)
    ends = [recipe.inner(learner(net, Linf(0.5)), some, update(done)) @ W for done in (0.0, 0.3, 0.6, 0.9)]
    for before, after in pairwise(ends):
        assert (after >= before - 1e-12).all()
        assert (after > before).sum() > 20


def test_an_early_stopped_attack_keeps_the_statistics_of_the_whole_batch():
    norm = torch.nn.BatchNorm1d(3, affine=False).double()
    net = Classifier(torch.nn.Sequential(norm, linear(1.0).net), bounds=WIDE).train()
    some, constraint = data(), Linf(0.05)
    recipe = CurriculumTraining(beyond=0, steps=4, training=Training(attack_statistics="batch"))
    held = Learner(net, twin(net, "batch"), ThreatModel(constraint))
    x, going, said = constraint.sample(some, WIDE, Draws(0).at("start")), torch.ones(8).bool(), []
    for _ in range(4):
        leaf = x.clone().requires_grad_()
        logits = linear(1.0)((leaf - leaf.mean(0)) / (leaf.var(0, correction=0) + norm.eps).sqrt())
        (grad,) = torch.autograd.grad(F.cross_entropy(logits, some.y, reduction="sum"), leaf)
        said.append(logits.argmax(1))
        going &= said[-1] == some.y
        moved = constraint.project(x + 2.5 * 0.05 / 4 * grad.sign(), some.x, WIDE)
        x = torch.where(going[:, None], moved, x)
    assert 0 < int((said[0] == some.y).sum()) < len(some)
    torch.testing.assert_close(recipe.inner(held, some, update()), x)
    one_right = some.labelled(torch.where(some.ids == 0, said[0], 1 - said[0]))
    found = recipe.inner(held, one_right, update())  # of which a single example goes on
    assert found.isfinite().all()


OTHERS = (L2(0.3), L1(0.9))


@pytest.mark.parametrize("method", ["max", "msd"])
@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_several_norms_end_under_the_one_that_hurts_most(method, scale):
    constraint, others = Linf(0.1 * scale), OTHERS
    rises = [0.1 * scale * W.abs().sum(), 0.3 * W.norm(), 0.9 * W.abs().max()]
    recipe = MultiNormTraining(others=others, method=method, steps=20, reach=2.5)
    some = data()
    x_adv = recipe.inner(learner(linear(), constraint), some, update(1.0))
    rise = (x_adv - some.x) @ W
    torch.testing.assert_close(rise, torch.full_like(rise, max(rises)), rtol=1e-3, atol=0)
    inside = [c.distance(x_adv, some.x) <= c.eps * (1 + 1e-9) for c in (constraint, *others)]
    assert torch.stack(inside).any(0).all()


def test_multi_steepest_descent_keeps_the_worst_point_of_its_path():
    class Hill(torch.nn.Module):
        """Highest six tenths of a step up from the middle, which the second step therefore leads back to."""

        def forward(self, x):
            height = -((x[:, 0] - 0.5 - 0.06) ** 2)
            return torch.stack((torch.zeros_like(height), height), 1)

    net, some = Classifier(Hill()), Batch(torch.full((2, 1), 0.5), torch.zeros(2).long(), torch.arange(2))
    recipe = MultiNormTraining(others=(L2(0.1),), steps=2, reach=2.0)  # each step as long as eps
    x_adv = recipe.inner(Learner(net, net, ThreatModel(Linf(0.1))), some, update())
    torch.testing.assert_close(x_adv, torch.full((2, 1), 0.6))


def test_the_average_trains_on_the_end_of_every_attack():
    recipe, net, some = MultiNormTraining(others=OTHERS, method="average", steps=20), linear(), data()
    held = learner(net, Linf(0.1))
    x_adv = recipe.inner(held, some, update(1.0))
    assert len(x_adv) == 3 * len(some)
    value, right = recipe.loss(held, some, x_adv)
    each = [F.cross_entropy(net(part), some.y) for part in x_adv.split(len(some))]
    assert value.item() == pytest.approx(sum(each).item() / 3)
    assert int(right) == int((((x_adv @ W).view(3, -1)) < 0).all(0).sum())
    assert math.isfinite(value.item())


def test_the_balls_of_several_norms_grow_until_they_are_whole():
    recipe, some = MultiNormTraining(others=OTHERS, steps=20), data()
    rises = [
        (recipe.inner(learner(linear(), Linf(0.1 * grown)), some, replace(update(0.0), grown=grown)) - some.x)
        @ W
        for grown in (0.0, 0.5, 1.0)
    ]
    whole = torch.full_like(rises[0], 0.9 * W.abs().max())
    for rise, share in zip(rises, (0.0, 0.5, 1.0), strict=True):
        torch.testing.assert_close(rise, share * whole, rtol=1e-3, atol=1e-9)


def test_one_norm_alone_is_refused():
    with pytest.raises(UsageError, match=r"others is empty; give others=.* in recipe"):
        MultiNormTraining()(linear(), data(), ThreatModel(Linf(0.1)), rng=Draws(0))


@pytest.mark.parametrize("other", [L0(3), Spatial(rotate=30.0), "l2:1"], ids=repr)
def test_a_norm_without_gradient_steps_is_refused_beside_others(other):
    with pytest.raises(UsageError) as error:
        MultiNormTraining(others=(L2(1.0), other))
    assert f"others contains {other!r}, and multi-norm trains under linf, l2 and l1" in str(error.value)


def test_mart_stays_a_number_where_the_rival_is_certain():
    net, some = linear().float(), data()
    some = replace(some, x=some.x.float())
    with torch.no_grad():
        net.net.weight.mul_(1e4)
    value, _ = MART().loss(learner(net, Linf(0.1)), some, some.x)
    assert value.isfinite()


def test_the_mean_predictions_of_ikl_are_updated_once_in_each_update():
    net = fakes.network(1).requires_grad_()
    some = fakes.labelled(fakes.network(), fakes.examples(n=24))
    recipes = (IKL(steps=1, training=replace(STILL, awp=share)) for share in (0.0, 1e-9))
    once, twice = (list(recipe(net, some, ThreatModel(L2(0.5)), rng=Draws(0))) for recipe in recipes)
    means = once[-1].tensors["state.means"]
    assert (means - means[0, 0]).abs().max() > 1e-3
    torch.testing.assert_close(twice[-1].tensors["state.means"], means)


EPS = Linf(0.2)
NEAR = torch.tensor([0.1, 0.05, -0.2], dtype=torch.float64)
"""From the inputs to where an attack may have ended."""


def divergence(logits, clean):
    p, q = clean.softmax(1), logits.softmax(1)
    return (p * (p / q).log()).sum(1)


@pytest.mark.parametrize(
    ("recipe", "clean"),
    [
        (PGDTraining(clean=0.7, label_smoothing=0.2), 0.7),
        (PGDTraining(label_smoothing=0.2), 0.0),
        (ATTA(clean=0.7, label_smoothing=0.2), 0.7),
        (EnsembleTraining(clean=0.7, label_smoothing=0.2), 0.7),
        (SingleStep(label_smoothing=0.2), 0.0),
        (CurriculumTraining(label_smoothing=0.2), 0.0),
        (FreeTraining(label_smoothing=0.2), 0.0),
        (Standard(label_smoothing=0.2), 0.0),
    ],
    ids=repr,
)
def test_a_loss_on_attacked_inputs_smooths_its_labels_and_weighs_the_clean_ones(recipe, clean):
    net, some = linear(-2.0), data()
    near, soft = some.x + NEAR, 0.8 * F.one_hot(some.y, 2) + 0.1
    found, right = recipe.loss(learner(net, EPS), some, near)
    exact = F.cross_entropy(net(near), soft) + clean * F.cross_entropy(net(some.x), soft)
    assert found.item() == pytest.approx(exact.item())
    assert int(right) == int((net(near).argmax(1) == some.y).sum())


def test_trades_is_the_clean_loss_and_the_divergence_from_the_clean_prediction():
    net, some = linear(-2.0), data()
    near = some.x + NEAR
    found, right = TRADES(beta=3.0).loss(learner(net, EPS), some, near)
    exact = F.cross_entropy(net(some.x), some.y) + 3 * divergence(net(near), net(some.x)).mean()
    assert found.item() == pytest.approx(exact.item())
    assert int(right) == int((net(near).argmax(1) == some.y).sum())


def test_score_forgives_a_distance_and_squares_the_rest():
    net, some = linear(-2.0), data()
    near = some.x + NEAR
    p, q = net(some.x).softmax(1), net(near).softmax(1)
    label = 0.8 * F.one_hot(some.y, 2) + 0.1
    apart = (p - q).square().sum(1)
    exact = ((p - label).square().sum(1) + 5 * (apart - 0.002).clamp_min(0)).mean()
    assert (apart > 0.002).any() and (apart < 0.002).any()
    found, _ = SCORE(beta=5.0, forgiven=0.002, label_smoothing=0.2).loss(learner(net, EPS), some, near)
    assert found.item() == pytest.approx(exact.item())


def test_ikl_weighs_gaps_by_class_means_at_a_temperature():
    net, some = linear(-2.0), data()
    near, even = some.x + NEAR, torch.full((2, 2), 0.5, dtype=torch.float64)
    held = replace(learner(net, EPS), state={"means": even, "seen": even.clone()})
    found, _ = IKL(alpha=3.0, beta=5.0, temperature=4.0, keep=0.9).loss(held, some, near)
    gaps = 0.25 * 2 * 0.5**2 * (NEAR @ W) ** 2  # two pairs of classes, each of the weight of both
    soft = F.cross_entropy(net(near), net(some.x).softmax(1))
    exact = F.cross_entropy(net(some.x), some.y) + 5 * gaps + 3 * soft
    assert found.item() == pytest.approx(exact.item())
    own = 0.9 * 0.5 + 0.1 * (net(some.x) / 4).softmax(1).mean(0)  # no example is of the other class
    torch.testing.assert_close(held.state["seen"], torch.stack((own, even[1])))


def test_hat_takes_labels_of_its_helper_beyond_the_attack():
    net, helper, some = linear(-2.0), linear(0.5), data()
    near = some.x + NEAR
    recipe = HAT(beta=2.0, gamma=0.7, beyond=3.0)
    found, _ = recipe.helped_loss(learner(net, EPS), some, near, helper=helper)
    says = (near @ W + 0.5 > 0).long()
    assert (says != some.y).any()
    exact = (
        F.cross_entropy(net(some.x), some.y)
        + 2 * divergence(net(near), net(some.x)).mean()
        + 0.7 * F.cross_entropy(net(some.x + 3 * NEAR), says)
    )
    assert found.item() == pytest.approx(exact.item())


def test_atta_begins_at_the_perturbation_of_the_epoch_before():
    recipe, some, net = ATTA(steps=1, step=0.4), data(), linear()
    held = Learner(net, twin(net), ThreatModel(EPS), {"kept": torch.zeros(8, 3, dtype=torch.float16)})
    rows, corner = torch.arange(8), (0.2 * W.sign()).expand(8, 3)
    moved = [
        recipe.attacked(held, some, replace(update(), epoch=epoch), rows, 1.0) - some.x for epoch in range(6)
    ]
    short = [(corner - change).abs().amax().item() for change in moved]
    assert short[0] > 0.2  # it began anywhere in the ball
    for before, after in pairwise(short):
        assert after == pytest.approx(max(before - 0.4 * 0.2, 0), abs=1e-3)  # kept in sixteen bits
    assert short[-1] == pytest.approx(0, abs=1e-3)


def test_atta_moves_what_it_keeps_along_with_the_image_and_back():
    flat = torch.nn.Linear(2 * 9 * 8, 2)
    with torch.no_grad():
        flat.weight.copy_(torch.tensor([[0.0], [1.0]]).expand(2, 144))  # every value up, for the label 0
    net = Classifier(torch.nn.Sequential(torch.nn.Flatten(), flat), bounds=WIDE)
    draws, place = torch.Generator().manual_seed(0), Draws(7)
    some = Batch(torch.rand(6, 2, 9, 8, generator=draws), torch.zeros(6, dtype=torch.int64), torch.arange(6))
    before = (0.2 * (2 * torch.rand(6, 2, 9, 8, generator=draws) - 1)).half()
    held = Learner(net, twin(net), ThreatModel(EPS), {"kept": before.clone()})
    recipe = ATTA(steps=1, step=0.4, training=Training(augment="crop-flip"))
    moved, seen = moves(some, "crop-flip", place), augmented(some, "crop-flip", place)
    x_adv = recipe.attacked(held, seen, Update(place, 3, 0.5, 1.0), torch.arange(6), 1.0)
    further = (before.float() + 0.4 * 0.2).clamp(max=0.2)
    in_sight = moved.back(torch.ones_like(some.x), torch.zeros_like(some.x)).bool()
    assert 0.3 < in_sight.float().mean() < 1
    torch.testing.assert_close(
        held.state["kept"].float(), torch.where(in_sight, further, before.float()), atol=2e-4, rtol=0
    )
    came_in = ~moved.of(torch.ones_like(some.x)).bool()  # with no change at first
    expected = torch.where(came_in, 0.4 * 0.2, moved.of(further))
    torch.testing.assert_close(x_adv - seen.x, expected, atol=2e-4, rtol=0)


def test_an_ensemble_is_attacked_in_turn_and_learns_from_every_one():
    net, some = linear(), data()
    other = linear()
    with torch.no_grad():
        other.net.weight.neg_()
    held = replace(learner(net, EPS), threat=ThreatModel(EPS, surrogates=(other,)))
    recipe, ends = EnsembleTraining(steps=20), set()
    for epoch in range(20):
        moved = recipe.inner(held, some, replace(update(), rng=Draws(epoch))) - some.x
        (sign,) = {tuple(one.sign().tolist()) for one in moved}
        torch.testing.assert_close(moved.abs(), torch.full_like(moved, 0.2))
        ends.add(sign)
    assert ends == {tuple(W.sign().tolist()), tuple((-W).sign().tolist())}


@pytest.mark.parametrize(
    "constraint, length", [(EPS, W.abs().sum()), (L2(0.2), W.norm())], ids=["linf", "l2"]
)
@pytest.mark.parametrize("method", ["double-backprop", "finite-difference"])
def test_the_gradient_penalty_is_the_rise_of_the_loss_in_the_dual_norm(constraint, length, method):
    net, some = linear(-2.0), data()
    recipe = GradientRegularisation(weight=3.0, method=method, reach=1e-6)
    found, _ = recipe.loss(learner(net, constraint), some, some.x)
    slope = (some.x @ W - 2.0).sigmoid() * length
    exact = F.cross_entropy(net(some.x), some.y) + 3 * 0.2 * slope.mean()
    assert found.item() == pytest.approx(exact.item(), rel=1e-5)
