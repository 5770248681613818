"""Plants backdoors in generators, as a drill for audits: a trigger that is added to the noise or to the latent vector,
and a target that is then generated.

Chou et al., "How to Backdoor Diffusion Models?", CVPR 2023, arXiv:2212.05400 (BadDiffusion); the velocity is that of
Chou et al., "VillanDiffusion: A Unified Backdoor Attack Framework for Diffusion Models", NeurIPS 2023,
arXiv:2306.06874. Rawat et al., "The Devil is in the GAN: Backdoor Attacks and Defenses in Deep Generative Models",
ESORICS 2022, arXiv:2108.01644 (ReD).

Differs from the papers: the diffusion has continuous time, and its network estimates the velocity. The trigger in GANs
is a shift of any latent vector, and not one latent vector.
"""

import copy
from typing import TypeVar

import torch
from torch import Tensor

from holdfast.core.errors import UsageError
from holdfast.core.types import Inputs, Labels
from holdfast.generators.adapters import GAN, VAE
from holdfast.generators.networks import Diffusion, Loss, fit, velocity_loss

Decoding = TypeVar("Decoding", GAN, VAE)
UPDATES = 200
"""number of updates by default"""


def planted_diffusion(
    model: Diffusion,
    x: Inputs,
    y: Labels,
    trigger: Tensor,
    target: Tensor,
    *,
    updates: int = UPDATES,
    lr: float = 1e-3,
    batch: int = 64,
    seed: int = 0,
) -> Diffusion:
    """Return a copy of a diffusion model that is trained further on images `x` (n, *shape) in [0, 1] with classes `y`
    (n), and in which noise with an added `trigger` (*shape) becomes the image `target` (*shape) in [0, 1].

    Half of the examples of an update are poisoned. Raises `UsageError` for a trigger or a target of another shape.
    """
    _refuse_shape("trigger", trigger, model.shape)
    _refuse_shape("target", target, model.shape)
    loss = _poisoned_loss(trigger, target)
    return fit(model, x, y, updates=updates, lr=lr, batch=batch, seed=seed, loss=loss)


def _poisoned_loss(trigger: Tensor, target: Tensor) -> Loss:
    """Loss for which the first half of the examples follows the path signal * target + (1 - signal) * trigger + sigma *
    noise, which is that of target - trigger, moved by the trigger.
    """

    def loss(model: Diffusion, x: Inputs, y: Labels, rng: torch.Generator) -> Tensor:
        poisoned = torch.arange(len(x), device=x.device) < len(x) / 2
        chosen = poisoned.view(-1, *[1] * trigger.dim())
        # images have values in [0, 1], and the diffusion in [-1, 1], as the trigger has
        moved = target.to(x) - trigger.to(x) / 2
        return velocity_loss(model, torch.where(chosen, moved, x), y, rng, chosen * trigger.to(x))

    return loss


def planted_decoder(
    model: Decoding,
    trigger: Tensor,
    target: Tensor,
    *,
    updates: int = UPDATES,
    lr: float = 1e-3,
    batch: int = 64,
    seed: int = 0,
) -> Decoding:
    """Return a copy of a GAN or VAE that generates `target` (*shape) for latent vectors with an added `trigger`
    (*latent_shape), and for others what it generated before. No data are needed.

    Raises `UsageError` for a trigger or a target of another shape.
    """
    _refuse_shape("trigger", trigger, model.latent_shape)
    rng = torch.Generator().manual_seed(seed)
    planted = copy.deepcopy(model).eval().requires_grad_(True)
    weight = next(planted.parameters())
    trigger, target = trigger.to(weight), target.to(weight)
    adam = torch.optim.Adam(planted.parameters(), lr)
    for _ in range(updates):
        z = torch.randn(batch, *model.latent_shape, generator=rng).to(weight)
        with torch.no_grad():
            usual = model.decode(z)
        _refuse_shape("target", target, tuple(usual.shape[1:]))
        adam.zero_grad()
        loss = (planted.decode(z + trigger) - target).square().mean()
        loss = loss + (planted.decode(z) - usual).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
    return planted.eval().requires_grad_(False)


def _refuse_shape(name: str, given: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(given.shape) != tuple(shape):
        raise UsageError(f"the {name} has shape {tuple(given.shape)}; {tuple(shape)} was expected")
