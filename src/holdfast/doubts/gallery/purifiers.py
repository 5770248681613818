"""A model with masked gradients: a diffusion model that purifies the input, through which its evaluation does not
differentiate.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from holdfast.core.batch import Batch
from holdfast.core.gradients import instead, through
from holdfast.doubts.gallery.item import Item
from holdfast.generators.networks import Diffusion, noised
from holdfast.generators.opening import bundled_generators, load
from holdfast.io.models.models import open_model

NETWORK: Literal["mnist-cnn"] = "mnist-cnn"
"""name of the bundled network behind the purifier"""
NOISY = 0.55
"""time up to which noise is added: of 0.25, 0.35, 0.45 and 0.55 the latest, with 98 % accuracy on training images"""
STEPS = 3
"""number of steps of the sampler that remove the noise"""
_EPS = 0.3
# `fast` leaves at most 5 % of 500 digits of the network at 0.125, where the purifier withstands adaptive attacks, too


class Purifier(nn.Module):
    """Layer that adds noise to images, up to a time of the diffusion, and removes it again with the sampler."""

    def __init__(self, diffusion: Diffusion, t: float = NOISY, steps: int = STEPS) -> None:
        super().__init__()
        self.diffusion, self.t, self.steps = diffusion, t, steps

    def forward(self, x: Tensor) -> Tensor:
        """Return the purified images, which depend on new noise in each call. Their gradient is that of all steps."""
        x_t = noised(x, x.new_full((len(x),), self.t), torch.randn_like(x))
        purified: Tensor = (
            self.diffusion.denoise(x_t, self.t, self.steps) + 1
        ) / 2  # a clamp has no gradient
        return purified


class Bypassed(nn.Module):
    """Network behind a purifier, with the gradient of the network without it."""

    def __init__(self, purifier: nn.Module, twin: nn.Module) -> None:
        super().__init__()
        self.purifier, self.twin = purifier, twin

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the purified images `x`, whose gradient is that of the logits of `x`."""
        with torch.no_grad():
            purified = self.purifier(x)
        return instead(self.twin(purified), self.twin(x))


def chain() -> nn.Sequential:
    """Return the bundled network behind a purifier that uses the bundled diffusion model. Its gradient is that of all
    steps, for the noise of one call.
    """
    diffusion = load(bundled_generators()["mnist-diffusion"])
    assert isinstance(diffusion, Diffusion)
    network = open_model(NETWORK).model.eval().requires_grad_(False)
    return nn.Sequential(Purifier(diffusion), network).eval()


def purified(digits: Batch, twin: nn.Module) -> nn.Module:
    """Return the bundled network behind a purifier. It is not trained, so the arguments are not used. Adaptive attacks
    may use the gradient of all steps.
    """
    whole = chain()
    model: nn.Module = through(Bypassed(whole[0], whole[1]), whole)
    return model


def network_of(model: nn.Module) -> nn.Module:
    """Return the network behind the purifier of a built model."""
    twin: nn.Module = model.stage.twin  # type: ignore[union-attr,assignment]
    return twin


ITEMS = (
    Item(
        "purifier",
        "Nie et al., Diffusion models for adversarial purification, ICML 2022, arXiv:2205.07460; attacked with the "
        "gradient of all steps by Lee & Kim, Robust evaluation of diffusion-based adversarial purification, ICCV 2023, "
        "arXiv:2303.09051",
        purified,
        _EPS,
        network_of,
    ),
)
