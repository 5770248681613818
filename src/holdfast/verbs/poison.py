"""The function `holdfast.poison` and the command `holdfast data poison`, which plant manipulated examples in a training
set for drills.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, get_type_hints

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from holdfast.core.draws import Draws
from holdfast.core.errors import HoldfastError, TargetError, UsageError
from holdfast.core.model import Bounds
from holdfast.core.names import did_you_mean, parse_number
from holdfast.core.types import Count, Fraction, Inputs, Labels, Mask, Positive, Rows, Steps
from holdfast.io.data.arrays import Arrays, from_numpy
from holdfast.io.data.data import open_data
from holdfast.io.data.layouts import DeclaredData, layout_of_images
from holdfast.io.data.loaders import as_array
from holdfast.io.data.npz import write_trigger
from holdfast.io.files import replacing
from holdfast.reports.write import explained
from holdfast.settings.grammar import parse_pairs
from holdfast.threats.triggers import Trigger
from holdfast.verbs.opening.recipes import setting

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


Array = Tensor | NDArray[Any]
_ASKED = ("target", "rate")
_EXAMPLE = "badnets,target=1,rate=0.01"


@dataclass(frozen=True)
class PoisonedArrays:
    """Result of `holdfast.poison`."""

    x: Array
    """inputs, with the shape, the layout and the type that were given"""
    y: Array
    """labels"""
    indices: Array
    """positions of the manipulated examples in ascending order, int64"""
    trigger: Trigger | None
    """the trigger of a backdoor, for inputs with the channels first; None if only labels were changed"""


@dataclass(frozen=True)
class Drill:
    """Files that `holdfast data poison` wrote."""

    data: Path
    trigger: Path | None
    """file with the trigger; None if only labels were changed"""
    attack: str
    target: int | None
    poisoned: int
    """number of manipulated training examples"""
    train: int
    test: int


def poison(
    x: Array,
    y: Array,
    attack: str,
    *,
    rate: float,
    target: int | None = None,
    seed: int = 0,
    bounds: tuple[float, float] = (0.0, 1.0),
    **settings: Any,
) -> PoisonedArrays:
    """Return training data in which an attack has manipulated some examples, as a drill for audits. The data that are
    given are not changed.

    `attack` is `flip`, `flip-targeted`, `badnets`, `blended` or `sig`, and `settings` are its settings, such as
    `source` of `flip-targeted` and `size` of `badnets`. `rate` is the share of all examples that is poisoned, and
    `target` the class that the attacker wants, which `flip` does not have. Images are (n, height, width), or with
    channels first or last; bytes are from 0 to 255, and other values inside `bounds`. Raises `UsageError` if the
    request poisons no example, or more than the attack can use.
    """
    built = build_poisoning(attack, settings)
    stored, labels = as_array(x, "inputs"), as_array(y, "labels")
    target = None if target is None else setting(int, target, "target")
    rate, seed = setting(float, rate, "rate"), setting(int, seed, "seed")
    if len(stored) != len(labels):
        raise UsageError(
            f"there are {len(stored):,} inputs and {len(labels):,} labels; one label for each was expected"
        )
    box = Bounds(*bounds)
    expected = DeclaredData(box, layout=layout_of_images(stored), lenient=True)
    data = from_numpy("x", stored, labels, np.arange(len(stored)), expected)
    if labels.dtype.kind not in "iu" or (labels != data.y).any():
        raise UsageError(f"the labels are {labels.dtype}; class numbers from 0 were expected")
    plan = planted(
        torch.from_numpy(data.y),
        torch.Size(data.x.shape[1:]),
        built,
        rate=rate,
        target=target,
        seed=seed,
        bounds=box,
    )
    changed = data.reading.array(_stamped(data, plan, box), stored.ndim)
    new_x, new_y = stored.copy(), labels.copy()
    new_x[plan.indices.numpy()] = changed.astype(stored.dtype)
    new_y[plan.indices.numpy()] = plan.labels.numpy().astype(labels.dtype)
    indices = plan.indices.to(y.device) if isinstance(y, Tensor) else plan.indices.numpy()
    trigger = (
        None if plan.trigger is None else replace(plan.trigger, ends=(float(bounds[0]), float(bounds[1])))
    )
    return PoisonedArrays(_like(new_x, x), _like(new_y, y), indices, trigger)


def parse_poisoning(text: str) -> tuple[str, float, int | None, dict[str, str]]:
    """Return the name of an attack, its rate, its target and its settings, from a text such as
    `badnets,target=1,rate=0.01,size=4`.
    """
    name, *parts = re.split(r"[,\s]+", text.strip())
    pairs = parse_pairs(parts, f"the attack {text!r}")
    if "rate" not in pairs:
        raise UsageError(f"the attack {text!r} has no rate; expected the share of examples, as in {_EXAMPLE}")
    target = pairs.pop("target", None)
    if target is not None and not re.fullmatch(r"\d{1,9}", target):
        raise UsageError(f"the target is {target!r}; expected the number of a class, as in target=1")
    rate = parse_number(pairs.pop("rate"), "rate")
    return name, rate, None if target is None else int(target), pairs


def build_poisoning(name: str, settings: Mapping[str, Any]) -> Poisoning:
    """Return the attack on training data with a name and settings. Raises `UsageError` for unknown and missing ones."""
    if name not in POISONINGS:
        raise UsageError(f"there is no attack {name!r} on training data{did_you_mean(name, POISONINGS)}")
    cls = POISONINGS[name]
    hints, known = get_type_hints(cls, include_extras=True), [field.name for field in fields(cls)]
    for key in settings:
        if key not in known:
            raise UsageError(f"{name} has no setting {key!r}{did_you_mean(key, (*known, *_ASKED))}")
    missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in settings]
    if missing:
        raise UsageError(f"{name} needs {missing[0]}, as in {missing[0]}=7")
    return cls(**{key: setting(hints[key], value, f"{name}: {key}") for key, value in settings.items()})


def write_drill(address: str, attack: str, output: Path, *, seed: int = 0) -> Drill:
    """Poison the training split of a data set, and write it with the unchanged test split to an `.npz` file, and the
    trigger to another beside it.

    `attack` is a text for `parse_poisoning`. The arrays of the file are `x_train`, `y_train`, `x_test`, `y_test` and
    `poisoned`, the positions of the manipulated examples in the training split; images have their channels first.
    """
    name, rate, target, settings = parse_poisoning(attack)
    built = build_poisoning(name, settings)
    if output.suffix != ".npz" or output.name.endswith(".trigger.npz"):
        raise UsageError(f"-o is {str(output)!r}; expected an .npz file, as in -o drill.npz")
    trigger_file = output.with_suffix(".trigger.npz")
    with explained(output):
        for file in (output, trigger_file):
            if file.exists() and Path(address).exists() and file.samefile(address):
                raise UsageError(
                    f"-o is {str(output)!r}, and the file {str(file)!r} of the data would be overwritten; give another "
                    "name"
                )
    train = _opened(address, "train")
    test = _opened(address, "test", class_names=train.classes if train.text_labels else None)
    y, classes = torch.from_numpy(train.y), None if train.classes is None else len(train.classes)
    plan = planted(
        y, torch.Size(train.x.shape[1:]), built, rate=rate, target=target, seed=seed, classes=classes
    )
    x_train, y_train, rows = train.x.copy(), train.y.copy(), plan.indices.numpy()
    x_train[rows], y_train[rows] = _stamped(train, plan, Bounds()).astype(x_train.dtype), plan.labels.numpy()
    arrays = {"x_train": x_train, "y_train": y_train, "x_test": test.x, "y_test": test.y, "poisoned": rows}
    if train.classes is not None:
        arrays["classes"] = np.array(train.classes)
    with explained(output), replacing(output) as drill:
        np.savez(drill, allow_pickle=False, **arrays)
        if plan.trigger is not None:
            # before the data are complete, so that data without their trigger never appear
            write_trigger(trigger_file, replace(plan.trigger, ends=(0.0, 1.0)))
    written = None if plan.trigger is None else trigger_file
    return Drill(output, written, name, target, len(rows), len(y), len(test.y))


def _opened(address: str, split: str, class_names: tuple[str, ...] | None = None) -> Arrays:
    """Return a split of a data set in memory, with the channels of images first."""
    expected = DeclaredData(class_names=class_names, lenient=True)
    try:
        data = open_data(address, split=split, expected=expected)
    except HoldfastError as error:
        if not error.remedies:
            raise
        # the remedies are options that this command does not have
        raise type(error)(
            f"{error.message}; a drill needs an .npz file with x_train, y_train, x_test and y_test, or a name of the "
            "catalogue"
        ) from error
    if not isinstance(data, Arrays):
        raise UsageError(
            f"{address!r} is a folder of images; an .npz file or a name of the catalogue was expected"
        )
    if data.reading.stored != "asis" or data.x.ndim not in (3, 4):
        return data
    again = open_data(address, split=split, expected=replace(expected, layout=layout_of_images(data.x)))
    assert isinstance(again, Arrays)
    return again


def _stamped(data: Arrays, plan: Planted, bounds: Bounds) -> NDArray[Any]:
    """Return the stored values of the poisoned inputs, channels first; bytes are rounded."""
    rows = plan.indices.numpy()
    if plan.trigger is None:
        unchanged: NDArray[Any] = data.x[rows]
        return unchanged
    chosen = data.taken(rows.tolist()).read(0, len(rows)).x
    (low, high), (lowest, highest) = bounds.like(chosen), chosen.aminmax()
    if lowest < low or highest > high:
        raise UsageError(
            f"the inputs of {data.name} range from {lowest:.4g} to {highest:.4g}, outside the bounds {low:g} to "
            f"{high:g}; scale them, or in Python give bounds=({lowest:.4g}, {highest:.4g})"
        )
    stamped: NDArray[Any] = plan.trigger.stamped(chosen, bounds).numpy() * data.scale
    return stamped.round() if data.x.dtype.kind in "iu" else stamped


def _like(values: NDArray[Any], given: Array) -> Array:
    """Return an array as a tensor if `given` is one, with its device and type."""
    return torch.from_numpy(values).to(given) if isinstance(given, Tensor) else values
