"""The function `holdfast.poison` and the command `holdfast data poison`, which plant manipulated examples in training
data.
"""

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from holdfast.audits.planting import POISONINGS, Planted, Poisoning, planted
from holdfast.core.errors import HoldfastError, UsageError
from holdfast.core.model import Bounds
from holdfast.core.names import parse_number
from holdfast.core.spelling import did_you_mean
from holdfast.io.data.arrays import Arrays, from_numpy
from holdfast.io.data.data import open_data
from holdfast.io.data.layouts import Expected, layout_of_images
from holdfast.io.data.loaders import as_array
from holdfast.io.data.trigger_files import write_trigger
from holdfast.io.files import replacing
from holdfast.reports.write import explained
from holdfast.settings.grammar import parse_pairs
from holdfast.settings.threats_and_attacks import setting
from holdfast.threats.triggers import Trigger

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
    expected = Expected(box, layout=layout_of_images(stored), lenient=True)
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
    expected = Expected(class_names=class_names, lenient=True)
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
