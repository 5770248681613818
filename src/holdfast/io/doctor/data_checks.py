"""Checks of the values and labels of data against the bounds and classes of a model, without a call of the model."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from holdfast.core.batch import Batch, Data
from holdfast.core.labels import advice
from holdfast.core.labels import remedies as more_classes_of
from holdfast.core.model import Classifier
from holdfast.core.remedies import Remedy
from holdfast.core.types import Labels, Rows
from holdfast.io.data.arrays import Arrays, ranges_of_features
from holdfast.io.data.class_numbers import listed
from holdfast.io.data.pictures import Pictures
from holdfast.io.doctor.examined import Finding
from holdfast.io.remote.value_ranges import BYTES, extremes, outside, pixel_divisor, scaling

SAMPLE = 256
"""Number of examples in the sample that the checks use."""
_MISFITS = 16  # number of examples outside the bounds or the classes that are added to the sample
_CHUNK = 4096  # examples that are converted at once, so that a large array is not copied as a whole


def strange_classes(data: Data) -> Iterator[Finding]:
    """Yield a finding if it is uncertain which class number belongs to a class name, for example if a class of the
    model has no folder of images.
    """
    if isinstance(data, Pictures | Arrays) and data.objection:
        yield Finding("classes", "problem", data.objection.message, remedies=data.objection.remedies)


def names_of_labels(data: Data) -> tuple[str, ...] | None:
    """Return the class names in the order of their numbers if the labels of the data are names, such as strings or
    class folders; otherwise None.
    """
    named = isinstance(data, Pictures) or (isinstance(data, Arrays) and data.text_labels)
    return data.classes if named else None


def range_of_labels(data: Data, batch: Batch) -> tuple[int, int]:
    """Return the smallest and the largest label of all examples if the data are arrays; otherwise those of the sample
    `batch`.
    """
    y = torch.from_numpy(data.y) if isinstance(data, Arrays) else batch.y
    return int(y.min()), int(y.max())


def spread_examples(data: Data, n: int, model: Classifier | None = None) -> Batch:
    """Return at most `n` examples that are spread evenly over a data set, so that all classes occur even if the data
    are sorted by class.

    If `model` is given, some examples that `assess` would reject are added.
    """
    n = min(n, len(data))
    misfits = [] if model is None else _misfits(data, model)
    rows = sorted({*(k * len(data) // n for k in range(n)), *misfits})
    pieces = [data.read(row, row + 1) for row in rows]
    return Batch(
        torch.cat([p.x for p in pieces]), torch.cat([p.y for p in pieces]), torch.cat([p.ids for p in pieces])
    )


def _misfits(data: Data, model: Classifier) -> list[int]:
    """Return the rows of the first examples that `assess` would reject, for data in arrays.

    For other data the list is empty: images are bytes in class folders, and therefore are always accepted.
    """
    misfits: list[int] = []
    if isinstance(data, Arrays):
        for start in range(0, len(data), _CHUNK):
            batch = data.read(start, min(start + _CHUNK, len(data)))
            misfit = outside(batch.x, model.bounds).flatten(1).any(1) | (batch.y < 0)
            if model.classes is not None:
                misfit |= batch.y >= model.classes
            misfits += (start + misfit.nonzero().flatten()).tolist()
    return misfits[:_MISFITS]


def moved_inside(model: Classifier, x: Tensor, sample: Tensor) -> Tensor:
    """Return the inputs `x` divided by 255, or a similar divisor, if they are pixels outside the bounds of the model;
    otherwise return them unchanged.

    Without this correction, the later checks would report only effects of the wrong
    scale.
    """
    divisor = pixel_divisor(*extremes(sample), sample.dim())
    if bool(outside(sample, model.bounds).any()) and model.bounds.width <= 1 and divisor is not None:
        return x / divisor
    return x


def known_labels(y: Labels, classes: int, labels: tuple[int, int]) -> tuple[Labels, Rows]:
    """Return those labels that are valid class numbers of the model, and their row indices. Labels from 1 to `classes`
    are reduced by 1.

    If the range `labels` of all labels is 1 to `classes`, all labels are reduced by 1. Otherwise labels outside the
    classes are left out; if no label is left, all are clamped to the classes.
    """
    if labels == (1, classes):
        return y - 1, torch.arange(len(y), device=y.device)
    usable = ((y >= 0) & (y < classes)).nonzero()[:, 0]
    if not len(usable):
        return y.clamp(0, classes - 1), torch.arange(len(y), device=y.device)
    return y[usable], usable


def range_of_values(model: Classifier, x: Tensor, data: Data) -> Iterator[Finding]:
    """Yield a finding on whether input values are inside the bounds of the model, and not in an unexpectedly small part
    of them.
    """
    low, high = extremes(x)
    text = f"inputs range from {low:.4g} to {high:.4g}"
    if bool(outside(x, model.bounds).any()):
        if isinstance(data, Arrays) and data.pixels is not None:
            way_out, remedies = data.pixels.advice(high)
        elif isinstance(data, Arrays) and data.x.ndim == 2 and data.units is None:
            way_out, remedies = scaling(x)
            remedies = (*remedies, ranges_of_features(data))
        elif model.bounds.width <= 1 and pixel_divisor(low, high, x.dim()) == 255:
            way_out, remedies = "divide them by 255", (BYTES,)
        else:
            way_out, remedies = scaling(x)
        yield Finding("range", "problem", f"{text}, outside the bounds", way_out, remedies=remedies)
    elif model.bounds.width >= 100 and high <= 1.0:
        reach = float(model.bounds.like(x)[1].max())
        yield Finding(
            "range",
            "problem",
            f"{text}, but the upper bound is {reach:g}",
            remedies=(Remedy("bounds", (0, 1)),),
        )
    else:
        yield Finding("range", "good", f"{text}, inside the bounds")


def without_estimates(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Return findings in which the value range has no advice of its own if there is one on the normalisation: the
    latter is measured, and the former, an estimate from the values alone, may contradict it.
    """
    listed = tuple(findings)
    if not any(finding.check == "normalisation" for finding in listed):
        return listed
    return tuple(
        replace(finding, advice="see the normalisation below", remedies=())
        if (finding.check, finding.level) == ("range", "problem")
        else finding
        for finding in listed
    )


def labels_outside(
    lowest: int, highest: int, classes: int, *, remote: bool, class_labels: tuple[int, ...] | None = None
) -> Iterator[Finding]:
    """Yield a finding if the lowest or the highest label is not a class number of the model. `class_labels` are the
    labels in the data for which the numbers stand, if they are others.
    """
    if (lowest < 0 or highest >= classes) and class_labels is not None:
        text = f"there are labels outside the classes of the model, which are {listed(list(map(str, class_labels)))}"
        yield Finding("labels", "problem", text, "give the labels that the model was fitted on")
    elif lowest < 0 or highest >= classes:
        text = f"labels range from {lowest} to {highest}, but the model has classes 0 to {classes - 1}"
        from_one = (lowest, highest) == (1, classes)
        way_out = "they seem to start at 1: subtract 1" if from_one else advice(lowest, highest, classes)
        more_classes = more_classes_of(lowest, highest, classes, remote=remote)
        yield Finding("labels", "problem", text, way_out, remedies=more_classes)
