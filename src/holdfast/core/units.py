"""Units in which the values of inputs are measured, one for each feature of a table."""

from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor

from holdfast.core.model import Bounds, Classifier
from holdfast.core.normalisation import Normalisation


@dataclass(frozen=True)
class Units:
    """Change of variables from the values of features to multiples of a unit above the lowest valid value.

    Inside a run, inputs are `(x - low) / size`, so that attacks, certificates and distances are in units. A feature
    whose unit has the size 0 has equal lowest and highest values, and does not change.
    """

    low: tuple[float, ...]
    """lowest valid value of each feature, or of all"""
    high: tuple[float, ...]
    """highest valid value of each feature, or of all"""
    size: tuple[float, ...]
    """size of the unit of each feature, or of all"""
    exact: bool
    """whether inputs are float64, so that the model gets exactly the values of the data, as thresholds of trees need"""
    text: str = field(default="", repr=False, compare=False)
    """the unit in the syntax of a threat, as in `range`"""

    @property
    def normalisation(self) -> Normalisation:
        """The change of variables as a normalisation of inputs in units, which the model applies."""
        sizes = self._sizes()
        mean = tuple(-low / size for low, size in zip(self.low, sizes, strict=True))
        return Normalisation(mean, tuple(1 / size for size in sizes))

    @property
    def bounds(self) -> Bounds:
        """Range of valid inputs in units."""
        sides = zip(self.low, self.high, self._sizes(), strict=True)
        widths = [(high - low) / size for low, high, size in sides]
        if len(set(widths)) == 1:
            return Bounds(0.0, widths[0])
        return Bounds(torch.zeros(len(widths)), torch.tensor(widths))

    @property
    def values(self) -> Bounds:
        """Range of valid values of the features."""
        if len(self.low) == 1:
            return Bounds(self.low[0], self.high[0])
        return Bounds(torch.tensor(self.low), torch.tensor(self.high))

    def _sizes(self) -> tuple[float, ...]:
        return tuple(size or 1.0 for size in self.size)

    def apply(self, model: Classifier) -> None:
        """Change a model of values to one of inputs in units. Its own normalisation is applied afterwards."""
        normalisation, dtype = self.normalisation, torch.float64
        mean, std = (torch.tensor(side, dtype=dtype) for side in (normalisation.mean, normalisation.std))
        own_mean = 0.0 if model.mean is None else model.mean.to(dtype)
        own_std = 1.0 if model.std is None else model.std.to(dtype)
        model.mean, model.std = mean + own_mean * std, own_std * std
        model.bounds, model.units = self.bounds, self

    def normalisation_of_values(self, model: Classifier) -> tuple[Tensor | None, Tensor | None]:
        """Return the mean and the standard deviation that a model of inputs in units applies to values; None for 0
        and 1.
        """
        assert model.mean is not None and model.std is not None
        sides, device = self.normalisation, model.mean.device
        mean, std = (
            torch.tensor(side, dtype=torch.float64, device=device) for side in (sides.mean, sides.std)
        )
        own_mean, own_std = ((model.mean - mean) / std).float(), (model.std / std).float()
        return (own_mean if own_mean.any() else None), (own_std if (own_std != 1).any() else None)

    def undo(self, model: Classifier) -> None:
        """Change a model of inputs in units to one of values: the inverse of `apply`."""
        model.mean, model.std = self.normalisation_of_values(model)
        model.bounds, model.units = self.values, None


def of_values(model: Classifier) -> Classifier:
    """Return the model of the values of features for a model whose inputs may be in units, which is not changed."""
    if model.units is None:
        return model
    copied = deepcopy(model)
    model.units.undo(copied)
    return copied
