"""Adapters: generators of torch modules of the user, with closed forms."""

import math

import pytest
import torch
from torch import nn

from holdfast.core.errors import TargetError, UsageError
from holdfast.generators import GAN, VAE, Diffusers, ImageVAE
from holdfast.generators.networks import content_of, fit_vae, load, names_generator, opened_generator
from holdfast.io.models.generators import open_generator


class Conditional(nn.Module):
    """A generator whose samples are the latent vector and ten times the class."""

    def forward(self, z, y):
        return z + 10 * y[:, None]


def linear(weight):
    net = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    net.weight = nn.Parameter(weight)
    return net


def test_a_gan_without_discriminator_lacks_it():
    generator = linear(torch.tensor([[1.0, 2.0]]))
    opened = open_generator(GAN(generator, latent_shape=(2,)))
    assert opened.lacks("decode") == ""
    assert opened.lacks("discriminate") == "discriminate(x)"
    assert opened.lacks("classes") == "classes"
    assert opened.latent_shape == (2,)
    assert torch.equal(opened.generator.decode(torch.ones(1, 2)), torch.tensor([[3.0]]))
    assert torch.equal(opened.samples(5, 0), opened.samples(5, 0))
    assert opened.notes(0) == ()


class Headed(nn.Module):
    """A discriminator that returns scores (n, 1) and the logits of classes."""

    def forward(self, x):
        return x.sum(1, keepdim=True), x


def test_the_score_of_a_discriminator_with_a_class_head_is_the_first_output():
    gan = GAN(linear(torch.eye(2)), Headed(), latent_shape=(2,))
    assert torch.equal(gan.discriminate(torch.ones(3, 2)), torch.full((3,), 2.0))


def test_a_conditional_gan_takes_the_classes_of_the_samples():
    gan = GAN(Conditional(), latent_shape=(1,), classes=3)
    fixed = gan.sample(4, 0, torch.full((4,), 2))
    assert (fixed > 10).all()
    drawn = (gan.sample(200, 0) / 10).round().unique()
    assert drawn.tolist() == [0, 1, 2]
    assert torch.equal(gan.decode(torch.zeros(3, 1)), torch.tensor([[0.0], [10.0], [20.0]]))


class Posterior(nn.Module):
    """The exact posterior of a linear model x = W z + noise with one latent value."""

    def __init__(self, weight, std):
        super().__init__()
        self.weight, self.std = nn.Parameter(weight), std

    def forward(self, x):
        precision = 1 + self.weight.square().sum() / self.std**2
        mean = x @ self.weight / self.std**2 / precision
        return mean[:, None], (-precision.log()).expand(len(x), 1)


def test_the_bound_of_a_vae_with_the_exact_posterior_is_the_density():
    weight, std = torch.tensor([1.0, -0.5, 2.0]), 0.3
    vae = VAE(Posterior(weight, std), linear(weight[:, None]), latent_shape=(1,), std=std)
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    covariance = weight[:, None] * weight + std**2 * torch.eye(3)
    exact = torch.distributions.MultivariateNormal(torch.zeros(3), covariance).log_prob(x)
    assert torch.allclose(vae.log_prob(x), exact, atol=1e-3)


def test_an_autoencoder_has_no_density():
    plain = VAE(linear(torch.eye(2)), linear(torch.eye(2)), latent_shape=(2,))
    opened = open_generator(plain)
    assert opened.lacks("log_prob") == "log_prob(x)"
    assert torch.equal(plain.encode(torch.ones(1, 2)), torch.ones(1, 2))
    with pytest.raises(UsageError, match="no variances"):
        VAE(linear(torch.eye(2)), linear(torch.eye(2)), latent_shape=(2,), std=1.0).log_prob(torch.ones(1, 2))
    with pytest.raises(UsageError, match="std is 0"):
        VAE(linear(torch.eye(2)), linear(torch.eye(2)), latent_shape=(2,), std=0.0)


def test_a_vae_learns_to_reconstruct_and_the_spread_of_its_pixels():
    rows = torch.linspace(0.1, 0.9, 64)[:, None, None, None]
    x = rows.expand(64, 1, 8, 8) * torch.ones(8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ImageVAE(side=8, latent=2, width=8)
        better = fit_vae(model, x, updates=150)
    assert model.std == 1
    error = (better.decode(better.encode(x)) - x).square().mean().sqrt()
    assert error < 0.15
    assert math.isclose(better.std, error, rel_tol=1.0)
    assert better.log_prob(x).mean() > model.log_prob(x).mean()


def test_a_saved_generator_opens_from_its_file_and_folder(tmp_path):
    model = ImageVAE(side=8, latent=2, width=8)
    path = tmp_path / "generator.safetensors"
    path.write_bytes(content_of(model, "vae", {"side": 8, "latent": 2, "width": 8}))
    z = torch.zeros(1, 2)
    for address in (path, tmp_path):
        assert names_generator(str(address))
        opened = opened_generator(str(address))
        assert torch.equal(opened.generator.decode(z), model.eval().decode(z))
        assert opened.name == str(address)


def test_a_file_that_is_not_of_a_generator_is_refused(tmp_path):
    model, path = ImageVAE(side=8, latent=2, width=8), tmp_path / "g.safetensors"
    path.write_bytes(content_of(model, "flow", {}))
    with pytest.raises(TargetError, match="'flow'"):
        load(path)
    path.write_bytes(content_of(model, "vae", {"sides": 8}))
    with pytest.raises(TargetError, match="cannot be built"):
        load(path)
    path.write_bytes(content_of(model, "vae", {"side": 12}))
    with pytest.raises(TargetError, match="do not fit"):
        load(path)
    assert not names_generator("gen.py:make")
    with pytest.raises(UsageError, match="bundled are"):
        opened_generator(str(tmp_path / "absent.safetensors"))


def test_what_is_not_a_pipeline_is_refused():
    with pytest.raises(UsageError, match="without unet and scheduler"):
        Diffusers(nn.Identity())


def test_a_pipeline_of_diffusers_is_a_generator():
    diffusers = pytest.importorskip("diffusers", reason="needs the extra diffusers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = diffusers.UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1,
            norm_num_groups=4, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        )  # fmt: skip
    pipeline = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(num_train_timesteps=100))
    opened = open_generator(Diffusers(pipeline, steps=3))
    assert opened.notes(0) == ()
    assert opened.samples(2, 0).shape == (2, 1, 8, 8)
    assert opened.latent_shape == (1, 8, 8)
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    opened.call("denoised", noise).sum().backward()
    assert noise.grad is not None
    loss = opened.call("denoising_loss", torch.rand(2, 1, 8, 8), 0.5, noise.detach())
    assert loss.shape == (2,)
