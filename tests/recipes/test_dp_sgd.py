"""DP-SGD: its gradients, its noise and its budget beside independent computations, and what it refuses."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, relu

from holdfast.core.constraints import Linf
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.recipes import DPSGD
from holdfast.recipes.dp_sgd import noise_multiplier, refuse_unclippable, spent_epsilon
from holdfast.recipes.training.learner import Learner
from holdfast.recipes.training.recipe import facts_of
from holdfast.testing import fakes
from holdfast.testing.recipes import SHORT

THREAT = ThreatModel(Linf(0.0))


def convolutional():
    torch.manual_seed(0)
    return Classifier(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2),
            nn.GroupNorm(2, 4),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(4, 4),
        ).double()
    )


def batch(n=6):
    return fakes.labelled(fakes.network(), fakes.examples(n=n))


def gradients(net):
    return [weight.grad.clone() for weight in net.parameters()]


@pytest.mark.parametrize("net", [convolutional, lambda: fakes.network(1).requires_grad_()])
def test_each_gradient_is_clipped_before_the_sum(net):
    model, examples = net().train(), batch()
    learner = Learner(model, model, THREAT)
    value, right = DPSGD(max_grad_norm=0.5).private_loss(learner, examples, examples.x, expected=3, noise=0.0)
    found = gradients(model)
    sums = [torch.zeros_like(weight) for weight in model.parameters()]
    for x, y in zip(examples.x, examples.y, strict=True):
        model.zero_grad()
        cross_entropy(model(x[None]), y[None]).backward()
        norm = math.hypot(*(float(gradient.norm()) for gradient in gradients(model)))
        for total, gradient in zip(sums, gradients(model), strict=True):
            total += gradient * min(1.0, 0.5 / norm) / 3
    for one, other in zip(found, sums, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-8)
    logits = model(examples.x)
    torch.testing.assert_close(value, cross_entropy(logits, examples.y).detach())
    assert int(right) == int((logits.argmax(1) == examples.y).sum())


def test_noise_has_the_stated_size_also_without_examples():
    model = Classifier(nn.Linear(300, 100)).train()
    learner, nothing = Learner(model, model, THREAT), batch(1)
    empty = replace(nothing, x=torch.zeros(0, 300), y=nothing.y[:0], ids=nothing.ids[:0])
    torch.manual_seed(0)
    DPSGD(max_grad_norm=2.0).private_loss(learner, empty, empty.x, expected=10, noise=3.0)
    assert float(model.net.weight.grad.std()) == pytest.approx(0.6, rel=0.03)


def test_every_example_is_in_a_batch_with_the_same_probability(before_updates, noise_multiplier_of_one):
    sizes, rows = [], []

    def begin(loop, epoch, step, examples):
        sizes.append(len(examples))
        rows.append(examples.ids)

    before_updates(begin)
    how = replace(SHORT, epochs=20, batch=10)
    list(DPSGD(delta=1e-3, training=how)(fakes.network(1).requires_grad_(), batch(40), THREAT, rng=Draws(0)))
    assert len(sizes) == 80 and len(set(sizes)) > 5
    assert torch.tensor(sizes).double().mean() == pytest.approx(10, abs=1.5)
    _, counts = torch.cat(rows).unique(return_counts=True)
    assert len(counts) == 40 and int(counts.min()) > 5 and int(counts.max()) < 40


def test_the_spent_budget_is_above_that_of_the_exact_gaussian_mechanism():
    """Without sampling, steps with noise s are one Gaussian mechanism with noise s / sqrt(steps), whose delta is known
    (Balle & Wang, ICML 2018)."""

    def delta_of(epsilon, sensitivity):
        normal = torch.distributions.Normal(0.0, 1.0)
        a, b = (torch.tensor(sign * sensitivity / 2 - epsilon / sensitivity).double() for sign in (1, -1))
        return float(normal.cdf(a) - math.exp(epsilon) * normal.cdf(b))

    spent = spent_epsilon(4.0, 1e-5, 1.0, 9)
    assert delta_of(spent, 3 / 4) < 1e-5 < delta_of(spent - 0.05, 3 / 4)


def test_the_noise_is_that_of_the_budget():
    noise = noise_multiplier(2.0, 1e-5, 0.064, 300)
    # 2.4421: dp-accounting 0.6.0 (PLD) states an epsilon of 1.959 for it, and 1.998 for a noise that is 1.7 % smaller
    assert noise == pytest.approx(2.442, rel=0.02)
    assert spent_epsilon(noise, 1e-5, 0.064, 300, 0.04) <= 2
    assert facts_of(DPSGD()).goal.metric == "clean_accuracy"


class Mixing(nn.Module):
    """A layer that subtracts the mean of the batch."""

    def forward(self, x):
        return x - x.mean(0)


class Twice(nn.Module):
    """A network that uses the weight of a layer a second time, outside of the layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(48, 48)
        self.last = nn.Linear(48, 4)

    def forward(self, x):
        return self.last(relu(self.layer(x.flatten(1))) + x.flatten(1) @ self.layer.weight)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([nn.Flatten(), nn.BatchNorm1d(48), nn.Linear(48, 4)], "net.1 is batch norm.*GroupNorm"),
        ([nn.Flatten(), Mixing(), nn.Linear(48, 4)], "mixes the examples of a batch"),
        ([Twice()], "uses a weight outside its layer"),
        (
            [nn.InstanceNorm2d(3, track_running_stats=True), nn.Flatten(), nn.Linear(48, 4)],
            "keeps statistics of the training inputs",
        ),
    ],
)
def test_networks_whose_gradients_cannot_be_clipped_are_refused(layers, message):
    with pytest.raises(UsageError, match=message):
        refuse_unclippable(Classifier(nn.Sequential(*layers).double()), batch())


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (DPSGD(delta=0.1), r"delta is 0\.1.*smaller than 0\.025.*delta=0.003"),
        (DPSGD(delta=1e-3, training=replace(SHORT, awp=0.1)), "not possible with awp"),
        (DPSGD(delta=1e-3, training=replace(SHORT, precision="bfloat16")), "bfloat16 rounds"),
        (DPSGD(delta=1e-3, training=replace(SHORT, pacing=lambda *_: None)), "a budget of time changes"),
        (DPSGD(delta=1e-3, training=replace(SHORT, cutmix=0.5)), "cutmix"),
        (DPSGD(delta=1e-3, training=replace(SHORT, class_weights=(1.0,) * 4)), "class_weights"),
    ],
)
def test_settings_without_a_guarantee_are_refused(recipe, message, noise_multiplier_of_one):
    with pytest.raises(UsageError, match=message):
        recipe(fakes.network(1).requires_grad_(), batch(40), THREAT, rng=Draws(0))


def test_the_missing_extra_is_named(not_installed):
    with pytest.raises(UsageError, match=r'pip install "holdfast-ml\[privacy\]"'):
        refuse_unclippable(fakes.network(1).requires_grad_(), batch())
