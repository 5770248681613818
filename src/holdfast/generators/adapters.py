"""Generators of torch modules of the user: a GAN, a VAE or another autoencoder, and a pipeline of diffusers.

Each of them has the methods of `holdfast.io.models.generators.Abilities` for which it has the modules; the other
methods are None.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.core.errors import UsageError
from holdfast.core.types import Inputs, Labels, PerExample

_DRAWS = 16  # latent vectors with which the bound of an example is estimated


def drawn_latents(n: int, shape: tuple[int, ...], seed: int, like: Tensor) -> Tensor:
    """Return standard normal latent vectors (n, *shape) of a seed, with the type and on the device of `like`."""
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed)).to(like)


def classes_of(n: int, classes: int, seed: int) -> Labels:
    """Return random classes (n) of a seed."""
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))


class GAN(nn.Module):
    """A GAN of a generator and a discriminator that are torch modules."""

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module | None = None,
        *,
        latent_shape: tuple[int, ...],
        classes: int | None = None,
    ) -> None:
        """Take a module from latent vectors to samples, which also takes classes (n) if `classes` has their number,
        and a module from examples to scores (n) or (n, 1); of a tuple that it returns, the first is the score.
        """
        super().__init__()
        self.generator, self.discriminator = generator.eval(), discriminator
        self.latent_shape, self.classes = tuple(latent_shape), classes
        if discriminator is not None:
            discriminator.eval()

    def sample(self, n: int, seed: int, condition: Labels | None = None) -> Inputs:
        """Return `n` samples, of random classes unless `condition` (n) has theirs."""
        z = drawn_latents(n, self.latent_shape, seed, _parameter(self))
        if condition is None and self.classes is not None:
            condition = classes_of(n, self.classes, seed)
        with torch.no_grad():
            return self.decode(z, condition)

    def decode(self, z: Tensor, condition: Labels | None = None) -> Inputs:
        """Return samples for latent vectors. A conditional generator without `condition` takes the classes in turn."""
        if self.classes is None:
            samples: Inputs = self.generator(z)
            return samples
        if condition is None:
            condition = torch.arange(len(z)) % self.classes
        conditional: Inputs = self.generator(z, condition.to(z.device))
        return conditional

    @property
    def discriminate(self) -> Callable[[Inputs], PerExample] | None:
        """Function that returns the scores (n) of examples; None without a discriminator."""
        return None if self.discriminator is None else self._scores

    def _scores(self, x: Inputs) -> PerExample:
        assert self.discriminator is not None
        found = self.discriminator(x)
        scores: Tensor = found[0] if isinstance(found, tuple) else found
        return scores.reshape(len(x))


class VAE(nn.Module):
    """A VAE, or another autoencoder, of an encoder and a decoder that are torch modules."""

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        *,
        latent_shape: tuple[int, ...],
        std: float | None = None,
    ) -> None:
        """Take a module from examples to latent vectors (n, *latent_shape), or to the pair of their means and the
        logarithms of their variances, and a module from latent vectors to samples.

        `std` is the standard deviation of the normal distribution of an example around its reconstruction; without it,
        or without variances, there is no `log_prob`.
        """
        super().__init__()
        if std is not None and not std > 0:
            raise UsageError(f"std is {std}; a positive standard deviation was expected")
        self.encoder, self.decoder = encoder.eval(), decoder.eval()
        self.latent_shape = tuple(latent_shape)
        self.std: Tensor | None
        self.register_buffer("std", None if std is None else torch.tensor(std))

    def sample(self, n: int, seed: int) -> Inputs:
        """Return `n` samples (n, *shape): the decoded outputs of standard normal latent vectors, which are the same for
        the same `seed`.
        """
        with torch.no_grad():
            return self.decode(drawn_latents(n, self.latent_shape, seed, _parameter(self)))

    def decode(self, z: Tensor) -> Inputs:
        """Return samples for latent vectors."""
        samples: Inputs = self.decoder(z)
        return samples

    def encode(self, x: Inputs) -> Tensor:
        """Return latent vectors for examples: the means, if the encoder returns variances too."""
        found = self.encoder(x)
        latent: Tensor = found[0] if isinstance(found, tuple) else found
        return latent

    @property
    def log_prob(self) -> Callable[[Inputs], PerExample] | None:
        """Function that returns a lower bound (n) on the logarithm of the density of examples; None without `std`.

        The bound is that of Burda et al., "Importance Weighted Autoencoders", ICLR 2016, arXiv:1509.00519, for the
        expectation over the latent vectors, of which 16 are drawn with a fixed seed, the same for all examples.
        """
        return None if self.std is None else self._bound

    def _bound(self, x: Inputs) -> PerExample:
        found, std = self.encoder(x), self.std
        assert std is not None
        if not isinstance(found, tuple):
            raise UsageError("the encoder returns no variances, which log_prob needs; give a VAE without std")
        mean, log_var = found
        noises = drawn_latents(_DRAWS, self.latent_shape, 0, x)
        bounds = []
        for noise in noises:
            z = mean + (log_var / 2).exp() * noise
            # the log-densities of the prior, of the latent vector and of the example
            prior = -z.square() / 2
            latent = -(noise.square() + log_var) / 2  # the constants of prior and latent vector cancel
            example = -(((x - self.decode(z)) / std).square() / 2 + std.log() + math.log(2 * math.pi) / 2)
            bounds.append((prior - latent).flatten(1).sum(1) + example.flatten(1).sum(1))
        return torch.stack(bounds).logsumexp(0) - math.log(_DRAWS)


class Diffusers(nn.Module):
    """An unconditional image pipeline of diffusers, such as `DDPMPipeline` or `DDIMPipeline`, with values in [0, 1]."""

    def __init__(self, pipeline: Any, *, steps: int = 50) -> None:
        """Take a pipeline with a `unet` and a `scheduler`; `steps` is the number of steps of the sampler."""
        super().__init__()
        missing = [name for name in ("unet", "scheduler") if not hasattr(pipeline, name)]
        if missing:
            raise UsageError(
                f"pipeline is {type(pipeline).__name__} without {' and '.join(missing)}; an unconditional pipeline of "
                "diffusers was expected, such as DDPMPipeline"
            )
        self.net, self.pipeline, self.steps = pipeline.unet.eval(), pipeline, steps
        config = pipeline.unet.config
        side = config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        self.latent_shape = (config.in_channels, height, width)
        self._kind: Literal["epsilon", "sample", "v_prediction"] = pipeline.scheduler.config.prediction_type

    def sample(self, n: int, seed: int) -> Inputs:
        """Return `n` images of the pipeline."""
        rng = torch.Generator().manual_seed(seed)
        self.pipeline.set_progress_bar_config(disable=True)
        images = self.pipeline(
            batch_size=n, generator=rng, num_inference_steps=self.steps, output_type="np"
        ).images
        return torch.from_numpy(images).permute(0, 3, 1, 2).float()

    def denoised(self, noise: Tensor) -> Inputs:
        """Return the images into which deterministic steps (DDIM) turn the noise. It may be differentiated."""
        from diffusers import DDIMScheduler

        build: Any = DDIMScheduler.from_config
        scheduler = build(self.pipeline.scheduler.config)
        scheduler.set_timesteps(self.steps)
        x = noise
        for t in scheduler.timesteps:
            x = scheduler.step(self.net(x, t).sample, t, x).prev_sample
        return ((x + 1) / 2).clamp(0, 1)

    def denoising_loss(self, x: Inputs, t: float, noise: Tensor) -> PerExample:
        """Return the mean squared error (n) of what the network predicts (the noise, the velocity or the image)."""
        scheduler = self.pipeline.scheduler
        number = min(int(t * scheduler.config.num_train_timesteps), scheduler.config.num_train_timesteps - 1)
        times = torch.full((len(x),), number, device=x.device)
        clean = 2 * x - 1
        predicted = self.net(scheduler.add_noise(clean, noise, times), times).sample
        if self._kind == "v_prediction":
            target = scheduler.get_velocity(clean, noise, times)
        else:
            target = noise if self._kind == "epsilon" else clean
        return F.mse_loss(predicted, target, reduction="none").flatten(1).mean(1)


def _parameter(net: nn.Module) -> Tensor:
    """Return a parameter, for its type and device; a CPU tensor for a module without parameters."""
    return next(net.parameters(), torch.zeros(()))
