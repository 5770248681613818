"""The interface of stateless detectors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from holdfast.core.types import Inputs, Labels, Logits, PerExample

Need = Literal["network", "features", "fit"]
"""what a detector needs besides inputs and logits: calls of the network, features, or parameters that are fitted"""


@dataclass(frozen=True)
class Observation:
    """Inputs of a classifier with its outputs, as detectors receive them."""

    x: Inputs
    """inputs (n, *features) of the network"""
    logits: Logits
    """outputs of the network (n, classes); log probabilities are logits too"""
    features: Tensor | None = None
    """activations of an inner layer (n, d), for detectors that need them"""
    network: Callable[[Tensor], Tensor] | None = None
    """function from inputs to logits, for detectors that need further forward passes"""


class Detector(Protocol):
    """Protocol of a stateless detector: a frozen dataclass that maps inputs and outputs to one score for each input.

    Its fields are the settings of its rule in a guard.yaml, except those with the metadata `{"written": False}`: `low`
    and `high`, which the guard sets to the valid range of the inputs, and the parameters of a `Fitted` detector.
    """

    @property
    def needs(self) -> tuple[Need, ...]:
        """What the detector needs besides inputs and logits."""

    def __call__(self, seen: Observation) -> PerExample:
        """Return the scores (n,), larger for more suspicious inputs."""


@runtime_checkable
class Fitted(Protocol):
    """Protocol of a detector with parameters that are estimated from clean examples. They are float32 tensors in fields
    with the metadata `{"written": False}`, which a calibration stores.
    """

    @property
    def fitted(self) -> bool:
        """Whether the parameters have been estimated."""

    def fit(self, seen: Observation, y: Labels) -> "Fitted":
        """Return the detector with parameters that are estimated from clean examples with labels (n,)."""
