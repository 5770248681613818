"""Models with masked gradients that clean the input before the network: by the most similar output of a generator, by a
denoiser, or by a diffusion model.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.core.batch import Batch
from holdfast.core.gradients import instead, through
from holdfast.doubts.gallery.item import EPS, Item, trained_on_digits
from holdfast.generators.networks import Diffusion, bundled_generators, load, noised
from holdfast.io.models.models import open_model

LATENT, HIDDEN = 32, 128  # numbers of values of a latent vector and of a hidden layer
DESCENTS, STEP = 5, 0.2  # number and length of the steps in the latent space


class Autoencoder(nn.Module):
    """Autoencoder of digits: an encoder that returns the latent vector of an image, and a generator that returns the
    image of a latent vector.
    """

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Flatten(), nn.Linear(784, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, LATENT)
        )
        self.generator = nn.Sequential(
            nn.Linear(LATENT, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 784), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstruction of the images `x`, which the generator computes from the latent vectors of the
        encoder.
        """
        generated: Tensor = self.generator(self.encoder(x))
        return generated.view_as(x)


class Projected(nn.Module):
    """Layer that replaces an image of a digit by a similar output of a generator, found by gradient descent in the
    latent space.

    The descent starts from the estimate of the encoder.
    """

    def __init__(self, pair: Autoencoder) -> None:
        super().__init__()
        self.pair = pair

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of the generator that replace the images `x`, without a gradient with respect to `x`."""
        images = x.detach()
        z = self.pair.encoder(images)
        for _ in range(DESCENTS):
            z = z.detach().requires_grad_()
            with torch.enable_grad():
                distance = (self.pair.generator(z).view_as(images) - images).square().sum()
                (grad,) = torch.autograd.grad(distance, z)
            z = z.detach() - STEP * F.normalize(grad, dim=1)
        generated: Tensor = self.pair.generator(z)
        return generated.view_as(images).detach()


def projected(digits: Batch, twin: nn.Module) -> nn.Module:
    """Return the undefended network `twin` behind a layer that projects inputs onto the outputs of a generator. Attacks
    may use the autoencoder as its differentiable approximation.
    """

    def reconstruction_loss(net: nn.Module, batch: Batch) -> Tensor:
        return 100 * F.mse_loss(net(batch.x), batch.x)

    pair = trained_on_digits(Autoencoder, digits, reconstruction_loss, epochs=10)
    assert isinstance(pair, Autoencoder)
    return nn.Sequential(through(Projected(pair), pair), twin)


GENERATIVE = (
    Item(
        "defense-gan",
        "Samangouei et al., Defense-GAN: protecting classifiers using generative models, ICLR 2018, arXiv:1805.06605",
        projected,
    ),
)


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


GUIDED = (
    Item(
        "guided-denoiser",
        "Liao et al., Defense against adversarial attacks using high-level representation guided denoiser, CVPR 2018, "
        "arXiv:1712.02976; attacked with the denoiser by Athalye & Carlini, arXiv:1804.03286",
        guided,
    ),
)


NETWORK: Literal["mnist-cnn"] = "mnist-cnn"
"""name of the bundled network behind the purifier"""
NOISY = 0.55
"""time up to which noise is added: of 0.25, 0.35, 0.45 and 0.55 the latest, with 98 % accuracy on training images"""
PURIFICATION_STEPS = 3
"""number of steps of the sampler that remove the noise"""
_EPS = 0.3
# `fast` leaves at most 5 % of 500 digits of the network at 0.125, where the purifier withstands adaptive attacks, too


class Purifier(nn.Module):
    """Layer that adds noise to images, up to a time of the diffusion, and removes it again with the sampler."""

    def __init__(self, diffusion: Diffusion, t: float = NOISY, steps: int = PURIFICATION_STEPS) -> None:
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


PURIFIERS = (
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
