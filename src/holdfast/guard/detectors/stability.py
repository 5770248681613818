"""Stability of the prediction under noise: adversarial inputs are often close to a decision boundary, so that small
noise changes the prediction.

Hu, Yu, Guo, Chao & Weinberger, "A new defense against adversarial images: turning a weakness into a strength",
NeurIPS 2019, arXiv:1910.07629, criterion C1.
Differs from the paper: its second criterion, the distance to the boundary along the gradient, needs gradients and is
left out. The noise is the same for all inputs, so that a score can be computed again and attacks can differentiate it.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.core.draws import Draws
from holdfast.core.types import Count, PerExample, Positive, Steps
from holdfast.guard.detectors.detector_protocol import Need, Observation
from holdfast.guard.detectors.squeezing import network_of, prediction_change


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
