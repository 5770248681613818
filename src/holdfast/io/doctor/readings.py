"""The result of a check of `holdfast doctor`, and checks whether another interpretation of the inputs fits better."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.errors import (
    Install,
    Placeholder,
    Remedy,
    TargetError,
    TargetLost,
    data_argument,
    model_argument,
    with_remedies,
)
from holdfast.core.model import Bounds, Classifier
from holdfast.core.types import Inputs, Logits
from holdfast.io.data.labels import listed
from holdfast.io.remote.probing import BYTES, NORMALISATIONS, extremes, outside, range_of_training
from holdfast.statistics.intervals import against_majority
from holdfast.threats.domains import SIGNAL, Domain

Level = Literal["problem", "warning", "note", "good"]

BETTER = 0.15
"""Smallest increase of accuracy for which an alternative interpretation of the data is reported."""
MORE = 5
"""Smallest number of additional examples that it must classify correctly."""
STEADY = 1e-4
"""Largest change of an output that can be due to rounding, relative to the largest logit."""


@dataclass(frozen=True)
class Finding:
    """The result of one check of `holdfast doctor`: a problem, a warning, or the statement that nothing is wrong."""

    check: str
    level: Level
    message: str
    """description of the finding, with numbers"""
    advice: str = ""
    """what can be done about it, besides the remedies"""
    gain: float | None = None
    """increase of accuracy by an alternative interpretation of the data; None if no alternative was tried"""
    remedies: tuple[Remedy | Install, ...] = ()
    """changes of arguments that resolve it"""

    @property
    def way_out(self) -> str:
        """Advice and remedies, with arguments of Python; empty if there is nothing to do."""
        return with_remedies(self.advice, [remedy.in_python() for remedy in self.remedies])

    def on_command_line(self) -> str:
        """Return the advice and the remedies, with options of the command line."""
        return with_remedies(self.advice, [remedy.on_command_line() for remedy in self.remedies])

    @property
    def sign(self) -> str:
        """Sign of the level: `x` for a problem, `!` for a warning, `i` for how the data are read, `+` for the statement
        that nothing is wrong.
        """
        return {"problem": "x", "warning": "!", "note": "i", "good": "+"}[self.level]

    def __str__(self) -> str:
        """Return the finding as the command line prints it, with arguments of Python."""
        text = f"{self.sign} {self.check:<14}{self.message}"
        return f"{text}\n{' ' * 16}-> {self.way_out}" if self.way_out else text


class Checkup(tuple[Finding, ...]):
    """The findings of `holdfast.doctor`, which are printed line by line."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "\n".join(map(str, self))

    __str__ = __repr__


