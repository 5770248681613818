"""Common corruptions: effects of weather, lenses and file formats on images, at five severities.

Hendrycks & Dietterich, "Benchmarking neural network robustness to common corruptions and perturbations", ICLR 2019,
arXiv:1903.12261, and the code published with it. Differs from the published code: images are not rounded to 256 levels
afterwards (except for JPEG); frost is generated and not cropped from photographs; images can have any size and one
channel, in which case colours are omitted.
"""

from collections.abc import Callable, Mapping
from typing import Final

import torch

from holdfast.core.draws import Draws
from holdfast.core.model import Bounds
from holdfast.core.types import Ids, Inputs
from holdfast.corruptions.constants import LARGE, LARGE_FROM, SMALL, Constants
from holdfast.corruptions.images import (
    brightness,
    contrast,
    defocus_blur,
    elastic_transform,
    fog,
    frost,
    gaussian_blur,
    gaussian_noise,
    glass_blur,
    impulse_noise,
    jpeg_compression,
    motion_blur,
    pixelate,
    saturate,
    shot_noise,
    snow,
    spatter,
    speckle_noise,
    zoom_blur,
)
from holdfast.threats.domains import refuse_no_images

Operator = Callable[[Inputs, Constants, Ids, Draws], Inputs]
"""function that returns corrupted images in [0, 1] from images in [0, 1], the constants of a severity, ids and random
numbers"""

STANDARD: Final[Mapping[str, Operator]] = {
    "gaussian_noise": gaussian_noise,
    "shot_noise": shot_noise,
    "impulse_noise": impulse_noise,
    "defocus_blur": defocus_blur,
    "glass_blur": glass_blur,
    "motion_blur": motion_blur,
    "zoom_blur": zoom_blur,
    "snow": snow,
    "frost": frost,
    "fog": fog,
    "brightness": brightness,
    "contrast": contrast,
    "elastic_transform": elastic_transform,
    "pixelate": pixelate,
    "jpeg_compression": jpeg_compression,
}
"""the fifteen corruptions of the mean corruption error, by name"""

EXTRA: Final[Mapping[str, Operator]] = {
    "speckle_noise": speckle_noise,
    "gaussian_blur": gaussian_blur,
    "spatter": spatter,
    "saturate": saturate,
}
"""four further corruptions, which are intended for validation, by name"""


def corrupted(
    name: str, x: Inputs, severity: int, ids: Ids, rng: Draws, bounds: Bounds | None = None
) -> Inputs:
    """Return the images `x` (n, 1 or 3, height, width) changed by the corruption called `name` at a severity from 1 to
    5. All values are valid inputs.

    The constants are those of CIFAR-10-C if the shorter side is at most 64 pixels, else those of ImageNet-C. Raises
    `UsageError` if inputs are not images.
    """
    refuse_no_images(x)
    if not len(x):
        return x.clone()
    low, high = (bounds or Bounds()).like(x)
    width = (high - low).clamp_min(torch.finfo(x.dtype).tiny)
    constants = (LARGE if min(x.shape[2:]) >= LARGE_FROM else SMALL)[name][severity - 1]
    operator = (STANDARD if name in STANDARD else EXTRA)[name]
    changed = operator(((x - low) / width).clamp(0, 1), constants, ids, rng.at("corruption", name))
    return (low + width * changed).clamp(low, high)
