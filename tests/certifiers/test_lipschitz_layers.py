"""Layers that stretch nothing: their explicit matrices, their gradients, their guards, and the certificate."""

import math

import pytest
import torch
from torch import nn

from holdfast.attacks import DDN, FMN
from holdfast.core.batch import Batch
from holdfast.core.constraints import L2
from holdfast.core.draws import Draws
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.io.models.architectures import (
    ARCHITECTURES,
    AOLConv2d,
    AOLLinear,
    CayleyConv2d,
    CayleyLinear,
    MaxMin,
    SLLConv2d,
    Widened,
    certified_radius,
    input_constant,
    orthogonal,
)
from holdfast.io.models.models import open_model
from holdfast.io.models.weights import written
from holdfast.recipes import MarginTraining
from holdfast.recipes.training.fit import Training

NETWORKS = sorted(name for name in ARCHITECTURES if name.startswith("lipschitz"))
LINEAR = [
    (lambda: AOLLinear(7, 5), (7,)),
    (lambda: AOLLinear(5, 7), (5,)),
    (lambda: AOLConv2d(2, 3), (2, 5, 6)),
    (lambda: AOLConv2d(3, 2), (3, 4, 4)),
    (lambda: AOLConv2d(4, 4, 5), (4, 3, 3)),
    (lambda: CayleyLinear(7, 5), (7,)),
    (lambda: CayleyLinear(5, 7), (5,)),
    (lambda: CayleyConv2d(2, 4), (2, 5, 6)),
    (lambda: CayleyConv2d(4, 2), (4, 4, 5)),
    (lambda: CayleyConv2d(2, 2), (2, 2, 2)),
]
EVERY = [*LINEAR, (lambda: SLLConv2d(2, 5), (2, 5, 6)), (MaxMin, (5, 3, 3)), (lambda: Widened(6), (4, 2, 2))]
SIZES = (1e-3, 1.0, 100.0)


def drawn(made, size, seed=0):
    """A layer in float32 with random weights of that size."""
    torch.manual_seed(seed)
    layer = made()
    with torch.no_grad():
        for weight in layer.parameters():
            weight.copy_(size * torch.randn_like(weight))
    return layer


def norm_of(layer, x):
    """The largest singular value of the layer's Jacobian at an input."""
    jacobian = torch.autograd.functional.jacobian(lambda x: layer(x[None])[0], x)
    out = jacobian.shape[: jacobian.dim() - x.dim()].numel()
    return torch.linalg.matrix_norm(jacobian.reshape(out, -1).double(), 2).item()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("made, shape", EVERY)
def test_no_layer_stretches_whatever_its_weights(made, shape, size):
    for seed in range(3):
        layer = drawn(made, size, seed)
        assert norm_of(layer, torch.randn(shape)) <= 1 + 1e-5


@pytest.mark.parametrize("made, shape", EVERY)
def test_no_distance_between_inputs_grows(made, shape):
    layer, x, other = drawn(made, 1.0), torch.randn(200, *shape), torch.randn(200, *shape)
    x[100:] = other[100:] + 1e-2 * torch.randn(100, *shape)
    with torch.no_grad():
        apart = (layer(x) - layer(other)).flatten(1).norm(dim=1)
    assert (apart <= (x - other).flatten(1).norm(dim=1) * (1 + 1e-4)).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_cayley_matrices_are_orthogonal(shape, size):
    torch.manual_seed(0)
    for made in (torch.randn, lambda *shape: torch.randn(*shape, dtype=torch.complex64)):
        found = orthogonal(size * made(*shape))
        few = found.mH @ found if shape[0] >= shape[1] else found @ found.mH
        torch.testing.assert_close(few, torch.eye(min(shape), dtype=few.dtype), rtol=0, atol=3e-6)


def test_an_orthogonal_convolution_keeps_lengths():
    layer, x = drawn(lambda: CayleyConv2d(3, 3), 1.0), torch.randn(4, 3, 6, 7)
    moved = layer(x) - layer(torch.zeros_like(x))
    torch.testing.assert_close(moved.flatten(1).norm(dim=1), x.flatten(1).norm(dim=1))


