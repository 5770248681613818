"""Attributions beside closed forms and Captum."""

import pytest
import torch
from torch import nn

from holdfast.core.model import Bounds, Classifier
from holdfast.explanation.attributions import (
    default_window,
    gradient,
    integrated_gradients,
    occlusion,
    rank_correlation,
    smooth_gradient,
    top_overlap,
)


def linear(w, bias=0.0):
    layer = nn.Linear(w.shape[1], len(w)).double()
    with torch.no_grad():
        layer.weight.copy_(w)
        layer.bias.fill_(bias)
    return Classifier(layer, bounds=Bounds(-10.0, 10.0)).eval()


@pytest.fixture
def small():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    return Classifier(net).eval().requires_grad_(False)


def images(n=3):
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def test_attributions_of_a_linear_model_are_known():
    random = torch.Generator().manual_seed(0)
    w, x, start = (torch.randn(2, 6, generator=random, dtype=torch.float64) for _ in range(3))
    model, classes = linear(w, 0.3), torch.tensor([1, 0])
    assert torch.allclose(gradient(model, x, classes), w[classes])
    assert torch.allclose(smooth_gradient(model, x, classes, torch.randn(3, 2, 6).double()), w[classes])
    result = integrated_gradients(model, x, start, classes)
    assert torch.allclose(result.values, w[classes] * (x - start))
    assert float(result.gap.max()) < 1e-9
    assert torch.allclose(occlusion(model, x, start, classes, (1,), (1,)), w[classes] * (x - start))


def test_attributions_equal_those_of_captum(small):
    attr = pytest.importorskip("captum.attr")
    x = images()
    classes, zero = small(x).argmax(1), torch.zeros_like(x)
    ours = integrated_gradients(small, x, zero, classes, nodes=20).values
    theirs = attr.IntegratedGradients(small).attribute(x, zero, classes, n_steps=20, method="gausslegendre")
    assert torch.allclose(ours, theirs.float(), atol=1e-6)
    for window, stride in (((1, 3, 3), (1, 2, 2)), ((1, 4, 4), (1, 3, 3))):
        theirs = attr.Occlusion(small).attribute(x, window, stride, zero, classes)
        assert torch.allclose(occlusion(small, x, zero, classes, window, stride), theirs, atol=1e-6)
    theirs = attr.Saliency(small).attribute(x.clone().requires_grad_(), classes, abs=False)
    assert torch.allclose(gradient(small, x, classes), theirs, atol=1e-6)


def test_the_completeness_gap_of_a_network_with_relus_is_small(small):
    x = images(5)
    result = integrated_gradients(small, x, torch.zeros_like(x), small(x).argmax(1))
    assert float(result.gap.max()) < 0.01


def test_similarity_of_attributions():
    a = torch.arange(40.0).view(1, 5, 8)
    assert rank_correlation(a, a) == pytest.approx(1)
    assert rank_correlation(a, -a) == pytest.approx(-1)
    assert rank_correlation(a, torch.zeros_like(a)) == 0
    assert top_overlap(a, a) == 1
    assert top_overlap(a, a.flip(2).flip(1)) == 0
    assert default_window((1, 28, 28)) == ((1, 4, 4), (1, 2, 2))
    assert default_window((7,)) == ((1,), (1,))
