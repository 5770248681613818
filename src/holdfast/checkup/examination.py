"""The examination of a model and its data, and the shorter one that an assessment makes."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from holdfast.checkup.behaviour import accuracy, gradients, outputs, steadiness
from holdfast.checkup.examined import Examined, Finding, outputs_of
from holdfast.checkup.readings import labels_from_one, layouts, shifted_labels, units
from holdfast.core.batch import Batch, Data
from holdfast.core.errors import TargetError, UnclearOutput
from holdfast.core.labels import advice
from holdfast.core.model import EVERY, IN_PLACE, Classifier, fitted
from holdfast.ops.prepare import in_training
from holdfast.sources.arrays import Arrays
from holdfast.sources.estimates import pixel_divisor, scaling
from holdfast.sources.pictures import Pictures
from holdfast.sources.probing import settle_output, settle_predictions

_SAMPLE = 256  # examples that are looked at
_MISFITS = 16  # examples outside the bounds or the classes that are added to them
_CHUNK = 4096
_ROUNDING = 1e-6


def examine(model: Classifier, data: Data) -> tuple[Finding, ...]:
    """All findings on a model and a data set; the model comes back in the mode it was in.

    Raises `TargetError` when the model cannot be run on the data at all and no other layout works either.
    """
    if not len(data):
        raise TargetError(f"{data.name} holds no examples; expected at least one")
    batch = _sample(data, model)
    # a frozen script has no mode
    modes = [(module, getattr(module, "training", False)) for module in model.modules()]
    left_in_training = in_training(model)
    try:
        model.eval()
        with fitted(model, batch.x):
            unclear = tuple(_unclear_output(model, data))
            differs = tuple(_predictions(model, data))
            numbers = tuple(_numbers(data))
            found = () if unclear else tuple(_found(model, batch, left_in_training, data))
            if numbers:  # which say already why labels are off
                found = tuple(finding for finding in found if finding.check != "labels")
            return (*numbers, *unclear, *differs, *found)
    finally:
        for module, training in modes:
            module.training = training


def misfit(model: Classifier, batch: Batch, batch_size: int) -> tuple[Finding | None, int]:
    """The first sign that the data do not fit the model, and the forwards that it took to look for one.

    It looks at labels, layout, normalisation, scale and value range. The model is in eval mode, the inputs in its
    bounds. It takes one forward an example where the model is right on nearly all, else some fifteen.
    """
    logits = torch.cat([outputs_of(model, part) for part in torch.split(batch.x, batch_size)])
    examined = Examined(model, batch, (), logits, batch_size)
    checks = (labels_from_one, layouts, units)
    found = next((found for check in checks for found in check(examined) if found.level == "problem"), None)
    return found, len(batch) + sum(examined.calls)


def _numbers(data: Data) -> Iterator[Finding]:
    """Named classes whose numbers are not certain, as of a folder that lacks one of the model's classes."""
    if isinstance(data, Pictures | Arrays) and data.objection:
        yield Finding("classes", "problem", data.objection)


def _unclear_output(model: Classifier, data: Data) -> Iterator[Finding]:
    """One number an example that may be a logit or a probability."""
    try:
        settle_output(model, data)
    except UnclearOutput as error:
        yield Finding("output", "problem", str(error), "--model-output probability, or --model-output logit")


def _predictions(model: Classifier, data: Data) -> Iterator[Finding]:
    """An estimator whose largest score is of another class than it predicts."""
    for note in settle_predictions(model, data):
        yield Finding(
            "predictions", "warning", note, "if this is not meant, give an estimator without a threshold"
        )


def _range_of_labels(data: Data, batch: Batch) -> tuple[int, int]:
    """The smallest and the largest label: of arrays those of all examples, else those of the sample."""
    y = torch.from_numpy(data.y) if isinstance(data, Arrays) else batch.y
    return int(y.min()), int(y.max())


def _found(
    model: Classifier, batch: Batch, left_in_training: tuple[str, ...], data: Data
) -> Iterator[Finding]:
    wrong_layout = _layout(model, batch)
    if wrong_layout is not None:
        yield wrong_layout
        return
    if model.batches is not None and model.batches != EVERY:
        yield Finding(
            "batches", "warning", model.batches.says, "let it take any number of rows, to be quicker"
        )
    if model.rewrites:
        yield Finding("in place", "warning", IN_PLACE, "write x = x - mean in it, not x -= mean")
    known = outputs_of(model, batch.x[:1]).shape[1] - model.rejects
    labels = _range_of_labels(data, batch)
    yield from (*_range(model, batch.x, data), *_labels_outside(*labels, known, remote=model.remote))
    batch = _moved_inside(model, batch, known, labels)
    examined = Examined(model, batch, left_in_training, outputs_of(model, batch.x), _SAMPLE)
    for check in _CHECKS:
        yield from check(examined)


