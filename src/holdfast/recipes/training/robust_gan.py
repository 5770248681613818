"""Robust training of a GAN: the discriminator is trained on perturbed images, and the generator against the worst small
changes of its latent vectors. A student generator is also trained to return what a teacher returns.

Discriminator: Liu & Hsieh, "Rob-GAN: Generator, Discriminator, and Adversarial Attacker", CVPR 2019, arXiv:1807.10454,
with its class head, spectral norm (Miyato et al., ICLR 2018, arXiv:1802.05957) and the gradient penalty R1 of Mescheder
et al., "Which Training Methods for GANs do actually Converge?", ICML 2018, arXiv:1801.04406. Generator: the change of
its output for the worst latent change, found by power iteration as in Miyato et al., "Virtual Adversarial Training",
arXiv:1704.03976, is part of its loss. Student: Aguinaldo et al., "Compressing GANs using Knowledge Distillation",
2019, arXiv:1902.00159; elements of the latent vectors of this comparison are clipped to three standard deviations, so
that it does not learn what a teacher returns beyond them, such as for the trigger of a backdoor. A trigger within them
is learned. Differs from Rob-GAN: generated
images are perturbed too, changes are bounded in the Euclidean norm, and the scores for each class are the logits of the
class head.
"""

import math
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.core.batch import Batch
from holdfast.core.constraints import L2
from holdfast.core.draws import Draws
from holdfast.core.model import Bounds
from holdfast.core.types import Inputs, Labels, NonNegative, Positive, Steps
from holdfast.recipes.training.generator import GAN, LATENT

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
        """Return the hinge loss on perturbed images, with the class head and R1."""
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
