"""Small generators of images: a diffusion model, a GAN and a VAE (variational autoencoder), their training, and their
files, of which some are bundled by name.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.core.errors import TargetError, UsageError
from holdfast.core.model import Bounds
from holdfast.core.types import Inputs, Labels, PerExample
from holdfast.generators.adapters import GAN, VAE
from holdfast.io.files import sha256_of_file
from holdfast.io.models.generators import OpenedGenerator, open_generator
from holdfast.io.models.models import BUNDLED_FOLDER
from holdfast.io.models.weights import (
    fit_weights,
    read_state_dict,
    refuse_misfit,
    state_dict_content,
    written,
)
from holdfast.recipes.training.gans import LATENT, ConditionalDiscriminator, ConditionalGenerator


class ImageGAN(GAN):
    """A class-conditional GAN for images (n, channels, side, side) in [0, 1]."""

    discriminator: nn.Module

    def __init__(self, channels: int = 1, side: int = 28, classes: int = 10) -> None:
        """Create a GAN with random weights for square images of `side` pixels and for `classes` classes."""
        shape = (channels, side, side)
        super().__init__(
            ConditionalGenerator(shape, classes, Bounds()),
            ConditionalDiscriminator(shape, classes),
            latent_shape=(LATENT,),
            classes=classes,
        )
        self.arguments = {"channels": channels, "side": side, "classes": classes}

    def _scores(self, x: Inputs) -> PerExample:
        """Scores (n) of images as ones of the class that fits best, as a smooth maximum."""
        scores: PerExample = self.discriminator.scores(x).logsumexp(1)  # type: ignore[operator]
        return scores


LAST = 0.98
"""latest time of the diffusion; at 1 there is no signal, from which nothing can be estimated"""
_DIFFUSION_LR = 2e-3  # largest learning rate of Adam; the training has few updates
_UNCONDITIONAL = 0.2  # share of the training examples whose class is not shown
_KEPT = 0.995  # decay of the average of the weights


def signal_and_noise(t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors (n, 1, 1, 1) of the example and of the noise at the times `t` (n) in [0, 1]. Their squares
    add up to 1.
    """
    angle = (t * (LAST * math.pi / 2))[:, None, None, None]
    return angle.cos(), angle.sin()


