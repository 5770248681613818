"""Gains of layers against their explicit matrices, and layers that are held to a bound."""

import pytest
import torch
from torch import nn

from holdfast.core.constraints import L0, L1, L2, Linf
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Classifier
from holdfast.recipes.lipschitz import Confined, gain, gain_directions, layers, order_of, trained_layers
from matrices import gains

LAYERS = [
    (lambda: nn.Linear(5, 7), (5,)),
    (lambda: nn.Conv1d(2, 3, 4, padding=1), (2, 6)),
    (lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 5, 6)),
    (lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False), (2, 6, 6)),
    (lambda: nn.Conv2d(4, 4, 3, groups=2, dilation=2), (4, 6, 7)),
    (lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), (2, 5, 5)),
    (lambda: nn.Conv2d(1, 2, 5, padding=2), (1, 3, 3)),  # no window lies inside the input
]


@pytest.mark.parametrize("made, shape", LAYERS)
def test_gains_are_the_norms_of_the_matrix(made, shape):
    torch.manual_seed(0)
    layer, x = made().double(), torch.zeros(1, *shape, dtype=torch.float64)
    for constraint in (Linf(1.0), L1(1.0)):
        found = gain(layer, x.shape, order_of(constraint), x).max().item()
        assert found == pytest.approx(gains(layer, x, constraint)[""], rel=1e-12)
    exact = gains(layer, x, L2(1.0))[""]
    (towards,) = gain_directions(layer, x, "l2", Draws(0)).values()
    told = [gain(layer, x.shape, "l2", towards).item() for _ in range(100)]
    assert told == pytest.approx(sorted(told), rel=1e-9)
    assert exact * 0.99 <= told[-1] <= exact * (1 + 1e-9)


def test_a_batch_norm_stretches_by_its_largest_scale():
    norm = nn.BatchNorm1d(3).double().eval()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, -3.0, 1.0]))
        norm.running_var.copy_(torch.tensor([1.0, 4.0, 0.01]))
    x = torch.zeros(1, 3).double()
    assert gain(norm, x.shape, "linf", x).max().item() == pytest.approx(gains(norm, x, Linf(1.0))[""])
    assert gains(norm, x, Linf(1.0))[""] == pytest.approx(10.0, rel=1e-3)
    assert not layers(nn.BatchNorm1d(3, affine=False).eval(), torch.zeros(1, 3))


def net():
    torch.manual_seed(0)
    inner = nn.Sequential(
        nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5)
    )
    return Classifier(inner.double()).eval()


@pytest.mark.parametrize("constraint", [Linf(0.1), L2(0.1), L1(0.1)], ids=repr)
def test_layers_are_held_to_the_bound(constraint):
    model, x, order = net(), torch.rand(2, 1, 6, 6).double(), order_of(constraint)
    state = gain_directions(model, x, order, Draws(0))
    confine = Confined(layers(model, x), order, 0.5, state)
    for _ in range(60):  # under L2 the power iteration goes on from call to call
        confine()
    found = gains(model, x, constraint)
    assert set(found) == {"net.0", "net.1", "net.4"}
    assert all(value <= 0.5 * (1 + 1e-3) for value in found.values())
    if order == "linf":
        assert found["net.0"] == pytest.approx(0.5, rel=1e-9)


def test_values_within_the_bound_are_unchanged_to_the_last_bit():
    model, x = net(), torch.rand(2, 1, 6, 6).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for order in ("linf", "l1", "l2"):
        Confined(layers(model, x), order, 100.0, gain_directions(model, x, order, Draws(0)))()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_under_linf_only_outputs_beyond_the_bound_shrink():
    layer = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, -1.0], [0.5, 0.25]]))
    Confined(layers(layer, torch.zeros(1, 2).double()), "linf", 2.0, {})()
    assert layer.weight.tolist() == [[1.5, -0.5], [0.5, 0.25]]


@pytest.mark.parametrize(
    "parametrised",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.parametrizations.orthogonal,
        nn.utils.spectral_norm,  # whose layer has a hook in place of a parametrisation
    ],
)
def test_a_weight_that_is_computed_anew_at_each_pass_is_named_and_not_held_to_a_bound(parametrised):
    net, x = nn.Sequential(nn.Linear(3, 3), parametrised(nn.Linear(3, 3))), torch.zeros(1, 3)
    with pytest.raises(UsageError, match=r"the weight of 1 is computed from .*remove_parametrizations"):
        trained_layers(net, x)
    assert set(trained_layers(net.requires_grad_(False), x)) == set()
    net[0].requires_grad_(True)
    assert set(trained_layers(net, x)) == {"0"}


def test_a_norm_without_gains_is_named():
    with pytest.raises(UsageError, match=r"linf, l2 and l1.*l0:3"):
        order_of(L0(3.0))
