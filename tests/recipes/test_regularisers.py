"""Recipes whose loss has a penalty, against models on which it is known in closed form."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from holdfast.core.batch import Batch
from holdfast.core.constraints import L0, L2, Linf
from holdfast.core.draws import Draws
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.model import Bounds, Classifier
from holdfast.core.threat import ThreatModel
from holdfast.recipes import (
    CURE,
    LLR,
    GradientRegularisation,
    JacobianRegularisation,
    LipschitzConstraint,
    MarginTraining,
    Standard,
)
from holdfast.recipes.training.fit import Update
from holdfast.recipes.training.learner import Learner
from holdfast.recipes.training.weights import twin
from holdfast.testing import fakes
from holdfast.testing.recipes import SHORT
from matrices import gains

EPS, UPDATE = 0.2, Update(Draws(3), 0, 0.0, 1.0)


def linear(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(weight)
    return Classifier(layer, bounds=Bounds(-100.0, 100.0))


def data(features=4, classes=2, n=8):
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(n, features, generator=draw, dtype=torch.float64)
    return Batch(x, torch.arange(n) % classes, torch.arange(n))


def learner(model, constraint=None):
    state = {"place": torch.zeros((), dtype=torch.int64)}
    return Learner(model, twin(model), ThreatModel(constraint or Linf(EPS)), state)


def two_classes(batch):
    """A linear model with the logits (0, w x), its w, and the cross-entropy and its slope over the margin w x."""
    w = torch.tensor([0.5, -1.0, 2.0, 0.25], dtype=torch.float64)
    sign = 2.0 * batch.y - 1
    return (
        linear(torch.stack((0 * w, w))),
        w,
        lambda t: F.softplus(-sign * t),
        lambda t: -sign * (-sign * t).sigmoid(),
    )


def penalty(recipe, learner, batch):
    x_adv = batch.x if isinstance(recipe, CURE) else recipe.inner(learner, batch, UPDATE)
    whole, _ = recipe.loss(learner, batch, x_adv)
    return (whole - F.cross_entropy(learner.net(batch.x), batch.y)).item(), x_adv


def test_the_jacobian_of_an_orthogonal_model_is_known_from_one_projection():
    batch, weight = data(classes=3), 2.0 * torch.eye(3, 4, dtype=torch.float64)
    found, _ = penalty(JacobianRegularisation(weight=0.1), learner(linear(weight)), batch)
    assert found == pytest.approx(0.05 * 12.0)


def test_the_jacobian_of_any_linear_model_is_right_on_average():
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batch = data(classes=3, n=4000)
    found, _ = penalty(JacobianRegularisation(weight=2.0, projections=2), learner(linear(weight)), batch)
    assert found == pytest.approx(weight.square().sum().item(), rel=0.03)


def test_the_projections_are_others_at_the_next_update_and_the_same_when_measured_twice():
    recipe, batch = JacobianRegularisation(weight=1.0), data(classes=3)
    model = learner(linear(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).double()))
    one, _ = penalty(recipe, model, batch)
    assert recipe.loss(model, batch, batch.x)[0].item() == recipe.loss(model, batch, batch.x)[0].item()
    recipe.inner(model, batch, replace(UPDATE, rng=Draws(4)))
    assert recipe.loss(model, batch, batch.x)[0].item() != pytest.approx(one)


@pytest.mark.parametrize("constraint", [Linf(EPS), L2(EPS)], ids=repr)
def test_cure_is_the_change_of_the_gradient_over_a_step(constraint):
    batch = data()
    model, w, _, slope = two_classes(batch)
    found, _ = penalty(CURE(weight=3.0, reach=0.5), learner(model, constraint), batch)
    length = w.abs().sum() if isinstance(constraint, Linf) else w.norm()
    at = batch.x @ w
    further = at - (2.0 * batch.y - 1) * 0.5 * EPS * length  # up the loss is down the margin
    exact = 3 * ((slope(further) - slope(at)) ** 2).mean() * w.square().sum()
    assert found == pytest.approx(exact.item(), rel=1e-6)


def test_llr_finds_the_point_farthest_from_the_tangent_on_its_side():
    batch = data()
    model, w, loss, slope = two_classes(batch)
    recipe = LLR(bend=4.0, slope=3.0, steps=4)
    found, x_adv = penalty(recipe, learner(model), batch)
    at, moved = batch.x @ w, (x_adv - batch.x) @ w
    torch.testing.assert_close(
        moved.abs(), (EPS * w.abs().sum()).expand(len(batch))
    )  # an end of what is in reach
    tangent = slope(at) * moved
    exact = (4 * (loss(at + moved) - loss(at) - tangent).abs() + 3 * tangent.abs()).mean()
    assert found == pytest.approx(exact.item(), rel=1e-6)


def test_llr_adds_nothing_to_a_linear_loss():
    batch = Batch(data().x, torch.zeros(8, dtype=torch.int64), torch.arange(8))
    model = linear(torch.zeros(2, 4, dtype=torch.float64))
    assert penalty(LLR(), learner(model), batch)[0] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("constraint, length", [(Linf(EPS), 2 * EPS), (L2(EPS), EPS)], ids=repr)
def test_margin_training_takes_off_what_the_ball_needs(constraint, length):
    batch = data(classes=3)
    model = linear(torch.eye(3, 4, dtype=torch.float64))
    recipe = MarginTraining(offset=1.5, temperature=0.5)
    value, _ = recipe.loss(learner(model, constraint), batch, batch.x)
    lowered = batch.x[:, :3] - 1.5 * math.sqrt(2) * length * F.one_hot(batch.y, 3)
    exact = 0.5 * F.cross_entropy(2 * lowered, batch.y)
    assert value.item() == pytest.approx(exact.item())


def test_margin_training_accounts_for_the_scale_of_preprocessing():
    batch, plain = data(classes=3), linear(torch.eye(3, 4, dtype=torch.float64))
    scaled = Classifier(plain.net, bounds=plain.bounds, std=[0.5])
    ratio = Batch(0.5 * batch.x, batch.y, batch.ids)  # which the network sees as the others are
    recipe = MarginTraining()
    one, _ = recipe.loss(learner(scaled, L2(EPS / 2)), ratio, ratio.x)
    other, _ = recipe.loss(learner(plain, L2(EPS)), batch, batch.x)
    assert one.item() == pytest.approx(other.item())


def test_the_slope_of_a_lipschitz_constraint_is_the_gradient_in_the_dual_norm():
    batch = data()
    model, w, _, slope = two_classes(batch)
    recipe = LipschitzConstraint(weight=3.0)
    whole, _ = recipe.loss(learner(model), batch, batch.x)
    exact = 3 * EPS * slope(batch.x @ w).abs().mean() * w.abs().sum()
    level = F.cross_entropy(model(batch.x), batch.y)
    assert (whole - level).item() == pytest.approx(exact.item(), rel=1e-9)


@pytest.mark.parametrize("constraint", [Linf(0.05), L2(0.05)], ids=repr)
def test_the_new_model_of_a_lipschitz_constraint_is_within_it(constraint):
    model, batch = fakes.network(1).requires_grad_(), fakes.labelled(fakes.network(), fakes.examples(n=26))
    how = replace(SHORT, epochs=20)
    recipe = LipschitzConstraint(gain=2.0, training=how)
    assert max(gains(model, batch.x, constraint).values()) > 3
    *_, last = recipe(model, batch, ThreatModel(constraint), rng=Draws(0))
    last.put_into(model)
    assert max(gains(model, batch.x, constraint).values()) <= 2.0 * 1.01


def test_under_l2_the_training_resumes_with_the_state_of_the_power_iteration():
    model, batch = fakes.network(1).requires_grad_(), fakes.labelled(fakes.network(), fakes.examples(n=26))
    recipe, threat = LipschitzConstraint(gain=2.0, training=SHORT), ThreatModel(L2(0.05))
    first, *_, last = recipe(model, batch, threat, rng=Draws(0))
    *_, again = recipe(model, batch, threat, rng=Draws(0), after=first)
    assert any(name.startswith("state.towards.") for name in last.tensors)
    assert all(torch.equal(value, again.tensors[name]) for name, value in last.tensors.items())


@pytest.mark.slow
def test_spectral_normalisation_bounds_the_gain_under_l2_whatever_the_threat():
    model, batch = fakes.network(1).requires_grad_(), fakes.labelled(fakes.network(), fakes.examples(n=26))
    recipe = LipschitzConstraint(gain=1.5, norm="l2", training=replace(SHORT, epochs=20))
    *_, last = recipe(model, batch, ThreatModel(Linf(0.05)), rng=Draws(0))
    last.put_into(model)
    assert max(gains(model, batch.x, L2(1.0)).values()) <= 1.5 * 1.01
    assert max(gains(model, batch.x, Linf(1.0)).values()) > 2


def test_frozen_layers_and_the_statistics_of_a_batch_are_left_to_a_lipschitz_constraint_as_they_are():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(48, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)
    ).double()
    net[1].requires_grad_(False).weight.mul_(20)
    model, batch = Classifier(net).eval(), fakes.labelled(fakes.network(), fakes.examples(n=26))
    recipe = LipschitzConstraint(gain=0.5, training=replace(SHORT, attack_statistics="batch"))
    before = net[1].weight.clone()
    *_, last = recipe(model, batch, ThreatModel(Linf(0.05)), rng=Draws(0))
    assert torch.equal(last.tensors["weights.net.1.weight"], before)
    assert last.tensors["weights.net.4.weight"].abs().sum(1).max() <= 0.5 * (1 + 1e-9)


def test_layers_that_keep_no_weight_are_refused_to_a_lipschitz_constraint():
    weighed = nn.utils.parametrizations.weight_norm(nn.Linear(48, 4).double())
    model, batch = Classifier(nn.Sequential(nn.Flatten(), weighed)).eval(), fakes.examples(n=26)
    with pytest.raises(UsageError, match=r"the weight of net\.1 is computed from parametrizations"):
        LipschitzConstraint(training=SHORT)(model, batch, ThreatModel(Linf(0.05)), rng=Draws(0))


def test_a_threat_without_gains_is_refused():
    with pytest.raises(UsageError, match="the gain of a layer can be computed under linf, l2 and l1"):
        list(LipschitzConstraint()(fakes.network(), data(), ThreatModel(L0(2.0)), rng=Draws(0)))


class Cut(nn.Module):
    """Detaches its input."""

    def forward(self, x):
        return x.detach()


@pytest.mark.parametrize(
    "recipe",
    [
        GradientRegularisation(training=SHORT),
        GradientRegularisation(method="finite-difference", training=SHORT),
        JacobianRegularisation(training=SHORT),
        CURE(training=SHORT),
        LipschitzConstraint(training=SHORT),
    ],
    ids=lambda recipe: type(recipe).__name__,
)
def test_a_network_that_passes_no_gradient_to_its_input_is_refused_in_words(recipe):
    net = Classifier(nn.Sequential(Cut(), nn.Linear(4, 2)).double(), bounds=Bounds(-100.0, 100.0))
    with pytest.raises(TargetError, match="no gradient reaches the input of this network"):
        next(recipe(net, data(), ThreatModel(Linf(EPS)), rng=Draws(0)))


def test_a_network_whose_weights_get_no_gradient_is_refused_in_words():
    net = Classifier(nn.Sequential(nn.Linear(4, 2), Cut()).double(), bounds=Bounds(-100.0, 100.0))
    with pytest.raises(TargetError, match="no gradient of the loss reaches a weight"):
        next(Standard(training=SHORT)(net, data(), ThreatModel(Linf(EPS)), rng=Draws(0)))