@pytest.mark.parametrize("made, shape", [case for case in EVERY if case[0] is not MaxMin][:-1])
@pytest.mark.parametrize("size", [0.0, 1e-20, 1.0, 1e4])
def test_values_and_gradients_are_finite_for_any_weights(made, shape, size):
    layer, x = drawn(made, size), torch.randn(3, *shape).requires_grad_()
    layer(x).square().sum().backward()
    assert all(weight.grad.isfinite().all() for weight in (x, *layer.parameters()))
    if size == 1.0:
        assert all(weight.grad.abs().sum() > 0 for weight in (x, *layer.parameters()))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_stretches_nothing_and_is_opened_by_its_path(name, tmp_path):
    torch.manual_seed(0)
    said = {"side": 8, "width": 8, "hidden": 12, "classes": 4}
    net, x, path = ARCHITECTURES[name](**said), torch.rand(2, 1, 8, 8), tmp_path / "net.safetensors"
    assert norm_of(net, x[0]) <= 1 + 1e-5
    path.write_bytes(written(net, {"architecture": name, "arguments": said}))
    assert torch.equal(open_model(str(path)).model(x), net(x))
    with pytest.raises(ValueError, match="a side of 7 cannot be halved"):
        ARCHITECTURES[name](side=14)


def test_the_radius_of_a_linear_model_is_its_distance():
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # two logits: the boundary is x = y
    x = torch.tensor([[3.0, 1.0], [0.5, 0.5], [0.0, 0.25]])
    found = certified_radius(x @ weight.T)
    exact = (x[:, 0] - x[:, 1]).abs() / math.sqrt(2)
    assert (found <= exact).all()
    torch.testing.assert_close(found, exact, rtol=3e-4, atol=0)
    assert found[1] == 0
    torch.testing.assert_close(certified_radius(x, constant=2.0), found / 2)


def test_preprocessing_stretches_by_its_smallest_std():
    assert input_constant(Classifier(nn.Flatten())) == 1.0
    assert input_constant(Classifier(nn.Flatten(), mean=[0.0, 0.0], std=[0.5, 0.25])) == pytest.approx(4.0)


def stripes(n=60):
    """Two kinds of images, left or right half bright, with noise."""
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 2
    x = 0.5 * torch.rand(n, 1, 8, 8, generator=draw)
    x[y == 0, :, :, :4] += 0.3
    x[y == 1, :, :, 4:] += 0.3
    return Batch(x, y, torch.arange(n))


@pytest.mark.parametrize("name, std", [*((name, None) for name in NETWORKS), ("lipschitz-aol", [0.5])])
def test_no_attack_succeeds_within_the_certified_radius(name, std):
    torch.manual_seed(0)
    net = ARCHITECTURES[name](side=8, width=8, depth=1, hidden=12, classes=2)
    model, data, threat = Classifier(net, std=std).eval(), stripes(), ThreatModel(L2(0.2))
    recipe = MarginTraining(training=Training(epochs=8, batch=10, lr=0.05, weight_decay=0.0, average=0.5))
    *_, last = recipe(model, data, threat, rng=Draws(0))
    last.put_into(model)
    with torch.no_grad():
        logits = model(data.x)
    radius = certified_radius(logits, constant=input_constant(model))
    right = logits.argmax(1) == data.y
    assert right.double().mean() > 0.9
    assert radius[right].median() > 0.1
    seen = data.take(right.nonzero()[:16, 0])
    for attack in (DDN(steps=30), FMN(steps=30)):
        x_adv = attack(model, seen, ThreatModel(L2()), rng=Draws(0))
        with torch.no_grad():
            broken = model(x_adv).argmax(1) != seen.y
        assert broken.any()
        assert (L2().distance(x_adv, seen.x)[broken] >= radius[seen.ids][broken]).all()


@pytest.mark.parametrize("side", [1, 2, 3, 5, 8])
def test_a_cayley_convolution_without_weights_is_the_identity_at_every_size(side):
    layer = CayleyConv2d(3, 3)
    with torch.no_grad():
        layer.weight.zero_()
    x = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x), x)


def test_a_cayley_convolution_sees_what_is_around_each_pixel():
    layer = CayleyConv2d(1, 1)
    with torch.no_grad():
        layer.weight.normal_(0, 0.05, generator=torch.Generator().manual_seed(0))
    x = torch.zeros(1, 1, 64, 64, dtype=torch.float64)
    x[0, 0, 32, 32] = 1
    out = layer.double()(x)[0, 0].detach().square()
    rows = torch.arange(64, dtype=torch.float64)
    assert abs(float((out.sum(1) * rows).sum() / out.sum()) - 32) < 0.5
    assert abs(float((out.sum(0) * rows).sum() / out.sum()) - 32) < 1
