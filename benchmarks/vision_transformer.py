"""A small vision transformer for digits of 28 x 28 pixels."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class VisionTransformer(nn.Module):
    """Patches of 14 x 14 pixels, one block of attention with two heads and a hidden layer, and the mean of the tokens.

    Dosovitskiy et al., ICLR 2021, arXiv:2010.11929. Differs: one small block without layer normalisation, whose bounds
    are wide.
    """

    def __init__(self, width: int = 32, heads: int = 2, patch: int = 14) -> None:
        super().__init__()
        tokens = (28 // patch) ** 2
        self.heads = heads
        self.embed = nn.Conv2d(1, width, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.attend, self.join = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """The logits of images (n, 1, 28, 28)."""
        x = self.embed(x).flatten(2).transpose(1, 2) + self.position
        n, tokens, width = x.shape
        parts = self.attend(x).view(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*parts.unbind(0)).transpose(1, 2).reshape(n, tokens, width)
        x = x + self.join(attended)
        x = x + self.down(self.up(x).relu())
        return self.head(x.mean(1))  # type: ignore[no-any-return]
