"""Detectors that need only outputs: energy of the logits, stability under noise, and feature squeezing."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Le
from torch import Tensor

from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.types import Count, Logits, PerExample, Positive, Steps
from holdfast.guard.detectors.mahalanobis import Need, Observation
from holdfast.guard.rules import median_filtered, with_bits


@dataclass(frozen=True)
class Energy:
    """The free energy `-T log(sum(exp(logits / T)))` of an input. It needs no further forward pass.

    Logits that are log probabilities have the energy 0 at temperature 1, so that nothing is detected.
    """

    temperature: Positive = 1.0
    """temperature T"""

    needs: ClassVar[tuple[Need, ...]] = ()

    def __call__(self, seen: Observation) -> torch.Tensor:
        """Return the energy (n,) of each input."""
        return -self.temperature * (seen.logits / self.temperature).logsumexp(1)


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


@dataclass(frozen=True)
class NoiseStability:
    """The mean L1 distance between the probabilities for an input and for noisy versions of it, from 0 to 2. It costs
    `draws` forward passes.
    """

    sigma: Positive = 0.05
    """standard deviation of the Gaussian noise, in the units of the inputs"""
    draws: Steps = 4
    """number of noisy versions of each input"""
    seed: Count = 0
    """seed of the noise. An attacker that does not know it knows less about the detector"""

    needs: ClassVar[tuple[Need, ...]] = ("network",)

    def __call__(self, seen: Observation) -> PerExample:
        """Return the mean distances (n,)."""
        network = network_of(seen, "the stability under noise")
        noise = _noise(self.seed, self.draws, tuple(seen.x.shape[1:])).to(seen.x)
        # weights of the gradient at which attacks on the bundled model reached the lowest scores
        changes = [
            prediction_change(seen.logits, network(seen.x + self.sigma * each), exact=1.0, certain=0.1)
            for each in noise
        ]
        return torch.stack(changes).mean(0)


@lru_cache(maxsize=8)
def _noise(seed: int, draws: int, shape: tuple[int, ...]) -> Tensor:
    return Draws(seed).at("stability").normal(torch.arange(draws), *shape)
