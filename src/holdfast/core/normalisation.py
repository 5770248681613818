"""Normalisation of inputs by channel, `(x - mean) / std`, and its inverse."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.core.errors import TargetError


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation of the normalisation `(x - mean) / std`, with one number for each channel (or feature
    of a table), or one for all.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def done(self, x: Tensor) -> Tensor:
        """Return the normalised inputs `(x - mean) / std`, computed in float64 and returned in the data type of `x`."""
        wide = x.double()
        mean, std = (torch.tensor(side, dtype=torch.float64) for side in (self.mean, self.std))
        return ((wide - per_channel(mean, wide)) / per_channel(std, wide)).to(x.dtype)

    def undone(self, x: Tensor) -> Tensor:
        """Return the original inputs `x * std + mean` of normalised inputs, computed in float64 and returned in the
        data type of `x`.
        """
        wide = x.double()
        mean, std = (torch.tensor(side, dtype=torch.float64) for side in (self.mean, self.std))
        return (wide * per_channel(std, wide) + per_channel(mean, wide)).to(x.dtype)

    def __str__(self) -> str:
        """Return the value as an argument of `--data-normalised`."""
        return "/".join(",".join(f"{number:g}" for number in side) for side in (self.mean, self.std))


def per_channel(values: Sequence[float] | Tensor, x: Tensor) -> Tensor:
    """Return one value for all channels, or one for each, as a tensor that broadcasts with inputs `x` whose channels
    come first or last.

    The channels are the first axis of an example if its length matches, else the last. Raises `TargetError` if neither
    matches.
    """
    numbers = torch.as_tensor(values).to(x.device, x.dtype)
    channels = x.shape[1] if x.dim() > 1 else 1
    if len(numbers) in (1, channels):
        return numbers.view(1, -1, *[1] * (x.dim() - 2))
    if x.dim() > 2 and len(numbers) == x.shape[-1]:
        return numbers
    raise TargetError(
        f"mean or std has {len(numbers)} entries, but the inputs have {channels} channels; give one number for "
        "each channel"
    )
