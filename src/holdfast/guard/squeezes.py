"""Squeezes of inputs: fewer bits for each value, and median filters of images.

Both have gradients, so that attacks can differentiate through them: the rounding is treated as the identity, as in
Athalye, Carlini & Wagner, "Obfuscated gradients give a false sense of security", ICML 2018, arXiv:1802.00420.
"""

import torch.nn.functional as F

from holdfast.core.types import Inputs


def with_bits(x: Inputs, bits: int, low: float = 0.0, high: float = 1.0) -> Inputs:
    """Return the inputs rounded to `2**bits` equidistant values from `low` to `high`. The gradient is that of the
    identity.
    """
    steps = (2**bits - 1) / (high - low)
    rounded = ((x - low) * steps).round() / steps + low
    # The difference is detached, so that the gradient is one. `x + (rounded - x)` would change the last bit.
    straight: Inputs = x + (rounded - x).detach() if x.requires_grad else rounded
    return straight


def median_filtered(x: Inputs, size: int) -> Inputs:
    """Return images (n, channels, height, width) in which each value is the median of a window of `size` x `size`
    pixels around it. Images are mirrored at their borders; for an even `size` the lower median of the window is used,
    which extends further up and left.
    """
    before, after = size // 2, (size - 1) // 2
    padded = F.pad(x, (before, after, before, after), mode="reflect")
    windows = padded.unfold(2, size, 1).unfold(3, size, 1)
    medians: Inputs = windows.flatten(4).median(dim=4).values
    return medians
