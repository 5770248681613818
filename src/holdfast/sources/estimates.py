"""Estimates the range and the normalisation of a data set from its values alone, for advice in error messages.

The results may differ from the values that were used in the training.
"""

from torch import Tensor

from holdfast.core.normalisation import Normalisation

NORMALISATIONS = {
    "MNIST's": ((0.1307,), (0.3081,)),
    "CIFAR-10's": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "ImageNet's": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "the half-half": ((0.5,), (0.5,)),
}
"""Common means and standard deviations, by data set."""
_FEWEST_LEVELS = 2  # a smaller largest value is more likely an outlier of values in [0, 1]
_NEAR_255 = 128  # bytes of real images are rarely all in the lower half of their range


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


def scaling(x: Tensor) -> str:
    """Return advice for an error message about inputs outside the bounds. It marks numbers that are derived from the
    data alone as estimates.
    """
    low, high = float(x.min()), float(x.max())
    advice = as_in_training(low, high, x.dim())
    estimates = [
        f"{name} values, {Normalisation(mean, std)}, would undo it"
        for name, (mean, std) in NORMALISATIONS.items()
        if len(mean) in (1, x.shape[1]) and _are_pixels(Normalisation(mean, std).undone(x))
    ]
    guess = f" (an estimate: {'; '.join(estimates)})" if estimates else ""
    return (
        f"{advice}; if they were normalised before, give --data-normalised MEAN/STD with the values of your training"
        f"{guess}, and eps stays in pixels; else --bounds LOW,HIGH, as {low:.6g},{high:.6g} (an "
        f"estimate from {len(x)} examples; use the limits of your training), and eps is in the units of the data"
    )


def _are_pixels(x: Tensor) -> bool:
    """Return whether the values lie in [0, 1] and cover most of it."""
    low, high = float(x.min()), float(x.max())
    return -1e-3 <= low <= 0.05 and 0.95 <= high <= 1 + 1e-3
