"""Random and scaled views of inputs for surrogate models, which make adversarial examples transfer better.

They apply to images (n, channels, height, width); other inputs are unchanged.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from holdfast.core.draws import Draws
from holdfast.core.model import Bounds, Model
from holdfast.core.types import Ids, Inputs, Logits

_IMAGE = 4
SHRUNK = 0.9
"""smallest size of a resized image, as a fraction of its original size"""
_SIGMAS = 3.0
"""Extent of the kernel to each side in standard deviations, as in Dong et al. 2019."""


def resized(x: Inputs, ids: Ids, bounds: Bounds, chance: float, rng: Draws) -> Inputs:
    """Shrink each image with probability `chance` and place it at random on an empty background; differentiable.

    Xie et al., "Improving Transferability of Adversarial Examples with Input Diversity", CVPR 2019, arXiv:1803.06978.
    Differs from the paper: every image has its own random numbers, and sizes and places are not whole pixels.
    """
    if not chance or x.dim() != _IMAGE or not len(x):
        return x
    chosen, size, across, down = rng.uniform(ids, 4, dtype=x.dtype).unbind(1)
    size = torch.where(chosen < chance, 1 - (1 - SHRUNK) * size, 1.0)
    zero = torch.zeros_like(size)
    at = ((2 * place - 1) * (1 - size) / size for place in (across, down))
    scaled = 1 / size
    rows = [torch.stack(row, 1) for row in zip((scaled, zero), (zero, scaled), at, strict=True)]
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    low, _ = bounds.like(x)
    smaller: Inputs = F.grid_sample(x - low, grid, align_corners=False)
    return low + smaller


def shifted(gradient: Inputs, reach: int) -> Inputs:
    """Return the gradient, blurred by a Gaussian: the weighted mean of the gradients of images shifted by up to
    `reach`.

    Dong et al., "Evading Defenses to Transferable Adversarial Examples by Translation-Invariant Attacks", CVPR 2019,
    arXiv:1904.02884: a Gaussian kernel, applied along both axes in turn.
    """
    if not reach or gradient.dim() != _IMAGE:
        return gradient
    steps = torch.linspace(-_SIGMAS, _SIGMAS, 2 * reach + 1, dtype=gradient.dtype, device=gradient.device)
    weight = torch.exp(-(steps**2) / 2)
    weight = (weight / weight.sum()).repeat(gradient.shape[1], 1, 1, 1)
    down = F.conv2d(gradient, weight.mT, padding=(reach, 0), groups=gradient.shape[1])
    return F.conv2d(down, weight, padding=(0, reach), groups=gradient.shape[1])


def halved_view(x: Inputs, times: int, bounds: Bounds) -> Inputs:
    """Return the input with its distance from the lower bound of the box halved `times` times.

    Lin et al., "Nesterov Accelerated Gradient and Scale Invariance for Adversarial Attacks", ICLR 2020,
    arXiv:1908.06281.
    """
    if not times:
        return x
    low, _ = bounds.like(x)
    view: Inputs = low + (x - low) / 2**times
    return view


@dataclass(frozen=True)
class Viewed:
    """A model whose inputs are darkened by `halved_view` and, with probability `chance`, resized by `resized`."""

    model: Model
    chance: float
    halvings: int
    rng: Draws

    @property
    def bounds(self) -> Bounds:
        """Bounds of the inputs of the model."""
        return self.model.bounds

    def __call__(self, x: Inputs, ids: Ids | None = None) -> Logits:
        """Return the logits of the transformed inputs; the random numbers depend on `ids`."""
        assert ids is not None
        view = halved_view(x, self.halvings, self.bounds)
        return self.model(resized(view, ids, self.bounds, self.chance, self.rng), ids)
