"""A small VAE (variational autoencoder) for images, and its training.

Kingma & Welling, "Auto-Encoding Variational Bayes", ICLR 2014, arXiv:1312.6114; the standard deviation of the pixels is
estimated in the training, as in Rybkin et al., "Simple and Effective VAE Training with Calibrated Decoders", ICML 2021,
arXiv:2006.13202.
"""

import copy

import torch
from torch import Tensor, nn

from holdfast.core.errors import UsageError
from holdfast.core.types import Inputs
from holdfast.generators.adapters import VAE

_LR, _BATCH = 2e-3, 64
_LEAST = 1e-6  # added to the variance of the pixels, which is zero if an image is reconstructed exactly
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


def fit(model: ImageVAE, x: Inputs, *, updates: int, seed: int = 0) -> ImageVAE:
    """Return a copy of the model that is trained on images `x` (n, *shape) in [0, 1]. The learning rate of Adam falls
    to zero.
    """
    trained = copy.deepcopy(model).train().requires_grad_()
    rng = torch.Generator().manual_seed(seed)
    adam = torch.optim.Adam(trained.parameters(), _LR)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(adam, updates)
    variance = torch.ones(())
    for update in range(updates):
        images = x[torch.randint(len(x), (_BATCH,), generator=rng).to(x.device)]
        mean, log_var = trained.encoder(images)
        noise = torch.randn(mean.shape, generator=rng).to(images)
        error = (trained.decode(mean + (log_var / 2).exp() * noise) - images).square().mean()
        divergence = (mean.square() + log_var.exp() - 1 - log_var).sum(1).mean() / 2
        # with the best variance of the pixels, their negative log-likelihood is this and a constant
        likelihood = images[0].numel() / 2 * (error + _LEAST).log()
        adam.zero_grad()
        (likelihood + divergence).backward()
        adam.step()
        rates.step()
        variance.lerp_(error.detach().cpu(), max(_NEW, 1 / (1 + update)))
    assert trained.std is not None
    trained.std.copy_((variance + _LEAST).sqrt())
    return trained.eval().requires_grad_(False)
