"""Bounds in training: differentiable in every weight, above every loss in the ball, and exact where they can be."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from holdfast.attacks.parts.losses import cross_entropy
from holdfast.attacks.pgd import PGD
from holdfast.certifiers.bounds.graph import Graph, Node
from holdfast.certifiers.bounds.operations import Dense, ReLU
from holdfast.certifiers.provers import Crown
from holdfast.core.constraints import L2, Linf
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Bounds, Classifier
from holdfast.core.threat import ThreatModel
from holdfast.io.data.data import open_data
from holdfast.io.models.architectures import mlp
from holdfast.recipes import SABR, IBPTraining, Standard
from holdfast.recipes.training.bounds import (
    box,
    initialised,
    live_graph,
    margin_bounds,
    regularisation,
    robust_cross_entropy,
)
from holdfast.recipes.training.fit import Training
from holdfast.testing import fakes
from holdfast.testing.recipes import SHORT

EPS = 0.03


class Scaled(nn.Module):
    """Learned factor and shift of the inputs."""

    def __init__(self):
        super().__init__()
        self.shift, self.factor = nn.Parameter(torch.zeros(3, 1, 1)), nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, x):
        return (x - self.shift) / self.factor


def network(seed=0):
    """Convolutions with and without bias, batch norm, pooling and a residual sum, in train mode."""
    torch.manual_seed(seed)

    class Residual(nn.Sequential):
        def forward(self, x):
            return x + super().forward(x)

    net = nn.Sequential(
        Scaled(),
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        Residual(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.LeakyReLU(0.1)),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 12),
        nn.Tanh(),
        nn.Linear(12, 4),
    ).double()
    for _, value in net.named_buffers():
        if value.is_floating_point():
            value.add_(torch.rand_like(value))
    return Classifier(net).train()


def bounded_loss(graph, batch, eps=EPS):
    bounds = graph.intervals(box(batch.x, eps, Bounds()), rounded=False)
    return robust_cross_entropy(margin_bounds(graph, bounds, batch.y))


def labelled(n=12):
    data = fakes.examples(n=n)
    return replace(data, y=torch.arange(n) % 4)


def test_gradients_of_the_bound_are_those_of_the_present_weights():
    net, batch = network(), labelled()
    graph_of = live_graph(batch.x)
    graph_of(net)
    assert net.training and all(module.training for module in net.modules())
    with torch.no_grad():  # an update after the operations were recorded
        for weight in net.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    parameters = list(net.parameters())
    gradients = torch.autograd.grad(bounded_loss(graph_of(net), batch).mean(), parameters)
    assert all(gradient.any() for gradient in gradients)
    for weight, gradient in zip(parameters, gradients, strict=True):
        direction, losses = torch.randn_like(weight), []
        for step in (1e-6, -2e-6):
            with torch.no_grad():
                weight.add_(step * direction)
                losses.append(float(bounded_loss(graph_of(net), batch).mean()))
        with torch.no_grad():
            weight.add_(1e-6 * direction)
        slope = (losses[0] - losses[1]) / 2e-6
        assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-4, abs=1e-7)


def test_the_graph_is_the_network_in_evaluation_mode_after_every_pass():
    net, batch = network(), labelled()
    graph_of = live_graph(batch.x)
    graph_of(net)
    net(batch.x)  # changes the running statistics
    torch.testing.assert_close(graph_of(net)(batch.x), net.eval()(batch.x))


def test_the_bound_is_computed_in_the_precision_of_the_training():
    net, data = network().float(), labelled()
    batch = replace(data, x=data.x.float())
    expected = bounded_loss(live_graph(batch.x)(net), batch)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = bounded_loss(live_graph(batch.x)(net), batch)
    assert not torch.equal(rounded, expected)
    torch.testing.assert_close(rounded, expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("seed", range(3))
def test_no_point_of_the_ball_has_a_larger_loss_than_the_bound(seed):
    net, batch = network(seed), labelled()
    graph_of = live_graph(batch.x)
    bound = bounded_loss(graph_of(net), batch).detach()
    frozen = net.eval().requires_grad_(False)
    attack = PGD(steps=20, loss=cross_entropy, drop=False)
    x_adv = attack(frozen, batch, ThreatModel(Linf(EPS)), rng=Draws(seed))
    attacked = F.cross_entropy(frozen(x_adv), batch.y, reduction="none")
    clean = F.cross_entropy(frozen(batch.x), batch.y, reduction="none")
    assert (attacked > clean + 1e-3).any()
    assert (attacked <= bound + 1e-12).all()


def test_the_bound_of_a_linear_network_is_the_largest_loss_in_the_ball():
    net = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(48, 2).double()), bounds=Bounds(-10.0, 10.0))
    batch = replace(fakes.examples(), y=torch.arange(21) % 2)
    graph = live_graph(batch.x)(net)
    weight, sign = net.net[1].weight, (2 * batch.y - 1)[:, None, None, None]
    worst = batch.x - EPS * sign * (weight[1] - weight[0]).sign().view(3, 4, 4)
    bounds = graph.intervals(box(batch.x, EPS, net.bounds), rounded=False)
    loss = robust_cross_entropy(margin_bounds(graph, bounds, batch.y))
    torch.testing.assert_close(loss, F.cross_entropy(net(worst), batch.y, reduction="none"))


def test_the_regularisation_is_that_of_the_paper():
    weight = torch.tensor([[8.0, 0.0], [8.0, 0.0], [8.0, 0.0], [0.0, -2.0]])
    linear = Node(Dense(weight, None), (0,), torch.Size([4]))
    graph = Graph(torch.Size([2]), (linear, Node(ReLU(), (1,), torch.Size([4]))))
    x = torch.tensor([[0.5, 0.25]])
    value = regularisation(graph, graph.intervals((x - 0.01, x + 0.01), rounded=False))
    # the middles are 4, 4, 4 and -0.5, with the mean 2.875; the widths 0.16, 0.16, 0.16 and 0.04, with the mean 0.13
    width, sums, variances = 0.02 / 0.13, 0.5 / 12, 3 * 1.125**2 / 3.375**2
    assert float(value) == pytest.approx((1.5 - width - sums - variances) / 0.5, rel=1e-5)


def test_bounds_do_not_grow_from_layer_to_layer_with_the_initialisation():
    layers = [layer for _ in range(8) for layer in (nn.Linear(200, 200), nn.ReLU())]
    net = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(48, 200), nn.ReLU(), *layers, nn.Linear(200, 4)))

    def growth(net):
        x = fakes.examples(dtype=torch.float32).x
        bounds = live_graph(x)(net).intervals(box(x, EPS, Bounds()), rounded=False)
        first, last = ((high - low).mean() for low, high in (bounds[2], bounds[-2]))
        return float((last / first).detach())

    torch.manual_seed(0)
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
    assert growth(net) > 1e3
    assert 0.2 < growth(initialised(net, "ibp", Draws(0))) < 5


def test_what_bounds_cannot_train_is_refused():
    model, data = fakes.network().requires_grad_(), fakes.examples()
    with pytest.raises(UsageError, match="the threat is l2"):
        IBPTraining()(model, data, ThreatModel(L2(0.5)), rng=Draws(0))
    with pytest.raises(UsageError, match="compiled is true"):
        IBPTraining(training=replace(SHORT, compiled=True))(model, data, ThreatModel(Linf(0.1)), rng=Draws(0))


@pytest.mark.slow
def test_certified_training_makes_networks_of_which_bounds_prove_much():
    digits, test = (open_data("mnist-mini", split=split) for split in ("train", "test"))
    data, judged = digits.read(0, 1_500), test.read(0, 200)
    threat, how = (
        ThreatModel(Linf(0.1)),
        Training(epochs=30, batch=48, lr=2e-3, weight_decay=0.0, average=0.99),
    )

    def proved(recipe):
        torch.manual_seed(0)
        net = Classifier(mlp(width=64)).eval()
        *_, last = replace(recipe, training=how)(net, data, threat, rng=Draws(0))
        last.put_into(net)
        return float(
            Crown().ready(net, judged.take(torch.arange(8)), threat)(judged).certified.float().mean()
        )

    shares = [proved(recipe) for recipe in (Standard(), IBPTraining(), SABR())]
    assert shares[0] < 0.1 and min(shares[1:]) > 0.35, shares