def _sample(data: Data, model: Classifier) -> Batch:
    """Examples spread evenly over the data set, so that files sorted by class show all of them, and misfits."""
    n = min(_SAMPLE, len(data))
    rows = sorted({*(k * len(data) // n for k in range(n)), *_misfits(data, model)})
    pieces = [data.read(row, row + 1) for row in rows]
    return Batch(
        torch.cat([p.x for p in pieces]), torch.cat([p.y for p in pieces]), torch.cat([p.ids for p in pieces])
    )


def _misfits(data: Data, model: Classifier) -> list[int]:
    """The first rows of arrays that an assessment would refuse; images are bytes in named folders and always fit."""
    found: list[int] = []
    if isinstance(data, Arrays):
        for start in range(0, len(data), _CHUNK):
            batch = data.read(start, min(start + _CHUNK, len(data)))
            misfit = _outside(batch.x, model).flatten(1).any(1) | (batch.y < 0)
            if model.classes is not None:
                misfit |= batch.y >= model.classes
            found += (start + misfit.nonzero().flatten()).tolist()
    return found[:_MISFITS]


def _outside(x: Tensor, model: Classifier) -> Tensor:
    low, high = model.bounds.like(x)
    slack = _ROUNDING * (high - low)
    return (x < low - slack) | (x > high + slack)


def _moved_inside(model: Classifier, batch: Batch, classes: int, labels: tuple[int, int]) -> Batch:
    """The batch as the findings on its range and its labels would have it, so that the other checks mean something."""
    divisor = pixel_divisor(float(batch.x.min()), float(batch.x.max()), batch.x.dim())
    if bool(_outside(batch.x, model).any()) and model.bounds.width <= 1 and divisor is not None:
        batch = replace(batch, x=batch.x / divisor)
    if labels == (1, classes):
        return replace(batch, y=batch.y - 1)
    known = (batch.y >= 0) & (batch.y < classes)
    if not bool(known.any()):
        return replace(batch, y=batch.y.clamp(0, classes - 1))
    return Batch(batch.x[known], batch.y[known], batch.ids[known])


def _layout(model: Classifier, batch: Batch) -> Finding | None:
    """A problem if the model cannot take the inputs as they are, but can with the channels last."""
    try:
        outputs_of(model, batch.x[:2])
    except TargetError as refused:
        if batch.x.dim() != 4:
            raise
        try:
            outputs_of(model, batch.x[:2].permute(0, 2, 3, 1).contiguous())
        except TargetError:
            raise refused from None
        return Finding(
            "layout",
            "problem",
            f"the model refuses inputs of shape {tuple(batch.x.shape[1:])}, but takes them with the channels last",
            "wrap it so that it permutes its input: x.permute(0, 2, 3, 1)",
        )
    return None


def _range(model: Classifier, x: Tensor, data: Data) -> Iterator[Finding]:
    low, high = (float(end) for end in (x.min(), x.max()))
    seen = f"inputs run from {low:.4g} to {high:.4g}"
    if bool(_outside(x, model).any()):
        if isinstance(data, Arrays) and data.pixels is not None:
            way_out = data.pixels.advice(high)
        elif model.bounds.width <= 1 and pixel_divisor(low, high, x.dim()) == 255:
            way_out = "divide them by 255 (or --bounds 0,255, if the network takes them so)"
        else:
            way_out = scaling(x)
        yield Finding("range", "problem", f"{seen}, outside the bounds", way_out)
    elif model.bounds.width >= 100 and high <= 1.0:
        reach = float(model.bounds.like(x)[1].max())
        yield Finding("range", "problem", f"{seen}, but the bounds reach to {reach:g}", "use --bounds 0,1")
    else:
        yield Finding("range", "good", f"{seen}, inside the bounds")


def _labels_outside(lowest: int, highest: int, classes: int, *, remote: bool) -> Iterator[Finding]:
    if lowest < 0 or highest >= classes:
        text = f"labels run from {lowest} to {highest}, but the model knows classes 0 to {classes - 1}"
        from_one = (lowest, highest) == (1, classes)
        other = advice(lowest, highest, classes, remote=remote)
        yield Finding("labels", "problem", text, "they seem to start at 1: subtract 1" if from_one else other)


def _labels(examined: Examined) -> Iterator[Finding]:
    yield from shifted_labels(examined)
    y = examined.batch.y
    if len(y) > 1 and bool((y == y[0]).all()):
        yield Finding(
            "labels", "warning", f"all {len(y)} labels looked at are {int(y[0])}", "is it the right split?"
        )


_CHECKS: tuple[Callable[[Examined], Iterator[Finding]], ...] = (
    outputs,
    _labels,
    accuracy,
    units,
    steadiness,
    gradients,
)
