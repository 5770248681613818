"""Checks whether another interpretation of the data increases accuracy: another layout, range, normalisation or scale,
or shifted labels.

An alternative is reported only if the model is correct far more often with it, so that a weak model does not cause
findings.
"""

from collections.abc import Iterator

import torch

from holdfast.core.batch import Batch
from holdfast.core.errors import TargetError
from holdfast.core.model import Bounds, Classifier
from holdfast.core.remedies import Placeholder, Remedy, data_argument, model_argument
from holdfast.core.types import Inputs, Logits
from holdfast.io.data.labels import listed
from holdfast.io.doctor.examined import BETTER, MORE, Examined, Finding, Level, share_right
from holdfast.io.remote.probing import BYTES, NORMALISATIONS, extremes, outside, range_of_training
from holdfast.statistics.intervals import against_majority

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
        findings = tuple(_normalisation(examined)) or tuple(_scale(examined))
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
    for name, (mean, std) in NORMALISATIONS.items():
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
