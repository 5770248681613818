"""The diffusion model: exact results for data whose velocity is known, and its training."""

import pytest
import torch
from torch import nn

from holdfast.core.errors import UsageError
from holdfast.generators import Diffusion
from holdfast.generators.networks import fit_diffusion, noised, signal_and_noise, velocity_loss


class PointMass(nn.Module):
    """The exact velocity if all images are equal."""

    def __init__(self, image):
        super().__init__()
        self.image = nn.Parameter(2 * image - 1)
        self.last = nn.Identity()
        self.last.weight = self.image

    def forward(self, x, t, y):
        signal, sigma = signal_and_noise(t)
        return (signal * x - self.image) / sigma


@pytest.fixture
def image():
    return torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def exact(image):
    model = Diffusion(side=8, classes=2, width=8, steps=5)
    model.net = PointMass(image)
    return model


def test_the_factors_of_signal_and_noise_preserve_the_variance():
    signal, sigma = signal_and_noise(torch.linspace(0, 1, 11))
    assert torch.allclose(signal.square() + sigma.square(), torch.ones_like(signal))
    assert (signal[0], sigma[0]) == (1, 0)
    assert sigma[-1] > 0.999


def test_the_sampler_with_the_exact_velocity_returns_the_image(exact, image):
    assert torch.allclose(exact.sample(3, 0), image.expand(3, 1, 8, 8), atol=1e-5)
    noise = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(exact.denoised(noise), image.expand(3, 1, 8, 8), atol=1e-5)


def test_the_loss_is_zero_where_the_noise_is_known(exact, image):
    noise = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    assert exact.denoising_loss(image.expand(3, 1, 8, 8), 0.2, noise).max() < 1e-8
    other = exact.denoising_loss(1 - image.expand(3, 1, 8, 8), 0.2, noise)
    assert other.shape == (3,)
    assert other.min() > 0.01


def test_samples_are_determined_by_seed_and_class():
    model = trained()
    assert torch.equal(model.sample(4, 0), model.sample(4, 0))
    assert not torch.equal(model.sample(4, 0), model.sample(4, 1))
    classes = [torch.full((4,), y) for y in range(2)]
    assert not torch.equal(model.sample(4, 0, classes[0]), model.sample(4, 0, classes[1]))
    assert model.sample(4, 0).min() >= 0


def trained(updates=3):
    torch.manual_seed(0)
    x = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    model = Diffusion(side=8, classes=2, width=8, steps=2)
    return fit_diffusion(model, x, torch.arange(16) % 2, updates=updates, batch=8)


def test_the_training_repeats_and_leaves_the_model_as_it_was():
    with torch.random.fork_rng():
        first, second = trained(), trained()
        before = Diffusion(side=8, classes=2, width=8)
        state = {name: value.clone() for name, value in before.state_dict().items()}
        fit_diffusion(before, torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.long), updates=2, batch=2)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
    assert all(torch.equal(value, before.state_dict()[name]) for name, value in state.items())


def test_the_training_lowers_the_loss():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = (torch.arange(64).reshape(1, 1, 8, 8) % 8 / 7).expand(32, 1, 8, 8)
        y, model = torch.zeros(32, dtype=torch.long), Diffusion(side=8, classes=1, width=8)
        better = fit_diffusion(model, x, y, updates=60, batch=16, lr=1e-2)
    losses = [velocity_loss(net, x, y, torch.Generator().manual_seed(3)).item() for net in (model, better)]
    assert losses[1] < 0.8 * losses[0]


def test_the_gradient_reaches_the_noise_through_all_steps():
    model = trained()
    noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    model.denoise(noise, 1.0, 2).sum().backward()
    assert noise.grad is not None
    assert noise.grad.abs().sum() > 0


def test_a_side_that_cannot_be_halved_twice_is_refused():
    with pytest.raises(UsageError, match="side is 30"):
        Diffusion(side=30)


def test_noisy_images_of_time_zero_are_the_images(image):
    assert torch.equal(noised(image[None], torch.zeros(1), torch.ones(1, 1, 8, 8)), 2 * image[None] - 1)
