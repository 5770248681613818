"""Feature squeezing: the prediction for an adversarial input changes more if the input is squeezed.

Xu, Evans & Qi, "Feature squeezing: detecting adversarial examples in deep neural networks", NDSS 2018,
arXiv:1704.01155.
Differs from the paper: there is no smoothing by non-local means.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Le
from torch import Tensor

from holdfast.core.errors import UsageError
from holdfast.core.types import Count, Logits, PerExample
from holdfast.guard.detectors.detector_protocol import Need, Observation
from holdfast.guard.squeezes import median_filtered, with_bits


@dataclass(frozen=True)
class FeatureSqueezing:
    """The largest L1 distance between the probabilities for an input and for its squeezed versions, from 0 to 2. It
    costs one forward pass for each squeeze.
    """

    bits: Annotated[Count, Le(16)] = 5
    """number of bits of each value; 0 leaves this squeeze out. The paper uses 1 for MNIST and 4 or 5 for CIFAR-10"""
    median: Annotated[Count, Le(15)] = 2
    """side of the window of the median filter in pixels; 0 leaves this squeeze out, which inputs that are not images
    need"""
    low: float = field(default=0.0, metadata={"written": False})
    """lowest valid value of the inputs"""
    high: float = field(default=1.0, metadata={"written": False})
    """highest valid value of the inputs"""

    needs: ClassVar[tuple[Need, ...]] = ("network",)

    def __post_init__(self) -> None:
        if not self.bits and not self.median:
            raise UsageError("bits and median are both 0; feature squeezing needs at least one of them")

    def __call__(self, seen: Observation) -> PerExample:
        """Return the distances (n,)."""
        network = network_of(seen, "feature squeezing")
        return torch.stack([prediction_change(seen.logits, network(x)) for x in self._squeezed(seen.x)]).amax(
            0
        )

    def _squeezed(self, x: Tensor) -> Iterator[Tensor]:
        if self.bits:
            yield with_bits(x, self.bits, self.low, self.high)
        if self.median:
            yield median_filtered(x, self.median)


def prediction_change(
    logits: Logits, other: Logits, *, exact: float = 0.0, certain: float = 1.0
) -> PerExample:
    """Return the L1 distance (n,) between the probabilities of two outputs (n, classes), from 0 to 2.

    The gradient of the distance vanishes where both outputs are certain of different classes, so that attacks could not
    reduce it. The gradient of the result is therefore `exact` times that of the distance plus `certain` times that of
    the cross-entropies of both outputs with the class that `logits` predict.
    """
    distance = (other.softmax(1) - logits.softmax(1)).abs().sum(1)
    if not (logits.requires_grad or other.requires_grad):
        return distance
    predicted = logits.detach().argmax(1)
    uncertain = sum(F.cross_entropy(each, predicted, reduction="none") for each in (logits, other))
    slope = exact * distance + certain * uncertain
    return distance.detach() + (slope - slope.detach())


def network_of(seen: Observation, detector: str) -> Callable[[Tensor], Tensor]:
    """Return the network of an observation. Raises `UsageError` if there is none."""
    if seen.network is None:
        raise UsageError(
            f"{detector} calls the network on changed inputs, and no network was given; give it, as in "
            "guard.after(decision, outputs, network=net), or remove the rule"
        )
    return seen.network
