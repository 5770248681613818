"""Models with masked gradients that replace each input by the most similar output of a generator."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.core.batch import Batch
from holdfast.core.gradients import through
from holdfast.doubts.gallery.item import Item
from holdfast.doubts.gallery.small_networks import trained_on_digits

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


ITEMS = (
    Item(
        "defense-gan",
        "Samangouei et al., Defense-GAN: protecting classifiers using generative models, ICLR 2018, arXiv:1805.06605",
        projected,
    ),
)
