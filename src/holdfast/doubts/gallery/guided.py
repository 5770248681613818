"""A model with masked gradients whose denoiser is not part of the network that its evaluation attacked."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.core.batch import Batch
from holdfast.core.gradients import instead, through
from holdfast.doubts.gallery.item import EPS, Item
from holdfast.doubts.gallery.small_networks import trained_on_digits

WIDTH, STEPS, EPOCHS = 16, 3, 8  # channels of the denoiser; steps of the attacks in its training; epochs


class Denoiser(nn.Module):
    """Network that subtracts an estimate of the perturbation from an image."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = nn.Sequential(
            nn.Conv2d(1, WIDTH, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(WIDTH, 2 * WIDTH, 4, 2, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * WIDTH, WIDTH, 4, 2, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(WIDTH, 1, 4, 2, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the denoised images."""
        denoised: Tensor = x - self.noise(x)
        return denoised


class Oblivious(nn.Module):
    """Network behind a denoiser, with the gradient of the network without it, as in the evaluation of the paper."""

    def __init__(self, denoiser: nn.Module, twin: nn.Module) -> None:
        super().__init__()
        self.denoiser, self.twin = denoiser, twin

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the denoised images `x`, whose gradient is that of the logits of `x`."""
        return instead(self.twin(self.denoiser(x)), self.twin(x))


def attacked(twin: nn.Module, batch: Batch) -> Tensor:
    """Return the images of a batch after a few steps of gradient ascent on the undefended network, from a random
    start.
    """
    x = (batch.x + EPS * (2 * torch.rand_like(batch.x) - 1)).clamp(0, 1)
    for _ in range(STEPS):
        x.requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(twin(x), batch.y), x)
        x = (x.detach() + EPS / 2 * grad.sign()).clamp(batch.x - EPS, batch.x + EPS).clamp(0, 1)
    return x.detach()


def guided(digits: Batch, twin: nn.Module) -> nn.Module:
    """Return the undefended network `twin` behind a denoiser that is trained on the difference of its logits for clean
    and for denoised attacked images. Adaptive attacks may use the denoiser and the network together.
    """

    def logit_difference(denoiser: nn.Module, batch: Batch) -> Tensor:
        difference: Tensor = twin(denoiser(attacked(twin, batch))) - twin(batch.x)
        return difference.abs().mean()

    denoiser = trained_on_digits(Denoiser, digits, logit_difference, epochs=EPOCHS)
    model: nn.Module = through(Oblivious(denoiser, twin), nn.Sequential(denoiser, twin))
    return model


ITEMS = (
    Item(
        "guided-denoiser",
        "Liao et al., Defense against adversarial attacks using high-level representation guided denoiser, CVPR 2018, "
        "arXiv:1712.02976; attacked with the denoiser by Athalye & Carlini, arXiv:1804.03286",
        guided,
    ),
)
