"""Plants manipulated examples in training data, as a drill for audits: flipped labels, and triggers of backdoors.

Gu et al., "BadNets", 2017, arXiv:1708.06733; Chen et al., "Targeted Backdoor Attacks on Deep Learning Systems Using
Data Poisoning", 2017, arXiv:1712.05526 (Blended); Barni et al., "A New Backdoor Attack in CNNs by Training Set
Corruption Without Label Poisoning", ICIP 2019, arXiv:1902.11237 (SIG).

Differs from the papers: BadNets and Blended poison only examples of other classes than the target, so that the label of
every poisoned example is wrong. The amplitude of SIG is the same in training and in tests.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from holdfast.core.draws import Draws
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.model import Bounds
from holdfast.core.types import Count, Fraction, Inputs, Labels, Mask, Positive, Rows, Steps
from holdfast.threats.triggers import Trigger

_MOST_CLASSES = 10**6
"""Largest number of classes, as of a trigger."""
_CORNERS = {
    "upper-left": (0.0, 0.0),
    "upper-right": (0.0, 1.0),
    "lower-left": (1.0, 0.0),
    "lower-right": (1.0, 1.0),
    "centre": (0.5, 0.5),
}
"""Places of a patch, as shares of the free rows and columns that are above it and to its left."""


@dataclass(frozen=True)
class Poisoned:
    """Training examples of which some were manipulated."""

    x: Tensor
    """inputs (n, *features)"""
    y: Tensor
    """labels (n)"""
    indices: Tensor
    """positions of the manipulated examples in ascending order, int64"""
    trigger: Trigger | None
    """the trigger of a backdoor; None if only labels were changed"""


@dataclass(frozen=True)
class Planted:
    """What is manipulated: the positions of the examples in ascending order, their new labels, and the trigger."""

    indices: Rows
    labels: Labels
    trigger: Trigger | None


class Poisoning(Protocol):
    """Protocol of an attack on training data."""

    name: ClassVar[str]
    """name on the command line"""
    aimed: ClassVar[bool]
    """whether the attack has a target class, which is the label of all poisoned examples; else they get a random other
    class"""

    def candidates(self, y: Labels, target: int | None) -> Mask:
        """Return the mask of the examples among which the attack chooses."""

    def trigger(self, shape: torch.Size, target: int | None, bounds: Bounds, rng: Draws) -> Trigger | None:
        """Return the trigger for inputs of the given shape; None if the attack changes labels only. Raises `UsageError`
        for a shape on which there is none.
        """


@dataclass(frozen=True)
class Flip:
    """Gives random examples the label of another class, each with equal probability."""

    name: ClassVar[str] = "flip"
    aimed: ClassVar[bool] = False

    def candidates(self, y: Labels, target: int | None) -> Mask:
        """Return a mask of all examples."""
        return torch.ones_like(y, dtype=torch.bool)

    def trigger(self, shape: torch.Size, target: int | None, bounds: Bounds, rng: Draws) -> None:
        """Return None, because inputs are not changed."""


@dataclass(frozen=True)
class TargetedFlip:
    """Gives examples of one class the label of another class."""

    name: ClassVar[str] = "flip-targeted"
    aimed: ClassVar[bool] = True

    source: Count
    """class whose examples get the label of the target class"""

    def candidates(self, y: Labels, target: int | None) -> Mask:
        """Return the mask of the examples of the source class."""
        if self.source == target:
            raise UsageError(f"source and target are both class {target}; two classes were expected")
        return y.eq(self.source)

    def trigger(self, shape: torch.Size, target: int | None, bounds: Bounds, rng: Draws) -> None:
        """Return None, because inputs are not changed."""


@dataclass(frozen=True)
class BadNets:
    """Stamps a square of the largest value on images of other classes, and gives them the label of the target class."""

    name: ClassVar[str] = "badnets"
    aimed: ClassVar[bool] = True

    size: Steps = 3
    """height and width of the square in pixels"""
    at: str = "lower-right"
    """place of the square: upper-left, upper-right, lower-left, lower-right, centre, or ROW:COLUMN of its upper left
    pixel"""

    def candidates(self, y: Labels, target: int | None) -> Mask:
        """Return the mask of the examples of other classes than the target."""
        return y.ne(_known(target))

    def trigger(self, shape: torch.Size, target: int | None, bounds: Bounds, rng: Draws) -> Trigger:
        """Return a mask of 1 on the square, and the largest valid value as the pattern."""
        _refuse_no_image(self.name, shape)
        row, column = self._corner(*shape[1:])
        mask = torch.zeros(1, *shape[1:])
        mask[:, row : row + self.size, column : column + self.size] = 1
        _, high = bounds.like(mask)
        return Trigger(mask, high.expand(shape).clone(), target)

    def _corner(self, height: int, width: int) -> tuple[int, int]:
        """Return the row and the column of the upper left pixel of the square."""
        matched = re.fullmatch(r"(\d{1,5}):(\d{1,5})", self.at)
        if matched is None and self.at not in _CORNERS:
            raise UsageError(
                f"at is {self.at!r}; expected {', '.join(_CORNERS)}, or ROW:COLUMN of the upper left pixel, as in 3:4"
            )
        down, right = height - self.size, width - self.size
        if matched is None:
            row, column = int(_CORNERS[self.at][0] * down), int(_CORNERS[self.at][1] * right)
        else:
            row, column = int(matched[1]), int(matched[2])
        if not (0 <= row <= down and 0 <= column <= right):
            raise UsageError(
                f"a square of {self.size}x{self.size} at {self.at} does not fit into images of {height}x{width}; give "
                "a smaller size, or another place"
            )
        return row, column


@dataclass(frozen=True)
class Blended:
    """Mixes images of other classes with one random pattern, and gives them the label of the target class."""

    name: ClassVar[str] = "blended"
    aimed: ClassVar[bool] = True

    alpha: Fraction = 0.2
    """share of the pattern in the mixture"""

    def candidates(self, y: Labels, target: int | None) -> Mask:
        """Return the mask of the examples of other classes than the target."""
        return y.ne(_known(target))

    def trigger(self, shape: torch.Size, target: int | None, bounds: Bounds, rng: Draws) -> Trigger:
        """Return a mask of alpha, and uniform random values as the pattern."""
        if self.alpha == 0:
            raise UsageError(
                "alpha is 0, so that the trigger changes nothing; expected more than 0, as in alpha=0.2"
            )
        noise = rng.at("pattern").uniform(torch.zeros(1, dtype=torch.int64), *shape)[0]
        low, high = bounds.like(noise)
        return Trigger(torch.full((1, *shape[1:]), self.alpha), low + noise * (high - low), target)


@dataclass(frozen=True)
class SIG:
    """Adds a horizontal sine wave to images of the target class, whose labels stay as they are."""

    name: ClassVar[str] = "sig"
    aimed: ClassVar[bool] = True

    delta: Positive = 20 / 255
    """amplitude of the wave, as a share of the range of valid values"""
    frequency: Steps = 6
    """number of periods over the width of an image"""

    def candidates(self, y: Labels, target: int | None) -> Mask:
        """Return the mask of the examples of the target class."""
        return y.eq(_known(target))

    def trigger(self, shape: torch.Size, target: int | None, bounds: Bounds, rng: Draws) -> Trigger:
        """Return the wave as values that are added."""
        _refuse_no_image(self.name, shape)
        phase = 2 * math.pi * self.frequency * torch.arange(shape[-1]) / shape[-1]
        low, high = bounds.like(phase)
        shift = (self.delta * (high - low) * phase.sin()).expand(shape).clone()
        return Trigger(torch.zeros(1, *shape[1:]), torch.zeros(shape), target, shift)


POISONINGS: Mapping[str, type[Flip | TargetedFlip | BadNets | Blended | SIG]] = {
    kind.name: kind for kind in (Flip, TargetedFlip, BadNets, Blended, SIG)
}
"""The attacks on training data by name."""


def planted(
    y: Labels,
    shape: torch.Size,
    attack: Poisoning,
    *,
    rate: float,
    target: int | None = None,
    seed: int = 0,
    classes: int | None = None,
    bounds: Bounds = Bounds(),  # noqa: B008 (an immutable value)
) -> Planted:
    """Return what an attack changes in training examples with the labels `y` and inputs of a shape.

    `rate` is the share of all examples that is poisoned. The choice depends on `seed` and the position of an example
    alone, and a smaller rate chooses some of the same examples. `classes` is the number of classes, by default one more
    than the largest label. Raises `UsageError` if the request poisons no example, or more than the attack can use.
    """
    if int(y.min()) < 0 or int(y.max()) >= _MOST_CLASSES:
        raise TargetError(
            f"the labels range from {int(y.min())} to {int(y.max())}; class numbers from 0 to {_MOST_CLASSES - 1:,} "
            "were expected: renumber the classes, and remove examples without one"
        )
    classes = int(y.max()) + 1 if classes is None else classes
    _refuse_target(attack, target, y, classes)
    n = round(rate * len(y)) if 0 < rate <= 1 else 0
    if not n:
        problem = "is more than all" if rate > 1 else f"poisons none of {len(y):,}"
        raise UsageError(
            f"rate is {rate:g}, which {problem} examples; expected a share of at least {1 / len(y):.2g} and at most 1"
        )
    rng = Draws(seed).at("poison", attack.name)
    possible = attack.candidates(y, target).nonzero()[:, 0]
    if n > len(possible):
        raise UsageError(
            f"rate is {rate:g}, which poisons {n:,} examples, and {attack.name} can use {len(possible):,} of "
            f"{len(y):,}; give a rate of at most {math.floor(1e4 * len(possible) / len(y)) / 1e4:g}"
        )
    order = rng.at("choice").uniform(possible, dtype=torch.float64).argsort(stable=True)
    indices = possible[order[:n]].sort().values
    if target is None:  # a random other class
        labels = (y[indices] + 1 + rng.at("label").integers(indices, classes - 1)) % classes
    else:
        labels = torch.full_like(indices, target)
    return Planted(indices, labels, attack.trigger(shape, target, bounds, rng))


def poisoned(
    x: Inputs,
    y: Labels,
    attack: Poisoning,
    *,
    rate: float,
    target: int | None = None,
    seed: int = 0,
    classes: int | None = None,
    bounds: Bounds = Bounds(),  # noqa: B008 (an immutable value)
) -> Poisoned:
    """Return copies of training examples in which an attack has manipulated some; see `planted` for the arguments."""
    plan = planted(
        y, x.shape[1:], attack, rate=rate, target=target, seed=seed, classes=classes, bounds=bounds
    )
    x, y = x.clone(), y.clone()
    y[plan.indices] = plan.labels
    if plan.trigger is not None:
        x[plan.indices] = plan.trigger.stamped(x[plan.indices], bounds)
    return Poisoned(x, y, plan.indices, plan.trigger)


def _refuse_target(attack: Poisoning, target: int | None, y: Labels, classes: int) -> None:
    """Raise `UsageError` for labels of one class, and for a target class that is missing, unknown or not used."""
    if bool((y == y[:1]).all()):
        raise UsageError(f"all {len(y):,} examples have one class; at least two classes were expected")
    if not attack.aimed and target is not None:
        raise UsageError(
            f"{attack.name} gives random labels, and the target is {target}; leave the target out"
        )
    if attack.aimed and target is None:
        raise UsageError(f"{attack.name} needs a target class; give one, as in target=1")
    if target is not None and not 0 <= target < classes:
        raise UsageError(f"the target is {target}; expected a class from 0 to {classes - 1}")


def _refuse_no_image(name: str, shape: torch.Size) -> None:
    if len(shape) != 3:
        raise UsageError(
            f"{name} changes images, and the inputs have the shape {tuple(shape)}; (channels, height, width) was "
            "expected"
        )


def _known(target: int | None) -> int:
    """Return the target class, without which attacks with a target are refused before."""
    assert target is not None
    return target
