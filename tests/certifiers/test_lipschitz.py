"""Bounds of gains are at least the exact norms, and certificates from them hold against attacks."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from holdfast.attacks import DDN
from holdfast.certifiers.bounds import lipschitz
from holdfast.certifiers.bounds.lipschitz import (
    Lipschitz,
    PreparedLipschitz,
    convolution_bound,
    lipschitz_bounds,
    overlap_bound,
    spectral_bound,
)
from holdfast.certifiers.bounds.tracing import traced
from holdfast.core.batch import Batch
from holdfast.core.constraints import L2, Linf
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.io.models.architectures import (
    ARCHITECTURES,
    MaxMin,
    SLLConv2d,
    certified_radius,
    input_constant,
)
from holdfast.testing.fakes import examples, labelled


def norm(matrix):
    return float(torch.linalg.matrix_norm(matrix.double(), 2))


@pytest.mark.parametrize("shape", [(3, 40), (40, 3), (60, 60), (1, 1)])
@pytest.mark.parametrize("size", [1e-8, 1.0, 1e6])
def test_the_bound_of_a_matrix_is_just_above_its_largest_singular_value(shape, size):
    torch.manual_seed(0)
    for matrix in (size * torch.randn(shape), size * torch.ones(shape), torch.zeros(shape)):
        exact = norm(matrix)
        assert exact <= spectral_bound(matrix) <= exact * (1 + 1e-5)


def test_the_bound_of_a_matrix_does_not_rely_on_what_is_proposed(monkeypatch):
    torch.manual_seed(0)
    matrices = torch.randn(5, 20, 30)
    exact = max(norm(matrix) for matrix in matrices)
    for share in (0.0, 0.5, 1 - 1e-3, 1 - 1e-9):
        monkeypatch.setattr(lipschitz, "_proposed", lambda gram, share=share: (share * exact) ** 2)
        assert spectral_bound(matrices) >= exact


CONVOLUTIONS = [  # out, in / groups, kernel, stride, dilation, groups, padding
    (5, 4, (3, 3), (1, 1), (1, 1), 1, 1),
    (4, 6, (3, 3), (2, 2), (1, 1), 1, 1),
    (6, 2, (4, 2), (2, 1), (1, 2), 2, 2),
    (6, 2, (5, 3), (3, 2), (2, 1), 2, 3),
    (6, 1, (3, 3), (1, 1), (2, 2), 6, 2),
    (4, 3, (1, 1), (1, 1), (1, 1), 1, 0),
    (4, 3, (5,), (2,), (1,), 1, 2),
    (3, 2, (2, 2, 3), (1, 2, 1), (1, 1, 1), 1, 1),
]


@pytest.mark.parametrize("out, inner, size, stride, dilation, groups, padding", CONVOLUTIONS)
def test_the_bound_of_a_convolution_is_at_least_its_norm(out, inner, size, stride, dilation, groups, padding):
    torch.manual_seed(0)
    dims, side = len(size), 7 if len(size) == 3 else 13
    for weight in (torch.randn(out, inner, *size), torch.rand(out, inner, *size)):
        channels = inner * groups
        side = min(side, 13 if dims < 3 else 5)
        unit = torch.eye(channels * side**dims, dtype=torch.float64).view(-1, channels, *[side] * dims)
        convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims]
        exact = norm(convolve(unit, weight.double(), None, stride, padding, dilation, groups).flatten(1))
        bound = convolution_bound(weight, stride, dilation, groups)
        assert exact <= bound <= 1.2 * exact


def test_the_bound_of_overlaps_is_exact_for_positive_filters_of_one_channel():
    kernel = torch.rand(1, 1, 3, 3, dtype=torch.float64)
    assert float(kernel.sum()) <= overlap_bound(kernel) <= float(kernel.sum()) * (1 + 1e-9)


class Wild(nn.Module):
    """A network with every operation whose gain is known."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.norm, self.last = nn.BatchNorm2d(6), nn.Linear(54, 5)

    def forward(self, x):
        x = F.leaky_relu(self.first(x), 0.2)
        x = (
            torch.tanh(self.norm(self.second(x)))
            - 0.5 * F.gelu(x)
            + 2 * torch.sigmoid(x.mean(1, keepdim=True))
        )
        x = F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 2)
        x = torch.cat((F.avg_pool2d(x, 1), F.silu(x)), 1)[:, 3:9]
        return self.last(F.softplus(x).flatten(1))


