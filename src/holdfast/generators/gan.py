"""A small class-conditional GAN for images, of the networks that `holdfast.recipes.training.generator` trains."""

from torch import nn

from holdfast.core.model import Bounds
from holdfast.core.types import Inputs, PerExample
from holdfast.generators.adapters import GAN
from holdfast.recipes.training.generator import LATENT, ConditionalDiscriminator, ConditionalGenerator


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
