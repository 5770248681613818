"""Threats to a training: triggers of a backdoor, and changes of the training set."""

import base64
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from holdfast.core.errors import Remedy, UsageError
from holdfast.core.model import Bounds
from holdfast.core.types import Inputs, PerExample
from holdfast.threats.transformations import Whole


@dataclass(frozen=True)
class TrainingSet(Whole):
    """Constraint of additions and removals of training examples. Their largest number is `eps`.

    A replaced example counts twice: one is removed and one is added. The inputs of the model do not change, so no
    attack applies.
    """

    name: ClassVar[str] = "training-set"
    provers: ClassVar[tuple[str, ...]] = ("partitions",)
    changes_inputs: ClassVar[bool] = False
    measures_robustness: ClassVar[bool] = False

    changes: int

    @property
    def eps(self) -> float:
        """Largest number of training examples that are added or removed."""
        return float(self.changes)

    def distance(self, x_adv: Inputs, x: Inputs) -> PerExample:
        """Return 0 for each input that did not change, and infinity for any other."""
        changed = (x_adv != x).flatten(1).any(1)
        return x.new_zeros(len(x)).masked_fill(changed, float("inf"))

    def resized(self, eps: float) -> "TrainingSet":
        """Return the constraint of the number of changes that is nearest to `eps`."""
        return TrainingSet(round(eps))

    def refusal(self) -> UsageError:
        """Return the error for an attack, which changes inputs."""
        return UsageError(
            f"the threat {self} changes the training set and no input, so that no attack applies",
            Remedy("threat", "linf:8/255"),
        )


_ROUNDING = 1e-3
"""Largest difference from the stamped input, as a share of the largest value of an input: the rounding of half
precision, and less than a quarter of the step between two of 256 levels of grey."""


@dataclass(frozen=True)
class Trigger:
    """A change that is the same for every input: `x' = clamp((1 - mask) x + mask · pattern + shift)`."""

    mask: Tensor
    """share of each value that the pattern replaces, from 0 to 1, with the shape of an input; a first axis of size 1 is
    broadcast over channels"""
    pattern: Tensor
    """values that replace those of the input, with the shape of an input"""
    target: int | None = None
    """class that the attacker wants; None if it is unknown"""
    shift: Tensor | None = None
    """values that are added, with the shape of an input; None for none"""
    ends: tuple[float, float] | None = None
    """lowest and highest valid value in the units of the trigger; None if they are unknown"""

    def within(self, bounds: Bounds) -> "Trigger":
        """Return the trigger in the units of a model whose inputs are within `bounds`.

        It does not change if the units of the trigger are unknown, or if features have bounds of their own. Raises
        `UsageError` for a pattern of unknown units with values outside the bounds.
        """
        if isinstance(bounds.low, Tensor) or isinstance(bounds.high, Tensor):
            return self
        replaced = self.pattern[self.mask.expand_as(self.pattern) > 0]
        if self.ends is None:
            if len(replaced) and (replaced.min() < bounds.low or replaced.max() > bounds.high):
                raise UsageError(
                    f"the trigger has values from {float(replaced.min()):.4g} to {float(replaced.max()):.4g}, and the "
                    f"model takes values from {bounds.low:g} to {bounds.high:g}; add the lowest and the highest valid "
                    "value of the trigger to its file, as the arrays low and high"
                )
            return self
        low, high = self.ends
        if self.ends == (bounds.low, bounds.high):
            return self
        scale = (bounds.high - bounds.low) / (high - low)
        pattern = bounds.low + (self.pattern - low) * scale
        shift = None if self.shift is None else self.shift * scale
        return Trigger(self.mask, pattern, self.target, shift, (bounds.low, bounds.high))

    def stamped(self, x: Inputs, bounds: Bounds) -> Inputs:
        """Return inputs (n, *shape) with the trigger, in the units of `bounds`. Raises `UsageError` if the trigger has
        another shape.
        """
        return bounds.clamp(self.within(bounds).unlimited(x))

    def unlimited(self, x: Inputs) -> Inputs:
        """Return inputs (n, *shape) with the trigger, whose values may be invalid. Raises `UsageError` if the trigger
        has another shape.
        """
        if self.pattern.shape != x.shape[1:]:
            raise UsageError(
                f"the trigger has the shape {tuple(self.pattern.shape)}, and the inputs have {tuple(x.shape[1:])}; "
                "use a trigger of this data set"
            )
        mask, pattern = self.mask.to(x), self.pattern.to(x)
        stamped = x * (1 - mask) + mask * pattern
        return stamped if self.shift is None else stamped + self.shift.to(x)