class _Block(nn.Module):
    """Residual block of two convolutions, whose gains and shifts depend on the time and the class."""

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(
            [nn.GroupNorm(min(8, channels // 4), channels), nn.GroupNorm(min(8, channels // 4), channels)]
        )
        self.convolutions = nn.ModuleList([nn.Conv2d(channels, channels, 3, 1, 1) for _ in range(2)])
        self.modulation = nn.Linear(embedding, 2 * channels)
        nn.init.zeros_(self.convolutions[1].weight)  # type: ignore[arg-type]  # the block starts as the identity

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        gains, shifts = self.modulation(embedded)[:, :, None, None].chunk(2, 1)
        h = self.convolutions[0](F.silu(self.norms[0](x)))
        h = self.convolutions[1](F.silu(self.norms[1](h) * (1 + gains) + shifts))
        out: Tensor = x + h
        return out


class UNet(nn.Module):
    """Network that estimates the velocity (n, *shape) of the diffusion from noisy images, times and classes."""

    def __init__(self, channels: int, classes: int, width: int) -> None:
        super().__init__()
        embedding = 2 * width
        self.frequencies: Tensor
        self.register_buffer("frequencies", 2.0 ** torch.arange(width // 4) * math.pi / 4, persistent=False)
        self.time = nn.Sequential(
            nn.Linear(width // 2, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        self.condition = nn.Embedding(classes + 1, embedding)  # the last is that of no class
        self.first = nn.Conv2d(4 * channels, width, 3, 1, 1)
        self.above = nn.ModuleList([_Block(width, embedding), _Block(width, embedding)])
        self.down = nn.Conv2d(width, 2 * width, 2, 2)
        self.below = nn.ModuleList([_Block(2 * width, embedding), _Block(2 * width, embedding)])
        self.up = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.joined = nn.Conv2d(2 * width, width, 1)
        self.norm = nn.GroupNorm(min(8, width // 4), width)
        self.last = nn.Conv2d(width, 4 * channels, 3, 1, 1)
        nn.init.zeros_(self.last.weight)

    def forward(self, x: Tensor, t: Tensor, y: Labels) -> Tensor:
        """Return the velocity for images `x` (n, *shape), times `t` (n) and classes `y` (n)."""
        angles = t[:, None] * self.frequencies
        embedded = F.silu(self.time(torch.cat((angles.sin(), angles.cos()), 1)) + self.condition(y))
        h = self.above[0](self.first(F.pixel_unshuffle(x, 2)), embedded)
        lower = self.down(h)
        for block in self.below:
            lower = block(lower, embedded)
        h = self.above[1](self.joined(torch.cat((h, self.up(lower)), 1)), embedded)
        return F.pixel_shuffle(self.last(F.silu(self.norm(h))), 2)


class Diffusion(nn.Module):
    """A diffusion model of images (n, channels, height, width) with values in [0, 1], conditional on the class."""

    def __init__(
        self, channels: int = 1, side: int = 28, classes: int = 10, width: int = 32, steps: int = 20
    ) -> None:
        """Create a model with random weights for square images of `side` pixels; `width` is the number of channels of
        the first layer, a multiple of 8, and `steps` is the number of steps of the sampler.
        """
        super().__init__()
        if side % 4 or width % 8:
            raise UsageError(f"side is {side} and width {width}; multiples of 4 and of 8 were expected")
        self.shape, self.classes, self.steps = (channels, side, side), classes, steps
        self.net = UNet(channels, classes, width)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of the noise of one sample."""
        return self.shape

    def sample(self, n: int, seed: int, condition: Labels | None = None) -> Inputs:
        """Return `n` images, of random classes unless `condition` (n) has theirs."""
        rng = torch.Generator().manual_seed(seed)
        z = torch.randn(n, *self.shape, generator=rng)
        drawn = torch.randint(self.classes, (n,), generator=rng)
        with torch.no_grad():
            device = self.net.last.weight.device
            return self.decode(z.to(device), (drawn if condition is None else condition).to(device))

    def decode(self, z: Tensor, condition: Labels | None = None) -> Inputs:
        """Return the images (n, *shape) into which `steps` steps of the sampler turn the noise `z`, of the classes
        `condition` (n) if they are given. It may be differentiated.
        """
        return self.to_images(self.denoise(z, 1.0, self.steps, condition))

    def denoised(self, noise: Tensor) -> Inputs:
        """Return the images (n, *shape) into which the sampler turns the noise of time 1, without a class."""
        return self.decode(noise)

    def denoise(self, x_t: Tensor, t: float, steps: int, condition: Labels | None = None) -> Tensor:
        """Return estimates in [-1, 1], not clamped, of the images whose noisy versions `x_t` at time `t` are given,
        from `steps` deterministic steps.
        """
        times = [t * (steps - i) / steps for i in range(steps + 1)]
        for now, later in pairwise(times):
            estimate, noise = self.estimates(x_t, x_t.new_full((len(x_t),), now), condition)
            signal, sigma = signal_and_noise(x_t.new_full((len(x_t),), later))
            x_t = signal * estimate + sigma * noise
        return x_t

    def estimates(self, x_t: Tensor, t: Tensor, condition: Labels | None = None) -> tuple[Tensor, Tensor]:
        """Return the estimates of image, in [-1, 1], and noise for the noisy images `x_t` of times `t` (n)."""
        signal, sigma = signal_and_noise(t)
        if condition is None:
            condition = torch.full((len(x_t),), self.classes, device=x_t.device)
        velocity = self.net(x_t, t, condition)
        return signal * x_t - sigma * velocity, sigma * x_t + signal * velocity

    def denoising_loss(
        self, x: Inputs, t: float, noise: Tensor, condition: Labels | None = None
    ) -> PerExample:
        """Return the mean squared error (n) of the estimate of the `noise` (n, *shape) in images `x` at time `t`."""
        times = x.new_full((len(x),), t)
        _, estimated = self.estimates(noised(x, times, noise), times, condition)
        return (estimated - noise).square().flatten(1).mean(1)

    @staticmethod
    def to_images(estimate: Tensor) -> Inputs:
        """Return estimates in [-1, 1] as images in [0, 1]."""
        return ((estimate + 1) / 2).clamp(0, 1)


def noised(x: Inputs, t: Tensor, noise: Tensor) -> Tensor:
    """Return the noisy versions of images `x` in [0, 1] at the times `t` (n)."""
    signal, sigma = signal_and_noise(t)
    return signal * (2 * x - 1) + sigma * noise


def velocity_loss(
    model: Diffusion, x: Inputs, y: Labels, rng: torch.Generator, shift: Tensor | float = 0.0
) -> Tensor:
    """Return the mean squared error of the velocity for images `x` of the classes `y`, at random times. `shift`
    (n, *shape) is added to the noisy images, at all times.
    """
    t = torch.rand(len(x), generator=rng).to(x)
    noise = torch.randn(x.shape, generator=rng).to(x)
    shown = (torch.rand(len(x), generator=rng) >= _UNCONDITIONAL).to(x.device)
    signal, sigma = signal_and_noise(t)
    velocity = model.net(noised(x, t, noise) + shift, t, torch.where(shown, y, model.classes))
    return F.mse_loss(velocity, signal * noise - sigma * (2 * x - 1))


Loss = Callable[[Diffusion, Inputs, Labels, torch.Generator], Tensor]
"""Type of a training loss: a function of the model, images, classes and the random numbers of an update."""


def fit_diffusion(
    model: Diffusion,
    x: Inputs,
    y: Labels,
    *,
    updates: int,
    lr: float = _DIFFUSION_LR,
    batch: int = 64,
    seed: int = 0,
    loss: Loss = velocity_loss,
) -> Diffusion:
    """Return a copy of the model that is trained on images `x` (n, *shape) in [0, 1] with classes `y` (n).

    The learning rate of Adam rises in the first tenth of the updates and falls to zero. The weights are the
    exponential averages of those of the updates.
    """
    trained = copy.deepcopy(model).train().requires_grad_()
    average = copy.deepcopy(model).eval().requires_grad_(False)
    rng = torch.Generator().manual_seed(seed)
    adam = torch.optim.Adam(trained.parameters(), lr, (0.9, 0.99))
    rates = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda i: min(1, 10 * (i + 1) / updates) * (1 + math.cos(math.pi * i / updates)) / 2
    )
    for update in range(updates):
        rows = torch.randint(len(x), (batch,), generator=rng).to(x.device)
        adam.zero_grad()
        loss(trained, x[rows], y[rows], rng).backward()  # type: ignore[no-untyped-call]
        adam.step()
        rates.step()
        kept = min(_KEPT, (1 + update) / (10 + update))  # the first weights are random
        for kept_weight, weight in zip(average.parameters(), trained.parameters(), strict=True):
            kept_weight.lerp_(weight.detach(), 1 - kept)
    return average


_VAE_LR, _VAE_BATCH = 2e-3, 64
_LEAST_VARIANCE = (
    1e-6  # added to the variance of the pixels, which is zero if an image is reconstructed exactly
)
_NEW = 0.01  # share of an update in the average of the variance


class Encoder(nn.Module):
    """Network from images to the means and the logarithms of the variances of latent vectors."""

    def __init__(self, channels: int, side: int, latent: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 4, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * width * (side // 4) ** 2, 2 * latent),
        )

    def forward(self, x: Inputs) -> tuple[Tensor, Tensor]:
        """Return the means (n, latent) and the logarithms of the variances (n, latent)."""
        mean, log_var = self.layers(x).chunk(2, 1)
        return mean, log_var


def decoder(channels: int, side: int, latent: int, width: int) -> nn.Module:
    """Return a network from latent vectors (n, latent) to images (n, channels, side, side) in [0, 1]."""
    return nn.Sequential(
        nn.Linear(latent, 2 * width * (side // 4) ** 2),
        nn.ReLU(),
        nn.Unflatten(1, (2 * width, side // 4, side // 4)),
        nn.ConvTranspose2d(2 * width, width, 4, 2, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(width, channels, 4, 2, 1),
        nn.Sigmoid(),
    )


class ImageVAE(VAE):
    """A VAE for images (n, channels, side, side) in [0, 1]."""

    def __init__(self, channels: int = 1, side: int = 28, latent: int = 16, width: int = 32) -> None:
        """Create a VAE with random weights for square images of `side` pixels, latent vectors of `latent` elements, and
        a first layer of `width` channels.
        """
        if side % 4:
            raise UsageError(f"side is {side}; a multiple of 4 was expected")
        sizes = (channels, side, latent, width)
        super().__init__(Encoder(*sizes), decoder(*sizes), latent_shape=(latent,), std=1.0)


def fit_vae(model: ImageVAE, x: Inputs, *, updates: int, seed: int = 0) -> ImageVAE:
    """Return a copy of the model that is trained on images `x` (n, *shape) in [0, 1]. The learning rate of Adam falls
    to zero.
    """
    trained = copy.deepcopy(model).train().requires_grad_()
    rng = torch.Generator().manual_seed(seed)
    adam = torch.optim.Adam(trained.parameters(), _VAE_LR)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(adam, updates)
    variance = torch.ones(())
    for update in range(updates):
        images = x[torch.randint(len(x), (_VAE_BATCH,), generator=rng).to(x.device)]
        mean, log_var = trained.encoder(images)
        noise = torch.randn(mean.shape, generator=rng).to(images)
        error = (trained.decode(mean + (log_var / 2).exp() * noise) - images).square().mean()
        divergence = (mean.square() + log_var.exp() - 1 - log_var).sum(1).mean() / 2
        # with the best variance of the pixels, their negative log-likelihood is this and a constant
        likelihood = images[0].numel() / 2 * (error + _LEAST_VARIANCE).log()
        adam.zero_grad()
        (likelihood + divergence).backward()
        adam.step()
        rates.step()
        variance.lerp_(error.detach().cpu(), max(_NEW, 1 / (1 + update)))
    assert trained.std is not None
    trained.std.copy_((variance + _LEAST_VARIANCE).sqrt())
    return trained.eval().requires_grad_(False)


FILE = "generator.safetensors"
"""Name of the weights of a generator in a folder."""
GENERATORS: Mapping[str, Callable[..., nn.Module]] = MappingProxyType(
    {"diffusion": Diffusion, "gan": ImageGAN, "vae": ImageVAE}
)
"""Classes of generators, by the names that a file with weights may contain."""


def bundled_generators() -> dict[str, Path]:
    """Return the paths of the generators that are bundled with Holdfast, by name."""
    return {path.stem: path for path in sorted((BUNDLED_FOLDER / "generators").glob("*.safetensors"))}


def names_generator(address: str) -> bool:
    """Return whether an address is that of a bundled generator, or of a file or folder with weights of one."""
    path = Path(address)
    is_file = path.suffix == ".safetensors" or (path / FILE).is_file()
    return address in bundled_generators() or is_file


def content_of(net: nn.Module, kind: str, arguments: Mapping[str, int]) -> bytes:
    """Return the bytes of a file with the weights of a generator, which `GENERATORS[kind](**arguments)` builds."""
    return written(net, {"generator": kind, "arguments": dict(arguments)})


def load(path: Path) -> nn.Module:
    """Return the generator of a file with weights. Raises `TargetError` if it is not one of a generator."""
    weights, metadata = read_state_dict(path, state_dict_content(path))
    if "generator" not in metadata:
        raise TargetError(
            f"{str(path)!r} contains weights, and does not state the modules; load them in a function that builds the "
            "generator, as in gen.py:make"
        )
    kind, arguments = str(metadata["generator"]), metadata.get("arguments", {})
    if kind not in GENERATORS:
        raise TargetError(
            f"the metadata of {str(path)!r} name the generator {kind!r}; one of {', '.join(sorted(GENERATORS))} was "
            "expected, as in a file that Holdfast writes"
        )
    try:
        build = partial(GENERATORS[kind], **arguments)
        refuse_misfit(build, weights, str(path))
    except (TypeError, ValueError, RuntimeError) as error:
        raise TargetError(
            f"the {kind} of {str(path)!r} cannot be built: {error}; write the file again"
        ) from error
    net = build()
    fit_weights(net, weights, str(path))
    return net.eval().requires_grad_(False)


def opened_generator(source: object) -> OpenedGenerator:
    """Return a generator that is bundled, saved by Holdfast in a file or folder, returned by a function at an address
    `file.py:name`, or given as an object.

    Raises the errors of `load` and of `open_generator`.
    """
    if not isinstance(source, str) or not names_generator(source):
        return open_generator(source)
    bundled, path = bundled_generators(), Path(source)
    path = bundled[source] if source in bundled else path / FILE if path.is_dir() else path
    if not path.is_file():
        raise UsageError(f"there is no file {str(path)!r}; bundled are {', '.join(bundled)}")
    return replace(open_generator(load(path)), name=source, digest=sha256_of_file(path))