def test_bounds_of_networks_are_at_least_the_norms_of_their_jacobians():
    for seed in range(3):
        torch.manual_seed(seed)
        net = Wild().double().eval()
        with torch.no_grad():
            net.norm.running_var.uniform_(0.1, 2)
            net.norm.weight.uniform_(-2, 2)
        x = torch.randn(4, 2, 6, 6, dtype=torch.float64)
        bounds = lipschitz_bounds(traced(net, x))
        for point in x:
            jacobian = torch.autograd.functional.jacobian(net, point[None]).reshape(5, -1)
            assert norm(jacobian) <= bounds.logits
            pairs = torch.cdist(jacobian, jacobian)
            assert (pairs <= bounds.margins + 1e-12).all()


def test_an_overlapping_pool_counts_every_window():
    net = nn.Sequential(nn.MaxPool2d(3, 1), nn.Flatten())
    bounds = lipschitz_bounds(traced(net, torch.rand(2, 1, 5, 5)))
    assert bounds.logits == pytest.approx(3.0)
    x = torch.zeros(1, 1, 5, 5)
    x[0, 0, 2, 2] = 1.0  # every window contains the middle
    assert float(net(x).norm()) == 3.0


NETWORKS = sorted(name for name in ARCHITECTURES if name.startswith("lipschitz"))


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_lipschitz_layers_have_the_gain_that_they_are_made_for(name):
    torch.manual_seed(0)
    model = Classifier(ARCHITECTURES[name](side=8, width=8, hidden=12, classes=4), std=[0.5]).eval()
    batch = labelled(model, examples(n=9, shape=(1, 8, 8), dtype=torch.float32))
    prover = PreparedLipschitz.of(model, batch, ThreatModel(L2(0.01)))
    assert prover.bounds.logits == pytest.approx(2.0, rel=1e-4)
    with torch.no_grad():
        expected = certified_radius(model(batch.x), constant=input_constant(model))
    radii = prover.radii(batch)
    torch.testing.assert_close(radii, expected.double(), rtol=5e-2, atol=1e-5)
    proofs = Lipschitz().ready(model, batch, ThreatModel(L2(float(radii.median()))))(batch)
    assert (proofs.certified == (radii > float(radii.median()) + 1e-6)).all()
    x_adv = DDN(steps=40)(model, batch, ThreatModel(L2()), rng=Draws(0))
    with torch.no_grad():
        broken = model(x_adv).argmax(1) != batch.y
    assert broken.any()
    assert (L2().distance(x_adv, batch.x)[broken] >= radii[broken]).all()


def test_divisors_that_are_too_small_raise_the_gain_of_a_residual_layer(monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(SLLConv2d(2, 4), MaxMin(), nn.Flatten())
    x = torch.rand(2, 2, 4, 4)
    assert lipschitz_bounds_of(net, x).logits == pytest.approx(1.0)
    heights = SLLConv2d.heights
    monkeypatch.setattr(SLLConv2d, "heights", lambda layer: heights(layer) / 2)
    assert lipschitz_bounds_of(net, x).logits == pytest.approx(3.0, rel=1e-3)


def lipschitz_bounds_of(net, x):
    model, rows = Classifier(net).eval(), torch.zeros(len(x), dtype=torch.int64)
    return PreparedLipschitz.of(model, Batch(x, rows, rows), ThreatModel(L2(0.1))).bounds


def test_the_radius_of_a_linear_model_is_its_exact_distance():
    net = nn.Sequential(nn.Flatten(), nn.Linear(3, 3))
    model = Classifier(net).double().eval()
    batch = labelled(model, examples(shape=(3,)))
    weight = net[1].weight.detach()
    gaps = model(batch.x).detach()
    gaps = gaps.gather(1, batch.y[:, None]) - gaps
    lengths = (weight[batch.y][:, None] - weight[None]).norm(dim=2)
    exact = torch.where(lengths > 0, gaps / lengths, math.inf).amin(1)
    radii = PreparedLipschitz.of(model, batch, ThreatModel(L2(0.1))).radii(batch)
    assert (radii <= exact).all()
    torch.testing.assert_close(radii, exact, rtol=1e-9, atol=1e-11)


def test_other_threats_and_operations_are_refused():
    model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(4, 2))).eval()
    batch = labelled(model, examples(shape=(4,), dtype=torch.float32))
    with pytest.raises(UsageError, match="is for threats in Euclidean distance; the threat model is linf"):
        Lipschitz().ready(model, batch, ThreatModel(Linf(0.1)))