@dataclass(frozen=True)
class Examined:
    """A model that `holdfast doctor` checks, a sample of its data, and the outputs of the model on the sample in eval
    mode.
    """

    model: Classifier
    batch: Batch
    in_training: tuple[str, ...]
    logits: Tensor
    batch_size: int
    """number of examples in one call of the model"""
    calls: list[int] = field(default_factory=list)
    """number of examples in each further call of the model"""
    left: Callable[[], int] | None = None
    """function that returns how many rows may still be sent to the model; None means no limit"""
    untried: list[int] = field(default_factory=list)
    """numbers of rows that the alternatives needed which were not tried because too few rows were left"""
    moved_by: float | None = None
    """value of `moved` if it was already measured, else None"""
    names: tuple[str, ...] | None = None
    """class names in the order of their numbers, if the labels of the data are names; else None"""
    domain: Domain | None = None
    """domain of the inputs if it is known"""

    def ask(self, model: Classifier, x: Tensor) -> Tensor:
        """Return the outputs of `model` on the inputs `x`, and count them as queries of the check.

        `model` is the examined model, or the same network with other preprocessing.
        """
        self.calls.append(len(x))
        return outputs_in_batches(model, x, self.batch_size)

    @property
    def batches(self) -> list[Batch]:
        """The sample in batches of `batch_size` examples."""
        rows = torch.arange(len(self.batch), device=self.batch.ids.device)
        return [self.batch.take(part) for part in torch.split(rows, self.batch_size)]

    def right_with(self, x: Tensor, model: Classifier | None = None) -> float:
        """Return the accuracy on the sample with the inputs `x` instead of the original ones, or with another model.

        The result is 0 if the network rejects the inputs, or if too few rows are left; the latter is recorded in
        `untried`.
        """
        size = 1 if self.model.batches is None else self.model.batches.size
        rows = -(-len(x) // size) * size
        # a fixed batch is filled up, and the server counts these rows as well
        if self.left is not None and rows > self.left():
            self.untried.append(rows)
            return 0.0
        try:
            return self.share_right(self.ask(model or self.model, x))
        except TargetLost:  # the server is gone, which says nothing about the interpretation
            raise
        except TargetError:  # the model accepts no such input, so the interpretation is wrong
            return 0.0

    @cached_property
    def moved(self) -> float:
        """Largest change of an output of the model in a second call on the same inputs, relative to the
        largest output.
        """
        if self.moved_by is not None:
            return self.moved_by
        return self.change(self.ask(self.model, self.batch.x))

    def change(self, logits: Tensor) -> float:
        """Return the largest difference between `logits` and the outputs of the first call, relative to the largest of
        these outputs.
        """
        return relative_change(logits, self.logits)

    @property
    def accuracy(self) -> float:
        """Fraction of the sample of examples that the model classifies correctly, or that count as correct."""
        return self.share_right(self.logits)

    def share_right(self, outputs: Tensor) -> float:
        """Return the fraction of the sample that outputs classify correctly, or that counts as correct by them."""
        if self.model.task is None:
            return share_right(outputs, self.batch.y)
        assert self.batch.truth is not None
        return float((self.model.task.lead(outputs, self.batch.truth) > 0).double().mean())

    @property
    def may_be_beaten(self) -> bool:
        """Whether the accuracy is low enough that another interpretation of the data, such as another layout, could
        clearly increase it.
        """
        return self.accuracy < 1 - BETTER

    def beaten_by(self, accuracy: float) -> bool:
        """Return whether the given accuracy, measured with another interpretation of the data, is clearly higher than
        that of the model and that of chance.

        At least five more examples must be classified correctly. The result is False for a model whose outputs change
        between calls.
        """
        if not self.may_be_beaten or self.moved > STEADY:
            return False
        chance = 1 / self.logits.shape[1] if self.model.task is None else 0.0
        gain = accuracy - max(self.accuracy, chance)
        return gain > BETTER and gain * len(self.batch) > MORE - 0.5


def relative_change(logits: Tensor, reference: Tensor) -> float:
    """Return the largest difference between two outputs, relative to the largest value of `reference`."""
    scale = reference.nan_to_num().abs().max().clamp_min(1e-12)
    return float((logits - reference).nan_to_num().abs().max() / scale)


def outputs_of(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the outputs of the model on `x`, computed without gradients."""
    with torch.no_grad():
        return model(x.clone())  # a network may write into its input


def outputs_in_batches(model: Callable[[Tensor], Tensor], x: Tensor, batch_size: int) -> Tensor:
    """Return the outputs of the model on `x`, computed without gradients for at most `batch_size` examples at once."""
    return torch.cat([outputs_of(model, part) for part in torch.split(x, batch_size)])


def share_right(logits: Tensor, y: Tensor) -> float:
    """Return the fraction of examples whose largest logit is that of their class `y`."""
    return float((logits.argmax(1) == y).double().mean())


FILLED = 0.1
"""Smallest fraction of the bounds that the data should span; an image with 17 grey levels divided by 255 spans 0.06."""
_DARK = 0.5  # share of the bounds below which inputs may need scaling to all of them
_ESTIMATE = "an estimate: the network may expect normalised input; declare the values of its training"
_BEFORE = "the network expects the values before this normalisation: undo it in the data or leave it out in the network"


def checked_order(names: tuple[str, ...]) -> Remedy:
    """Return the declaration of the order of class names, with the order in which they were numbered."""
    reason = f"in the order of the model's outputs, if it is not {listed(names)}"
    return model_argument("class_names", Placeholder("A,B,C", "[A, B, C]"), reason=reason)


def class_orders(examined: Examined) -> Iterator[Finding]:
    """Yield a finding if the labels are names, and the model is far more accurate with the names in another order.

    The order is that of the class which the model predicts most often for each name. It is compared only if all classes
    occur in at least five examples and these classes differ.
    """
    y, classes = examined.batch.y, examined.logits.shape[1] - examined.model.rejects
    counts = torch.bincount(y, minlength=classes)
    if examined.names is None or len(counts) != len(examined.names) or int(counts.min()) < MORE:
        return
    predicted = examined.logits.argmax(1)
    order = [int(torch.bincount(predicted[y == label]).argmax()) for label in range(classes)]
    if sorted(order) != list(range(classes)):
        return
    accuracy = share_right(examined.logits, torch.tensor(order, device=y.device)[y])
    if accuracy > float(counts.max()) / len(y) + BETTER and examined.beaten_by(accuracy):
        names = tuple(examined.names[order.index(place)] for place in range(classes))
        text = (
            f"accuracy is {examined.accuracy:.0%}, but {accuracy:.0%} with the class names in another order"
        )
        remedy = model_argument("class_names", names, reason="if the training used this order")
        way_out = f"the names were numbered in the order {listed(examined.names)}"
        yield Finding("labels", "problem", text, way_out, accuracy - examined.accuracy, (remedy,))


def shifted_labels(examined: Examined, shifts: tuple[int, ...] = (-1, 1)) -> Iterator[Finding]:
    """Yield a finding if the model is far more accurate after one of `shifts` is added to all labels.

    A shift is reported if the accuracy with the shift is far higher than that without it, and than that of a constant
    prediction. Names have no next number, so that none is reported if the labels are names.
    """
    if examined.names is not None:
        return
    y, classes = examined.batch.y, examined.logits.shape[1] - examined.model.rejects
    majority = int(torch.unique(y, return_counts=True)[1].max()) / len(y)
    for shift in shifts:
        shifted_accuracy = share_right(examined.logits, (y + shift) % classes)
        if shifted_accuracy > majority + BETTER and examined.beaten_by(shifted_accuracy):
            text = f"accuracy is {examined.accuracy:.0%}, but {shifted_accuracy:.0%} with labels {shift:+d}"
            way_out = "the labels are off by one; correct them in the data"
            yield Finding("labels", "problem", text, way_out, shifted_accuracy - examined.accuracy)


def labels_from_one(examined: Examined) -> Iterator[Finding]:
    """Yield a finding if labels seem to start at 1: no label is 0, and the model is far more accurate after 1 is
    subtracted from all labels.
    """
    if bool((examined.batch.y > 0).all()):
        yield from shifted_labels(examined, (-1,))


def note_on_labels(
    model: Classifier, batch: Batch, logits: Logits, highest: int, name: str
) -> tuple[str, ...]:
    """Return a note if labels from 1 to `highest` are those of all outputs but the first, and the model with the
    outputs `logits` on some examples is no better than chance.

    Raises `TargetError` if the model is far more accurate with 1 subtracted from the labels.
    """
    text = f"the labels of {name} range from 1 to {highest}, and class numbers start at 0"
    for finding in labels_from_one(Examined(model, batch, (), logits, len(batch), moved_by=0.0)):
        raise TargetError(f"{text}: {finding.message}; they count from 1: subtract 1")
    classes = logits.shape[1] - model.rejects
    result = against_majority(logits.argmax(1) == batch.y, batch.y, classes)
    if highest != classes - 1 or not result.at_chance:
        return ()
    advice = "is no better on them than chance; if they count from 1, subtract 1"
    return (f"{text}. The model, which has {classes} classes, {advice}",)


def layouts(examined: Examined) -> Iterator[Finding]:
    """Yield a finding for each other order of the axes of the inputs, such as channels last, with which the model is
    far more accurate.
    """
    x = examined.batch.x
    orders = {3: ((0, 2, 1),), 4: ((0, 3, 1, 2), (0, 2, 3, 1))}.get(x.dim(), ())
    for order in orders:
        if not examined.may_be_beaten:
            return
        other_accuracy = examined.right_with(x.permute(order).contiguous())
        if examined.beaten_by(other_accuracy):
            other_shape = tuple(x.permute(order).shape[1:])
            shapes = f"{tuple(x.shape[1:])}, but {other_accuracy:.0%} with inputs of {other_shape}"
            text = f"accuracy is {examined.accuracy:.0%} with inputs of shape {shapes}"
            gain = other_accuracy - examined.accuracy
            declared = (data_argument("layout", "hwc"),) if order == (0, 3, 1, 2) else ()
            yield Finding("layout", "problem", text, "change the order of the axes", gain, declared)


def units(examined: Examined) -> Iterator[Finding]:
    """Yield findings for inputs in wrong units: values in a small range, a wrong normalisation, or another scale."""
    findings = tuple(_filled(examined))
    if not findings and examined.may_be_beaten:
        findings = tuple(_normalisation(examined))
        if not findings and examined.domain is not SIGNAL:
            findings = tuple(_scale(examined))
    yield from findings


def _filled(examined: Examined) -> Iterator[Finding]:
    """Yield a finding if the data span only a small part of the bounds.

    It is a warning if the model is accurate on them, else a problem.
    """
    share, x = share_filled(examined.batch.x, examined.model.bounds), examined.batch.x
    if share > FILLED or x.numel() < 2:
        return
    low, high = extremes(x)
    text, gain = f"inputs range from {low:.4g} to {high:.4g}, which is {share:.1%} of the bounds", None
    if share > 0 and examined.may_be_beaten:
        other_accuracy = examined.right_with(x / share)
        if examined.beaten_by(other_accuracy):
            text += f"; accuracy is {examined.accuracy:.0%}, but {other_accuracy:.0%} with inputs times {1 / share:.4g}"
            gain = other_accuracy - examined.accuracy
    level: Level = "problem" if examined.may_be_beaten else "warning"
    way_out = f"scale them as in training{_levels(examined)}, or correct the bounds"
    yield Finding("scale", level, text, way_out, gain)


def _levels(examined: Examined) -> str:
    """Return an example of the right scaling if integers were divided by 255 although their maximum is smaller; else
    "".
    """
    highest = 255 * extremes(examined.batch.x)[1]
    maximum = round(highest)
    if examined.model.bounds.width != 1 or maximum < 2 or abs(highest - maximum) > 0.01:
        return ""
    return f", as in x / {maximum} for whole numbers from 0 to {maximum}"


def share_filled(x: Inputs, bounds: Bounds) -> float:
    """Return the range of all values as a fraction of the bounds, where each feature has its own bounds."""
    low, high = (end.double() for end in bounds.like(x))
    place = (x.double() - low) / (high - low).clamp_min(1e-12)
    lowest, highest = extremes(place)
    return highest - lowest


def _scale(examined: Examined) -> Iterator[Finding]:
    """Yield a finding if the inputs are too small or too large by the factor 255 or another one."""
    share, best = share_filled(examined.batch.x, examined.model.bounds), examined.accuracy
    alternatives = (
        (1 / max(share, 1e-12), "scale the inputs so that they fill the bounds, as in x / x.max()", ()),
        (
            255.0,
            "the network was trained on values from 0 to 255: multiply by 255 inside it",
            (Remedy("std", (0.00392157,)),),
        ),
        (1 / 255.0, "the network divides by 255 itself, or was given values up to 255", (BYTES,)),
    )
    findings = tuple[Finding, ...]()
    for factor, way_out, remedies in alternatives if 0 < share < _DARK else alternatives[1:]:
        other_accuracy = examined.right_with(examined.batch.x * factor)
        if other_accuracy > best and examined.beaten_by(other_accuracy):
            text = f"accuracy is {examined.accuracy:.0%}, but {other_accuracy:.0%} with inputs times {factor:.4g}"
            best, gain = other_accuracy, other_accuracy - examined.accuracy
            findings = (Finding("scale", "problem", text, way_out, gain, remedies),)
    yield from findings


def _normalisation(examined: Examined) -> Iterator[Finding]:
    """Yield a finding if a normalisation is missing or applied twice."""
    model, batch = examined.model, examined.batch
    if batch.x.dim() < 2:
        return
    if model.mean is not None or model.std is not None:
        without = examined.right_with(batch.x, model.renormalised(None, None))
        if examined.beaten_by(without):
            text = (
                f"accuracy is {examined.accuracy:.0%}, but {without:.0%} without the declared normalisation"
            )
            way_out = (
                "the network may normalise its input itself: leave out mean and std, or undo the normalisation in the "
                "data instead of declaring data_normalised, or correct the values"
            )
            yield Finding("normalisation", "problem", text, way_out, without - examined.accuracy)
        return
    best, findings = examined.accuracy, tuple[Finding, ...]()
    for name, (mean, std) in {} if examined.domain is SIGNAL else NORMALISATIONS.items():
        if len(mean) not in (1, batch.x.shape[1]):
            continue
        undone = (
            tuple(round(-m / s, 6) for m, s in zip(mean, std, strict=True)),
            tuple(round(1 / s, 6) for s in std),
        )
        for shift, scale, text, way_out in (
            (mean, std, f"with {name} normalisation", _ESTIMATE),
            (*undone, f"with {name} normalisation undone", _BEFORE),
        ):
            other_accuracy = examined.right_with(batch.x, model.renormalised(shift, scale))
            if other_accuracy > best and examined.beaten_by(other_accuracy):
                description = f"accuracy is {examined.accuracy:.0%}, but {other_accuracy:.0%} {text}"
                gain = other_accuracy - examined.accuracy
                has_wider = bool(outside(batch.x, model.bounds).any())
                wider = (range_of_training(*extremes(batch.x)),) if has_wider else ()
                declared = Remedy("mean", shift, also=(Remedy("std", scale), *wider))
                best, findings = (
                    other_accuracy,
                    (Finding("normalisation", "problem", description, way_out, gain, (declared,)),),
                )
    yield from findings
