"""GANs in trainings: a small class-conditional GAN, and its robust training."""

import math
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from holdfast.core.batch import Batch
from holdfast.core.constraints import L2
from holdfast.core.draws import Draws
from holdfast.core.model import Bounds
from holdfast.core.types import Ids, Inputs, Labels, NonNegative, PerExample, Positive, Steps
from holdfast.recipes.training.fit import drawing
from holdfast.recipes.training.weights import ema

LATENT = 48
"""number of values of the noise from which an image is generated"""
_WIDTH = 32  # channels of the wider one of two convolutions
BATCH = 64
"""number of examples of an update: many small updates give better samples than few large ones"""
_LR, _BETAS = 1e-3, (0.5, 0.99)  # of Adam: the rate is large because a budget of minutes has few updates
_KEPT = 0.995  # decay of the average of the generator


class _ClassNorm(nn.Module):
    """Batch norm whose gains and shifts depend on the class."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.gains, self.shifts = nn.Embedding(classes, channels), nn.Embedding(classes, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the gains to 1 and the shifts to 0."""
        nn.init.ones_(self.gains.weight)
        nn.init.zeros_(self.shifts.weight)

    def forward(self, x: Tensor, y: Labels) -> Tensor:
        gains, shifts = (each(y)[:, :, None, None] for each in (self.gains, self.shifts))
        modulated: Tensor = gains * self.norm(x) + shifts
        return modulated


