"""The purifier of the gallery: its output, and the gradients of its two versions."""

import pytest
import torch

from holdfast.core.gradients import Through
from holdfast.doubts.gallery import SLOW
from holdfast.doubts.gallery.purifiers import Purifier, network_of
from holdfast.generators import Diffusion
from holdfast.io.data.data import open_data


@pytest.fixture(scope="module")
def images():
    return open_data("mnist-mini", n=40).read(0, 40)


@pytest.fixture(scope="module")
def model(images):
    (item,) = SLOW
    return item.build(images, torch.nn.Identity())


def gradient(net, x):
    x = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(net(x)[:, 0].sum(), x)
    return found


def test_purified_digits_are_recognised(model, images):
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        first, second = model(images.x), model(images.x)
    assert (first.argmax(1) == images.y).float().mean() > 0.8
    assert not torch.equal(first, second)


def test_only_adaptive_attacks_see_the_gradient_of_the_purifier(model, images):
    assert isinstance(model, Through)
    network, x = network_of(model), images.x[:2]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        naive, whole = gradient(model, x), gradient(model.backward, x)
    assert torch.allclose(naive, gradient(network, x))
    assert torch.isfinite(whole).all()
    assert whole.abs().sum() > 0
    assert not torch.allclose(naive, whole)


def test_no_noise_and_no_steps_change_nothing_but_rounding():
    diffusion = Diffusion(side=8, classes=2, width=8)
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        assert torch.allclose(Purifier(diffusion, t=0.0, steps=1)(x), x, atol=1e-6)
