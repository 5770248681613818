"""Estimates the range and the normalisation of a data set from its values alone, for advice in error messages.

The results may differ from the values that were used in the training.
"""

import math
from collections.abc import Callable

from torch import Tensor

from holdfast.core.model import Bounds
from holdfast.core.normalisation import Normalisation
from holdfast.core.remedies import Placeholder, Remedy

NORMALISATIONS = {
    "MNIST's": ((0.1307,), (0.3081,)),
    "CIFAR-10's": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "ImageNet's": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "the half-half": ((0.5,), (0.5,)),
}
"""Common means and standard deviations, by data set."""
BYTES = Remedy(
    "bounds", (0, 255), reason="if the model was trained on values from 0 to 255 (eps is then on that scale)"
)
"""bounds of a model whose inputs are bytes"""
_ROUNDING = 1e-6  # share of the range that a value may be outside the bounds, as float32 rounds
_FEWEST_LEVELS = 2  # a smaller largest value is more likely an outlier of values in [0, 1]
_NEAR_255 = 128  # bytes of real images are rarely all in the lower half of their range


def outside(x: Tensor, bounds: Bounds) -> Tensor:
    """Return the mask of the values of `x` that are outside the bounds by more than rounding."""
    low, high = bounds.like(x)
    slack = _ROUNDING * (high - low)
    return (x < low - slack) | (x > high + slack)


def pixel_divisor(lowest: float, highest: float, dims: int) -> float | None:
    """Return the divisor that scales pixel values to [0, 1], or None if the values are probably not pixels.

    `lowest` and `highest` are the extreme values of an array with `dims` axes. If the largest value is between 128 and
    255, the divisor is 255; otherwise it is the largest value. Values of a table, which has two axes, are pixels only
    if the largest is exactly 255.
    """
    if lowest < 0 or highest < _FEWEST_LEVELS or (dims <= 2 and highest != 255):
        return None
    return 255.0 if _NEAR_255 < highest <= 255 else highest


def as_in_training(lowest: float, highest: float, dims: int) -> str:
    """Return advice for an error message to scale the inputs as in training, with an example if the values may be
    pixels.
    """
    divisor = pixel_divisor(lowest, highest, dims)
    example = "" if divisor is None else f", as in x / {divisor:g} for values from 0 to {divisor:g}"
    return f"scale {'the features' if dims == 2 else 'them'} as in training{example}"


def before_normalisation(mean_std: str = "") -> Remedy:
    """Return the declaration that data were normalised, with an example of its value."""
    reason = "with the values of your training, if they were normalised before"
    return Remedy(
        "data_normalised",
        Placeholder("MEAN/STD", "(mean, std)"),
        reason=f"{reason}{mean_std} (eps is then in the units before the normalisation)",
    )


def range_of_training(low: float, high: float, whence: str = "the range of these inputs") -> Remedy:
    """Return the bounds that contain the data, which are an estimate of the range on which the model was trained."""
    return Remedy(
        "bounds",
        (_rounded(low, math.floor), _rounded(high, math.ceil)),
        reason=f"({whence}; use the limits of your training; eps is then in the units of the data)",
    )


def _rounded(number: float, towards: Callable[[float], int]) -> float:
    """Return a number with about six digits, which is rounded by `towards` so that the bounds contain it. An integer
    remains one.
    """
    if not number:
        return 0
    digits = 5 - math.floor(math.log10(abs(number)))
    scale: float = 10.0 ** abs(digits)
    rounded = towards(number * scale) / scale if digits > 0 else towards(number / scale) * scale
    return int(rounded) if rounded.is_integer() else rounded


def extremes(x: Tensor) -> tuple[float, float]:
    """Return the smallest and the largest value that is present; NaN is a missing value. Both are 0 if all are missing.

    >>> import torch
    >>> extremes(torch.tensor([2.0, torch.nan, 1.0])), extremes(torch.tensor([torch.nan]))
    ((1.0, 2.0), (0.0, 0.0))
    """
    present = x[~x.isnan()]
    return (float(present.min()), float(present.max())) if len(present) else (0.0, 0.0)


def scaling(x: Tensor) -> tuple[str, tuple[Remedy, ...]]:
    """Return advice and remedies for inputs outside the bounds. They mark numbers that are derived from the data alone
    as estimates.
    """
    low, high = extremes(x)
    advice = as_in_training(low, high, x.dim())
    estimates = [
        f"{name} values, {Normalisation(mean, std)}, would undo it"
        for name, (mean, std) in NORMALISATIONS.items()
        if len(mean) in (1, x.shape[1]) and _are_pixels(Normalisation(mean, std).undone(x))
    ]
    guess = f" (an estimate: {'; '.join(estimates)})" if estimates else ""
    whence = f"an estimate from {len(x)} examples"
    return advice, (before_normalisation(guess), range_of_training(low, high, whence))


def _are_pixels(x: Tensor) -> bool:
    """Return whether the values lie in [0, 1] and cover most of it."""
    low, high = extremes(x)
    return -1e-3 <= low <= 0.05 and 0.95 <= high <= 1 + 1e-3