class ConditionalGenerator(nn.Module):
    """Network from noise (n, latent) and classes (n) to images (n, *shape) inside the bounds."""

    def __init__(self, shape: tuple[int, ...], classes: int, bounds: Bounds) -> None:
        super().__init__()
        channels, height, width = shape
        self.side = (-(-height // 4), -(-width // 4))
        self.shape, self.bounds = shape, bounds
        self.first = nn.Linear(LATENT, _WIDTH * self.side[0] * self.side[1])
        self.norms = nn.ModuleList([_ClassNorm(_WIDTH, classes), _ClassNorm(_WIDTH // 2, classes)])
        self.up = nn.ConvTranspose2d(_WIDTH, _WIDTH // 2, 4, 2, 1)
        self.last = nn.ConvTranspose2d(_WIDTH // 2, channels, 4, 2, 1)

    def forward(self, z: Tensor, y: Labels) -> Inputs:
        """Return images for noise and classes."""
        x = self.first(z).view(len(z), _WIDTH, *self.side)
        x = self.up(F.relu(self.norms[0](x, y)))
        x = self.last(F.relu(self.norms[1](x, y)))[:, :, : self.shape[1], : self.shape[2]]
        low, high = self.bounds.like(x)
        return low + (high - low) * torch.sigmoid(x)


class _Trunk(nn.Module):
    """Two convolutions with strides and a hidden layer, from images to features (n, 2 * width)."""

    def __init__(self, shape: tuple[int, ...], *, normed: bool) -> None:
        super().__init__()
        sides = [((size + 2 - 4) // 2 + 1 + 2 - 4) // 2 + 1 for size in shape[1:]]
        convolutions = [nn.Conv2d(*pair, 4, 2, 1) for pair in pairwise((shape[0], _WIDTH // 2, _WIDTH))]
        layers = [*convolutions, nn.Linear(_WIDTH * sides[0] * sides[1], 2 * _WIDTH)]
        first, second, hidden = (spectral_norm(layer) if normed else layer for layer in layers)
        slope = nn.LeakyReLU(0.1)
        self.layers = nn.Sequential(first, slope, second, slope, nn.Flatten(), hidden, slope)

    def forward(self, x: Inputs) -> Tensor:
        features: Tensor = self.layers(x)
        return features


class ConditionalDiscriminator(nn.Module):
    """Network from images and classes to scores (n), which are large for real images of the class."""

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.trunk = _Trunk(shape, normed=True)
        self.score = spectral_norm(nn.Linear(2 * _WIDTH, 1))
        self.classes = spectral_norm(nn.Embedding(classes, 2 * _WIDTH))

    def forward(self, x: Inputs, y: Labels) -> PerExample:
        """Return the scores of images as ones of the classes `y`."""
        return self.scores(x).gather(1, y[:, None])[:, 0]

    def scores(self, x: Inputs) -> Tensor:
        """Return the scores (n, classes) of images for each class, which are also the logits of a classifier."""
        features = self.trunk(x)
        scores: Tensor = self.score(features) + features @ self.classes.weight.T
        return scores


class GAN:
    """A class-conditional generator of images with its discriminator, and a classifier of real images that filters the
    samples. All tensors are in `state`, from which a training resumes exactly.
    """

    def __init__(
        self,
        example: Inputs,
        classes: int,
        bounds: Bounds,
        rng: Draws,
        networks: tuple[nn.Module, nn.Module] | None = None,
        latent_shape: tuple[int, ...] = (LATENT,),
    ) -> None:
        """Create the networks for images like `example` (n, channels, height, width) with random weights. If `networks`
        are given, a generator from latent vectors (n, *latent_shape) and a discriminator with the calls of
        `ConditionalGenerator` and `ConditionalDiscriminator`, copies of them are trained.
        """
        self._latent_shape = latent_shape
        shape = tuple(example.shape[1:])
        with drawing(rng.at("generator"), example.device):
            generator, discriminator = deepcopy(networks) or (
                ConditionalGenerator(shape, classes, bounds),
                ConditionalDiscriminator(shape, classes),
            )
            nets = nn.ModuleDict(
                {
                    "generator": generator,
                    "average": deepcopy(generator),
                    "discriminator": discriminator,
                    "classifier": nn.Sequential(_Trunk(shape, normed=False), nn.Linear(2 * _WIDTH, classes)),
                }
            ).to(example)
        self._nets = nets.train()  # in eval mode, spectral norm would not follow the weights
        self.generator, self.average = nets["generator"], nets["average"].eval().requires_grad_(False)
        self.discriminator, self._classifier = nets["discriminator"], nets["classifier"]
        self.updates = torch.zeros((), dtype=torch.int64, device=example.device)
        """number of updates of the generator"""
        trained = (self.generator, self.discriminator, self._classifier)
        self._optimizers = [torch.optim.Adam(net.parameters(), _LR, _BETAS, foreach=False) for net in trained]
        for optimizer in self._optimizers:
            for weight in optimizer.param_groups[0]["params"]:  # the moments exist before the first update
                zeros = [torch.zeros_like(weight, requires_grad=False) for _ in range(2)]
                moments = dict(zip(("exp_avg", "exp_avg_sq"), zeros, strict=True))
                optimizer.state[weight] = {"step": torch.zeros(()), **moments}

    def state(self) -> dict[str, Tensor]:
        """Return all tensors by name, each with a first dimension of 1. They share the memory of the networks, so that
        values that are written into them change the networks.
        """
        tensors = {"gan.updates": self.updates}
        tensors |= {f"gan.{name}": value for name, value in self._nets.state_dict().items()}
        for number, name, value in self._moments():
            tensors[f"gan.adam.{number}.{name}"] = value
        # with a first dimension of 1, none of them is taken for a tensor with a row for each example
        return {name: value[None] for name, value in tensors.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore all tensors from those of a checkpoint, by the names that `state` returns."""
        for name, value in self.state().items():
            value.copy_(tensors[name])

    def _moments(self) -> Iterator[tuple[int, str, Tensor]]:
        weights = [
            (optimizer, weight)
            for optimizer in self._optimizers
            for weight in optimizer.param_groups[0]["params"]
        ]
        for number, (optimizer, weight) in enumerate(weights):
            for name, value in optimizer.state[weight].items():
                yield number, name, value

    def update(self, batch: Batch, rng: Draws) -> None:
        """Train discriminator, generator and classifier for one update on real examples."""
        batch = batch.first(BATCH)
        z = self._noise(batch.ids, rng.at("noise"), batch.x)
        fake = self.generator.train()(z, batch.y)
        self._step(1, self.discriminator_loss(batch, fake.detach()))
        self.discriminator.requires_grad_(False)  # the generator's update needs no gradient of these weights
        self._step(0, self.generator_loss(batch, z, fake, rng))
        self.discriminator.requires_grad_(True)
        self._step(2, F.cross_entropy(self._classifier(batch.x), batch.y))
        ema(self.average.state_dict(), self.generator, _KEPT, int(self.updates))
        self.updates.add_(1)

    def discriminator_loss(self, batch: Batch, fake: Inputs) -> Tensor:
        """Return the loss of the discriminator for real examples and generated ones of the same classes."""
        real, generated = self.discriminator(torch.cat((batch.x, fake)), batch.y.repeat(2)).chunk(2)
        return F.relu(1 - real).mean() + F.relu(1 + generated).mean()

    def generator_loss(self, batch: Batch, z: Tensor, fake: Inputs, rng: Draws) -> Tensor:
        """Return the loss of the generator for its samples `fake`, of the latent vectors `z` and the classes of
        `batch`.
        """
        loss: Tensor = -self.discriminator(fake, batch.y).mean()
        return loss

    def _step(self, number: int, loss: Tensor) -> None:
        self._optimizers[number].zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizers[number].step()

    def _noise(self, ids: Ids, rng: Draws, like: Tensor) -> Tensor:
        return rng.normal(ids, *self._latent_shape, dtype=like.dtype)

    @torch.no_grad()
    def samples(self, ids: Ids, y: Labels, rng: Draws) -> Inputs:
        """Return an image of each class in `y` (n), which is a function of its id and of `rng`."""
        like = next(self.average.parameters())
        images: Inputs = self.average(self._noise(ids, rng, like), y)
        return images

    @torch.no_grad()
    def confidence(self, x: Inputs, y: Labels) -> PerExample:
        """Return the probability (n) that the classifier gives to the class `y` of each image."""
        probabilities: Tensor = self._classifier(x).softmax(1)
        return probabilities.gather(1, y[:, None])[:, 0]

    def accepted(self, batch: Batch, rng: Draws, least: float) -> tuple[Inputs, Tensor]:
        """Return an image of the class of each example, and whether the classifier has at least the confidence `least`
        in its class. Where it has less, one more sample is tried.
        """
        x = self.samples(batch.ids, batch.y, rng.at("first"))
        is_accepted = self.confidence(x, batch.y) >= least
        rows = (~is_accepted).nonzero()[:, 0]
        if len(rows):
            other = self.samples(batch.ids[rows], batch.y[rows], rng.at("second"))
            x[rows] = other
            is_accepted[rows] = self.confidence(other, batch.y[rows]) >= least
        return x, is_accepted


_USUAL = 3.0  # standard deviations of the elements of a latent vector that a student sees


@dataclass(frozen=True)
class RobustLosses:
    """Settings of the robust training of a GAN."""

    eps: NonNegative = 0.1
    """root mean square of the change of the pixels, as a multiple of their standard deviation; 0 for none"""
    steps: Steps = 2
    """steps of the attack on the discriminator"""
    latent: Positive = 0.1
    """root mean square of the change of the elements of a latent vector, whose standard deviation is 1"""
    smoothness: NonNegative = 1.0
    """weight of the worst change of the output, relative to the distance between two samples"""
    r1: NonNegative = 0.1
    """weight of the squared gradient of the discriminator at real images"""
    class_head: NonNegative = 0.5
    """weight of the cross-entropy of the class head on perturbed real images"""
    teacher: NonNegative = 0.0
    """weight of the distance of the output to that of a teacher, relative to the distance between two samples; 0 for
    none
    """


class RobustGAN(GAN):
    """A class-conditional GAN with the losses of the robust training. Cost: about `steps` + 3 times that of a GAN."""

    def __init__(
        self,
        example: Inputs,
        classes: int,
        bounds: Bounds,
        rng: Draws,
        networks: tuple[nn.Module, nn.Module] | None = None,
        latent_shape: tuple[int, ...] = (LATENT,),
        how: RobustLosses | None = None,
        teacher: nn.Module | None = None,
    ) -> None:
        """Create the networks as for `GAN`. `teacher` is a generator with the call of `ConditionalGenerator`."""
        super().__init__(example, classes, bounds, rng, networks, latent_shape)
        self.how, self._bounds = how or RobustLosses(), bounds
        self._teacher = None if teacher is None else deepcopy(teacher).eval().requires_grad_(False)

    def discriminator_loss(self, batch: Batch, fake: Inputs) -> Tensor:
        """Return the loss of the discriminator on real images and as many generated ones, `fake`, of the same classes.

        It is the sum of the hinge loss on both after an attack on the discriminator, `class_head` times the
        cross-entropy of its class head on the attacked real images, and `r1` times half the mean squared norm of its
        gradient at the real images. It is the loss of `GAN` if these weights and the attack are zero.
        """
        if not (self.how.eps or self.how.r1 or self.how.class_head):
            usual_loss: Tensor = super().discriminator_loss(batch, fake)
            return usual_loss
        how, x, y = self.how, torch.cat((batch.x, fake)), batch.y.repeat(2)
        is_real = torch.arange(len(x), device=x.device) < len(batch.x)
        attacked = self._perturbed(x, y, is_real)
        scores = self._scores(attacked)
        of_class = scores.gather(1, y[:, None])[:, 0]
        hinge = F.relu(1 - of_class[is_real]).mean() + F.relu(1 + of_class[~is_real]).mean()
        head = F.cross_entropy(scores[is_real], batch.y)
        real = batch.x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.discriminator(real, batch.y).sum(), real, create_graph=True)
        penalty = slope.flatten(1).square().sum(1).mean() / 2
        return hinge + how.class_head * head + how.r1 * penalty

    def generator_loss(self, batch: Batch, z: Tensor, fake: Inputs, rng: Draws) -> Tensor:
        """Return the loss of the generator with the worst change of its output, as a share of the distance between the
        outputs of two latent vectors.
        """
        loss: Tensor = super().generator_loss(batch, z, fake, rng)
        apart = (fake - fake.roll(1, 0)).detach().flatten(1).norm(dim=1).mean().clamp_min(1e-6)
        if self._teacher is not None:
            usual = z.clamp(-_USUAL, _USUAL)
            distance = (
                (self.generator(usual, batch.y) - self._teacher(usual, batch.y)).flatten(1).square().sum(1)
            )
            loss = loss + self.how.teacher * (distance + 1e-12).sqrt().mean() / apart
        if not self.how.smoothness:
            return loss
        radius = self.how.latent * math.sqrt(z[0].numel())
        d = _unit(rng.at("latent").normal(batch.ids, *z.shape[1:], dtype=z.dtype))
        moved = self._change(z, batch.y, 0.1 * radius * d.requires_grad_(), fake.detach())
        (slope,) = torch.autograd.grad(moved.sum(), d)
        worst = self._change(z, batch.y, radius * _unit(slope), fake)
        worst_change: Tensor = (worst + 1e-12).sqrt().mean()
        smooth: Tensor = loss + self.how.smoothness * worst_change / apart
        return smooth

    def _change(self, z: Tensor, y: Labels, d: Tensor, before: Inputs) -> Tensor:
        change: Tensor = (self.generator(z + d, y) - before).flatten(1).square().sum(1)
        return change

    def _scores(self, x: Inputs) -> Tensor:
        scores: Tensor = self.discriminator.scores(x)  # type: ignore[operator]
        return scores

    def _perturbed(self, x: Inputs, y: Labels, is_real: Tensor) -> Inputs:
        """Images that the discriminator takes for the other kind."""
        if not self.how.eps:
            return x
        deviation = float(x[is_real].std())
        radius = torch.full((len(x),), self.how.eps * deviation * math.sqrt(x[0].numel())).to(x)
        sign = torch.where(is_real, -1.0, 1.0).to(x)
        point = x
        for _ in range(self.how.steps):
            point = point.detach().requires_grad_()
            (slope,) = torch.autograd.grad((sign * self.discriminator(point, y)).sum(), point)
            step = (radius / self.how.steps).view(-1, *[1] * (x.dim() - 1))
            point = point.detach() + step * L2().steepest(slope, point.detach(), self._bounds)
            point = L2().within(point, x, self._bounds, radius)
        return point.detach()


def _unit(d: Tensor) -> Tensor:
    """Return each row (n, *latent) divided by its Euclidean norm over all elements."""
    return F.normalize(d.flatten(1), dim=1).view_as(d)