@dataclass(frozen=True)
class Stamped(Whole):
    """Constraint that an input gets the trigger of a file, and that nothing else changes."""

    name: ClassVar[str] = "trigger"
    judges_misclassified: ClassVar[bool] = True
    measures_robustness: ClassVar[bool] = False

    file: str
    """file of the trigger, as it was given"""
    content: str = field(repr=False)
    """the trigger as JSON, from `trigger_text`"""

    def __post_init__(self) -> None:
        trigger_of(self.content)

    @property
    def limits(self) -> Mapping[str, float | str]:
        """The file and the trigger in it."""
        return {"file": self.file, "content": self.content}

    @property
    def trigger(self) -> Trigger:
        """The trigger."""
        return trigger_of(self.content)

    @property
    def goal(self) -> int | None:
        """Class that the attacker wants; None if it is unknown."""
        return self.trigger.target

    def in_bounds(self, bounds: Bounds) -> "Stamped":
        """Return the constraint with the trigger in the units of a model whose inputs are within `bounds`."""
        return Stamped(self.file, trigger_text(self.trigger.within(bounds)))

    def notes(self, bounds: Bounds) -> tuple[str, ...]:
        """Return a note on a trigger whose file does not state the valid range of its values."""
        trigger = self.trigger
        values = trigger.pattern[trigger.mask.expand_as(trigger.pattern) > 0]
        by_feature = isinstance(bounds.low, Tensor) or isinstance(bounds.high, Tensor)
        if trigger.ends is not None or not len(values) or by_feature or bounds == Bounds():
            return ()
        note = (
            "the file of the trigger does not state the valid range of its values, which are from "
            f"{float(values.min()):.4g} to {float(values.max()):.4g}; they are taken in the units of the model"
        )
        return (note,)

    def distance(self, x_adv: Inputs, x: Inputs) -> PerExample:
        """Return for each example 0 if nothing changed, 1 if it is the input with the trigger, else infinity.

        A value that the trigger moves out of the valid range is allowed at the end of the range. This is not known
        here, but it is at least as large as every value of the feature in the batch. Raises `UsageError` if the trigger
        has another shape than the inputs.
        """
        stamped, missing = self.trigger.unlimited(x), x.isnan()
        slack = _ROUNDING * x.nan_to_num().abs().amax().clamp_min(1)
        high = torch.maximum(x, x_adv).masked_fill(missing, -torch.inf).amax(0) - slack
        low = torch.minimum(x, x_adv).masked_fill(missing, torch.inf).amin(0) + slack
        at_end = ((stamped > x_adv) & (x_adv >= high)) | ((stamped < x_adv) & (x_adv <= low))
        inside = ((x_adv - stamped).abs() <= slack) | at_end | missing
        changed = ((x_adv != x) & ~missing).flatten(1).any(1)
        return torch.where(inside.flatten(1).all(1) | ~changed, changed.to(x), torch.inf)

    def resized(self, eps: float) -> "Stamped":
        """Return the constraint itself for any `eps`, because a trigger has no radius."""
        return self

    def refusal(self) -> UsageError:
        """Return the error for an attack that searches, because there is only one allowed change."""
        return UsageError(
            f"under {self} inputs get the trigger of the file, and nothing is searched",
            Remedy("suite", "fast"),
            Remedy("threat", "linf:8/255"),
        )


def trigger_text(trigger: Trigger) -> str:
    """Return a trigger as JSON text, with its values as compressed 32-bit floats."""
    arrays = {"mask": trigger.mask, "pattern": trigger.pattern, "shift": trigger.shift}
    content: dict[str, Any] = {"target": trigger.target}
    if trigger.ends is not None:
        content["ends"] = list(trigger.ends)
    for name, values in arrays.items():
        if values is not None:
            packed = zlib.compress(values.detach().cpu().numpy().astype("<f4").tobytes())
            content[name] = {"shape": list(values.shape), "values": base64.b64encode(packed).decode("ascii")}
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


@lru_cache(maxsize=16)
def trigger_of(text: str) -> Trigger:
    """Return the trigger in a text of `trigger_text`. Raises `ValueError`, `TypeError` or `KeyError` for other text."""
    content = json.loads(text)
    shift = _unpacked(content["shift"]) if "shift" in content else None
    ends = None
    if "ends" in content:
        low, high = map(float, content["ends"])
        ends = (low, high)
    return Trigger(_unpacked(content["mask"]), _unpacked(content["pattern"]), content["target"], shift, ends)


def _unpacked(packed: Mapping[str, Any]) -> Tensor:
    """Return the values of an array, of which at most as many bytes are decompressed as its shape needs."""
    size = 4 * prod(packed["shape"])
    try:
        content = zlib.decompressobj().decompress(base64.b64decode(packed["values"]), max(size, 1))
    except zlib.error as error:
        raise ValueError(f"the trigger is damaged: {error}") from error
    return torch.from_numpy(np.frombuffer(content, "<f4").reshape(packed["shape"]).astype(np.float32))
