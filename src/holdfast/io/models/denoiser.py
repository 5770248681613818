"""A denoiser in front of a classifier, which makes a given classifier suitable for randomised smoothing.

The denoiser is a small residual network: Zhang et al., "Beyond a Gaussian Denoiser: Residual Learning of Deep CNN for
Image Denoising", IEEE Transactions on Image Processing 26, 2017, arXiv:1608.03981 (DnCNN). Differs from the paper: no
batch norm, and the last layer is zero at first, so that an untrained denoiser returns its input.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from holdfast.core.errors import UsageError
from holdfast.core.types import Inputs, Logits

WIDTH, DEPTH = 32, 4
"""default numbers of channels and of layers of a denoiser"""


class DenoisedNetwork(nn.Module):
    """Network that classifies the output of a denoiser. The classifier is not trained and stays in evaluation mode."""

    def __init__(
        self, classifier: nn.Module, channels: int, *, width: int = WIDTH, depth: int = DEPTH
    ) -> None:
        super().__init__()
        if depth < 2 or width < 1:
            raise UsageError(
                f"a denoiser of width {width} and depth {depth} was requested; the width must be at least 1 and the "
                "depth at least 2"
            )
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, 1, 1), nn.ReLU()]
        for _ in range(depth - 2):
            layers += [nn.Conv2d(width, width, 3, 1, 1), nn.ReLU()]
        last = nn.Conv2d(width, channels, 3, 1, 1)
        nn.init.zeros_(last.weight)
        assert last.bias is not None
        nn.init.zeros_(last.bias)
        self.residual = nn.Sequential(*layers, last)
        self.classifier = classifier.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "DenoisedNetwork":  # noqa: FBT001, FBT002  as in nn.Module
        """Set the mode of the denoiser; the classifier stays in evaluation mode."""
        super().train(mode)
        self.classifier.eval()
        return self

    def denoise(self, x: Inputs) -> Inputs:
        """Return the images without the noise that the denoiser finds in them."""
        clean: Inputs = x + self.residual(x)
        return clean

    def forward(self, x: Tensor) -> Logits:
        """Return the logits of the classifier for the denoised images (n, channels, height, width)."""
        logits: Logits = self.classifier(self.denoise(x))
        return logits

    @contextmanager
    def recorded(self) -> Iterator[list[Tensor]]:
        """Context manager that returns a list, to which each forward pass inside it appends its denoised images."""
        images: list[Tensor] = []
        hook = self.classifier.register_forward_pre_hook(lambda _, inputs: images.append(inputs[0]))
        try:
            yield images
        finally:
            hook.remove()


def with_denoiser(net: nn.Module, sizes: Mapping[str, int]) -> DenoisedNetwork:
    """Return a network with an untrained denoiser in front of it, with the `channels`, `width` and `depth` that are
    given.
    """
    denoised = DenoisedNetwork(net, sizes["channels"], width=sizes["width"], depth=sizes["depth"])
    like = next(net.parameters(), torch.zeros(()))
    return denoised.to(like.device, like.dtype) if like.is_floating_point() else denoised
