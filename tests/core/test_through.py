"""Ways round a stage: the outputs are its own, the gradient is the stand-in's, and only where somebody asks for it."""

import pytest
import torch
from torch import nn

import holdfast
from holdfast.core.errors import UsageError
from holdfast.core.gradients import Replacement, Through, View, instead
from holdfast.core.model import Classifier

X = torch.tensor([[0.2, 0.7], [0.4, 0.9]])


def slope(model, x):
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(model(leaf).sum(), leaf, materialize_grads=True)
    return grad


def view_of(net, **settings):
    ways = [Replacement(name, m, m.backward) for name, m in net.named_modules() if isinstance(m, Through)]
    return View(Classifier(net), ways, **settings)


def test_a_stage_is_unchanged_until_it_is_replaced():
    net = nn.Sequential(holdfast.through(torch.round), nn.Linear(2, 2))
    view = view_of(net)
    torch.testing.assert_close(view(X), net(X), rtol=0, atol=0)
    assert slope(net, X).abs().sum() == 0
    torch.testing.assert_close(slope(view, X), net[1].weight.sum(0).expand(2, 2))
    assert slope(net, X).abs().sum() == 0


def test_a_stand_in_gives_the_gradient_and_nothing_else():
    switches = holdfast.through(lambda x: (x > 0.5).to(x.dtype).repeat(1, 2), lambda x: (3 * x).repeat(1, 2))
    view = view_of(nn.Sequential(switches, nn.Identity()))
    assert view(X).tolist() == [[0, 1, 0, 1], [0, 1, 0, 1]]
    assert slope(view, X).tolist() == [[6, 6], [6, 6]]


def test_replaced_layers_are_exact():
    value, other = torch.tensor([0.1, 1e-9, 3e7]), torch.tensor([1e8, 1.0, 0.1], requires_grad=True)
    assert (instead(value, other) == value).all()


def test_roundings_pass_their_gradient_on_wherever_they_stand():
    class Rounding(nn.Module):
        def forward(self, x):
            return torch.stack(((4 * x).round() / 4, x.floor(), x.ceil())).sum(0)

    view = View(Classifier(Rounding()), steps=True)
    torch.testing.assert_close(view(X), Rounding()(X), rtol=0, atol=0)
    assert slope(view, X).tolist() == [[3, 3], [3, 3]]
    assert slope(Rounding(), X).abs().sum() == 0


def test_a_stand_in_of_another_shape_is_refused():
    view = view_of(nn.Sequential(holdfast.through(lambda x: (x > 0.5).to(x.dtype).repeat(1, 2))))
    with pytest.raises(
        UsageError, match=r"replacement of 0 returns shape \(2, 2\), but the stage returns \(2, 4\)"
    ):
        view(X)


@pytest.mark.parametrize("given", [(3,), (torch.round, 3)])
def test_what_is_no_stage_is_refused(given):
    with pytest.raises(UsageError, match="expected a network or a function"):
        holdfast.through(*given)
