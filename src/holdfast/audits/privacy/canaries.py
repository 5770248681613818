"""Canaries, guesses which of them were trained on, and lower bounds of epsilon from the guesses."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Bounds
from holdfast.core.types import Inputs, Labels, Mask, PerExample
from holdfast.statistics.intervals import CONFIDENCE, clopper_pearson

CanaryKind = Literal["mislabelled", "random"]
"""`mislabelled`: examples of the data with a wrong label. `random`: uniform noise with a random label"""


@dataclass(frozen=True)
class Canaries:
    """Canaries with what the seed decided about them, and the examples without them."""

    x: Inputs
    y: Labels
    """wrong or random labels"""
    included: Mask
    """whether the network is trained on a canary"""
    rest: Batch
    """examples on which the network is always trained"""

    @property
    def training(self) -> tuple[Tensor, Tensor]:
        """Inputs and labels of the training: the other examples, and the included canaries at the end."""
        x, y = self.x[self.included], self.y[self.included]
        return torch.cat((self.rest.x, x)), torch.cat((self.rest.y, y))


def planted(data: Batch, classes: int, bounds: Bounds, *, n: int, kind: CanaryKind, rng: Draws) -> Canaries:
    """Return `n` canaries, whose inclusion is decided by the seed.

    Mislabelled canaries are taken out of the data, so that they are in the training with the wrong label or not at all.
    """
    rows = torch.arange(n, device=data.ids.device)
    if kind == "mislabelled":
        order = rng.at("canaries").bits(data.ids).argsort()
        source, rest = data.take(order[:n]), data.take(order[n:].sort().values)
        x, shift = source.x, 1 + rng.at("labels").integers(rows, classes - 1)
        y = (source.y + shift) % classes
    else:
        low, high = bounds.like(data.x)
        noise = rng.at("inputs").uniform(rows, *data.example_shape).to(data.x.dtype)
        x, rest = low + (high - low) * noise, data
        y = rng.at("labels").integers(rows, classes)
    included = rng.at("included").bits(rows) < 0
    return Canaries(x, y, included, rest)


def right_guesses(losses: PerExample, included: Mask, guesses: int) -> int:
    """Return how many of `guesses` guesses are right: one half, rounded down, guesses that the canaries with the
    smallest losses were included, and the rest that those with the largest losses were not.

    The number of guesses is fixed before the losses are known, as the bound requires. Equal losses are ordered by the
    position, which does not depend on the inclusion.
    """
    order = losses.double().argsort(stable=True)
    yes = guesses // 2
    no = guesses - yes
    return int(included[order[:yes]].sum() + (~included[order[len(order) - no :]]).sum())


_LARGEST = 60.0
"""an epsilon that no number of guesses can show; at it, a guess of randomised response is right in float64"""
_HALVINGS = 60
"""bisection steps, after which the interval is smaller than the precision of float64"""


def p_value(right: int, guesses: int, epsilon: float, delta: float = 0.0, canaries: int = 0) -> float:
    """Return the largest probability of at least `right` of `guesses` right guesses under (epsilon, delta)-differential
    privacy.

    `canaries` is the number of canaries about which a guess could be made; 0 for as many as guesses. It matters only
    if delta is not 0.
    """
    from scipy.stats import binom

    chance = 1 / (1 + math.exp(-epsilon))
    tail = float(binom.sf(right - 1, guesses, chance))
    if not delta or not right:
        return min(tail, 1.0)
    below = np.cumsum(binom.pmf(np.arange(right - 1, -1, -1), guesses, chance))
    steepest = float((below / np.arange(1, right + 1)).max())
    return min(tail + 2 * (canaries or guesses) * delta * steepest, 1.0)


def epsilon_from_guesses(
    right: int, guesses: int, *, delta: float = 0.0, canaries: int = 0, confidence: float = CONFIDENCE
) -> float:
    """Return the lower bound of epsilon from `right` of `guesses` right guesses in one training; 0 if none is shown.

    `canaries` is as in `p_value`. With probability `confidence` the bound does not exceed the true epsilon.

    >>> round(epsilon_from_guesses(100, 100), 2), round(epsilon_from_guesses(600, 1000), 3)
    (3.49, 0.297)
    """
    if not 0 <= right <= guesses:
        raise UsageError(f"right is {right}; expected a number from 0 to guesses={guesses}")
    low, high = 0.0, _LARGEST
    if p_value(right, guesses, low, delta, canaries) > 1 - confidence:
        return 0.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if p_value(right, guesses, middle, delta, canaries) > 1 - confidence:
            high = middle
        else:
            low = middle
    return low


def epsilon_from_rates(
    hits: int, members: int, alarms: int, others: int, *, delta: float = 0.0, confidence: float = CONFIDENCE
) -> float:
    """Return the lower bound of epsilon from independent trainings; 0 if none is shown.

    An attack says "member" in `hits` of `members` trainings with the example, and in `alarms` of `others` trainings
    without it. Its threshold must have been fixed on other trainings. Both rates have Clopper-Pearson bounds, which
    together hold with probability `confidence`. The complement of the attack is used if its bound is larger.
    """
    hit_rate = clopper_pearson(hits, members, confidence)
    alarm_rate = clopper_pearson(alarms, others, confidence)
    ratios = ((hit_rate[0] - delta, alarm_rate[1]), (1 - alarm_rate[1] - delta, 1 - hit_rate[0]))
    return max(0.0, *(math.log(top / bottom) if top > 0 else 0.0 for top, bottom in ratios))
