"""What `holdfast doctor` looks for: the usual mistakes between a model and its data, found in seconds.

Each check is a pure function of a `Patient` and returns findings in words, with the way out. Checks that compare
accuracies (another scale, another normalisation, shifted labels) speak only when the alternative is right far more
often than what was declared, so that a merely weak model is not accused.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from holdfast.core.batch import Batch, Data
from holdfast.core.errors import TargetError, UnclearOutput
from holdfast.core.model import EVERY, IN_PLACE, Classifier, fitted
from holdfast.ops.losses import margin_loss
from holdfast.ops.prepare import in_training
from holdfast.ops.statistics import against_majority
from holdfast.sources.arrays import Arrays
from holdfast.sources.estimates import NORMALISATIONS, scaling
from holdfast.sources.pictures import Pictures
from holdfast.sources.probing import settle_output

Level = Literal["problem", "warning", "good"]

_SAMPLE = 256  # examples that are looked at
_MISFITS = 16  # examples outside the bounds or the classes that are added to them
_CHUNK = 4096
_ROUNDING = 1e-6
_BETTER, _MORE = 0.15, 5  # an alternative is named when it is right on this much more of them, and on so many
_STEADY = 1e-4  # share of the largest logit by which rounding may move an output
_ESTIMATE = "an estimate: the network may take normalised input; declare it with the values of your training"
_TWICE = "it is done twice, by the network and before it: give the data as they were, or leave one of the steps out"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    check: str
    level: Level
    says: str
    """what was found, with the numbers"""
    way_out: str = ""
    gain: float | None = None
    """accuracy that another reading of the data adds; None where no reading was tried"""


@dataclass(frozen=True)
class Patient:
    """A model as it was given, some of its data, and what it answers to them in eval mode."""

    model: Classifier
    batch: Batch
    in_training: tuple[str, ...]
    logits: Tensor
    batch_size: int = _SAMPLE
    """examples that go through the model at once"""
    calls: list[int] = field(default_factory=list)
    """how many examples each further call had"""

    def ask(self, model: Classifier, x: Tensor) -> Tensor:
        """Outputs of the model, or of the same network with other preprocessing."""
        self.calls.append(len(x))
        return torch.cat([_ask(model, part) for part in torch.split(x, self.batch_size)])

    @cached_property
    def moved(self) -> float:
        """How far the outputs change when the model is asked again, as a share of the largest logit."""
        return self.change(self.ask(self.model, self.batch.x))

    def change(self, logits: Tensor) -> float:
        """The largest difference to the outputs, as a share of the largest of them."""
        scale = self.logits.nan_to_num().abs().max().clamp_min(1e-12)
        return float((logits - self.logits).nan_to_num().abs().max() / scale)

    @property
    def accuracy(self) -> float:
        """Share of the sample that is classified correctly."""
        return _accuracy(self.logits, self.batch.y)

    @property
    def may_be_beaten(self) -> bool:
        """Whether an alternative can be right so much more often; if not, none need be tried."""
        return self.accuracy < 1 - _BETTER

    def beaten_by(self, other: float) -> bool:
        """Whether an alternative is right so much more often, than chance too, that the model is not weak or noisy."""
        if not self.may_be_beaten or self.moved > _STEADY:
            return False
        more = other - max(self.accuracy, 1 / self.logits.shape[1])
        return more > _BETTER and more * len(self.batch) > _MORE - 0.5


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
            found = () if unclear else _found(model, batch, left_in_training, _range_of_labels(data, batch))
            return (*_numbers(data), *unclear, *found)
    finally:
        for module, training in modes:
            module.training = training


def misfit(model: Classifier, batch: Batch, batch_size: int) -> tuple[Finding | None, int]:
    """The first sign that the data do not fit the model, and the forwards that it took to look for one.

    It looks at layout, normalisation, scale and value range. The model is in eval mode, the inputs in its bounds. It
    takes one forward an example where the model is right on nearly all, else some fifteen.
    """
    logits = torch.cat([_ask(model, part) for part in torch.split(batch.x, batch_size)])
    patient = Patient(model, batch, (), logits, batch_size)
    found = next((finding for check in (_layouts, _units) for finding in check(patient)), None)
    return found, len(batch) + sum(patient.calls)


_DARK = 0.5  # share of the bounds below which inputs may be meant to be scaled up to all of them
FILLED = 0.1
"""Share of the bounds that the data must fill; an image of 17 grey levels, divided by 255, fills 0.06 of them."""
BETTER = _BETTER
"""Accuracy that another reading of the data must add."""


def _filled(patient: Patient) -> Iterator[Finding]:
    """Data that fill a small part of the bounds, so that eps is large beside them."""
    share, x = _share_filled(patient), patient.batch.x
    if share > FILLED or x.numel() < 2:
        return
    low, high = float(x.min()), float(x.max())
    says, gain = f"inputs run from {low:.4g} to {high:.4g}, which is {share:.1%} of the bounds", None
    if share > 0 and patient.may_be_beaten:
        better = _accuracy(patient.ask(patient.model, x / share), patient.batch.y)
        if patient.beaten_by(better):
            says += (
                f"; accuracy is {patient.accuracy:.0%}, but {better:.0%} with inputs times {1 / share:.4g}"
            )
            gain = better - patient.accuracy
    way_out = "scale them as in training, as in x / 16 for whole numbers from 0 to 16, or correct --bounds"
    yield Finding("scale", "problem", says, way_out, gain)


def _share_filled(patient: Patient) -> float:
    """The largest share of the bounds that one feature's values, or those of all features together, span."""
    x = patient.batch.x.double()
    low, high = (end.double() for end in patient.model.bounds.like(patient.batch.x))
    place = ((x - low) / (high - low).clamp_min(1e-12)).nan_to_num()
    return float(place.max() - place.min())


def _layouts(patient: Patient) -> Iterator[Finding]:
    """Another order of the axes, where the network takes it too and is right far more often."""
    x = patient.batch.x
    orders = {3: ((0, 2, 1),), 4: ((0, 3, 1, 2), (0, 2, 3, 1))}.get(x.dim(), ())
    for order in orders:
        if not patient.may_be_beaten:
            return
        try:
            accuracy = _accuracy(patient.ask(patient.model, x.permute(order).contiguous()), patient.batch.y)
        except TargetError:
            continue
        if patient.beaten_by(accuracy):
            shapes = (
                f"{tuple(x.shape[1:])}, but {accuracy:.0%} with inputs of {tuple(x.permute(order).shape[1:])}"
            )
            text = f"accuracy is {patient.accuracy:.0%} with inputs of shape {shapes}"
            gain = accuracy - patient.accuracy
            yield Finding(
                "layout", "problem", text, "change the order of the axes, or declare --layout", gain
            )


def _numbers(data: Data) -> Iterator[Finding]:
    """Named classes whose numbers are not certain, as of a folder that lacks one of the model's classes."""
    if isinstance(data, Pictures | Arrays) and data.objection:
        way_out = "name the model's classes in the order of its outputs: --class-names A,B,C"
        yield Finding("classes", "problem", data.objection, way_out)


def _unclear_output(model: Classifier, data: Data) -> Iterator[Finding]:
    """One number an example that may be a logit or a probability."""
    try:
        settle_output(model, data)
    except UnclearOutput as error:
        yield Finding("output", "problem", str(error), "--model-output probability, or --model-output logit")


def _range_of_labels(data: Data, batch: Batch) -> tuple[int, int]:
    """The smallest and the largest label: of arrays those of all examples, else those of the sample."""
    y = torch.from_numpy(data.y) if isinstance(data, Arrays) else batch.y
    return int(y.min()), int(y.max())


def _found(
    model: Classifier, batch: Batch, left_in_training: tuple[str, ...], labels: tuple[int, int]
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
    known = _ask(model, batch.x[:1]).shape[1] - model.rejects
    yield from (*_range(model, batch.x), *_labels_outside(*labels, known))
    batch = _brought_inside(model, batch, known, labels)
    patient = Patient(model, batch, left_in_training, _ask(model, batch.x))
    for check in _CHECKS:
        yield from check(patient)


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


def _are_bytes(x: Tensor, model: Classifier) -> bool:
    """Pixels from 0 to 255 where the model takes 0 to 1; a table shows it by its largest value alone."""
    low, high = float(x.min()), float(x.max())
    return model.bounds.width <= 1 and low >= 0 and 1.5 < high <= 255 and (x.dim() > 2 or high == 255)


def _brought_inside(model: Classifier, batch: Batch, classes: int, labels: tuple[int, int]) -> Batch:
    """The batch as the findings on its range and its labels would have it, so that the other checks mean something."""
    if bool(_outside(batch.x, model).any()) and _are_bytes(batch.x, model):
        batch = replace(batch, x=batch.x / 255)
    if labels == (1, classes):
        return replace(batch, y=batch.y - 1)
    known = (batch.y >= 0) & (batch.y < classes)
    if not bool(known.any()):
        return replace(batch, y=batch.y.clamp(0, classes - 1))
    return Batch(batch.x[known], batch.y[known], batch.ids[known])


def _ask(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x.clone())  # a network may write into what it is given


def _accuracy(logits: Tensor, y: Tensor) -> float:
    return float((logits.argmax(1) == y).double().mean())


def _layout(model: Classifier, batch: Batch) -> Finding | None:
    """A problem if the model cannot take the inputs as they are, but can with the channels last."""
    try:
        _ask(model, batch.x[:2])
    except TargetError as refused:
        if batch.x.dim() != 4:
            raise
        try:
            _ask(model, batch.x[:2].permute(0, 2, 3, 1).contiguous())
        except TargetError:
            raise refused from None
        return Finding(
            "layout",
            "problem",
            f"the model refuses inputs of shape {tuple(batch.x.shape[1:])}, but takes them with the channels last",
            "wrap it so that it permutes its input: x.permute(0, 2, 3, 1)",
        )
    return None


def _range(model: Classifier, x: Tensor) -> Iterator[Finding]:
    low, high = (float(end) for end in (x.min(), x.max()))
    seen = f"inputs run from {low:.4g} to {high:.4g}"
    if bool(_outside(x, model).any()):
        if _are_bytes(x, model):
            way_out = "divide them by 255 (or --bounds 0,255, if the network takes them so)"
        else:
            way_out = scaling(x)
        yield Finding("range", "problem", f"{seen}, outside the bounds", way_out)
    elif model.bounds.width >= 100 and high <= 1.0:
        reach = float(model.bounds.like(x)[1].max())
        yield Finding("range", "problem", f"{seen}, but the bounds reach to {reach:g}", "use --bounds 0,1")
    else:
        yield Finding("range", "good", f"{seen}, inside the bounds")


def _units(patient: Patient) -> Iterator[Finding]:
    """What the numbers mean to the network: too small a range, a normalisation missing or done twice, another scale."""
    found = tuple(_filled(patient))
    if not found and patient.may_be_beaten:
        found = tuple(_normalisation(patient)) or tuple(_scale(patient))
    yield from found


def _scale(patient: Patient) -> Iterator[Finding]:
    """Inputs 255 times too small or too large for what the network was trained on, or scaled by another number."""
    share, best = _share_filled(patient), patient.accuracy
    ways = (
        (1 / max(share, 1e-12), "scale the inputs so that they fill the bounds, as in x / x.max()"),
        (255.0, "the network was trained on 0..255: multiply by 255 inside it, as with --std 0.00392157"),
        (1 / 255.0, "the network divides by 255 itself, or was given numbers to 255: --bounds 0,255"),
    )
    found = tuple[Finding, ...]()
    for factor, way_out in ways if 0 < share < _DARK else ways[1:]:
        better = _accuracy(patient.ask(patient.model, patient.batch.x * factor), patient.batch.y)
        if better > best and patient.beaten_by(better):
            text = f"accuracy is {patient.accuracy:.0%}, but {better:.0%} with inputs times {factor:.4g}"
            best, gain = better, better - patient.accuracy
            found = (Finding("scale", "problem", text, way_out, gain),)
    yield from found


def _normalisation(patient: Patient) -> Iterator[Finding]:
    """Normalised twice, or not at all."""
    model, batch = patient.model, patient.batch
    if batch.x.dim() < 2:
        return
    if model.mean is not None or model.std is not None:
        bare = Classifier(model.net, bounds=model.bounds, batches=model.batches)
        without = _accuracy(patient.ask(bare, batch.x), batch.y)
        if patient.beaten_by(without):
            text = f"accuracy is {patient.accuracy:.0%}, but {without:.0%} without --mean and --std"
            gain = without - patient.accuracy
            yield Finding(
                "normalisation", "problem", text, "the network does so itself; leave them out", gain
            )
        return
    best, found = patient.accuracy, tuple[Finding, ...]()
    for name, (mean, std) in NORMALISATIONS.items():
        if len(mean) not in (1, batch.x.shape[1]):
            continue
        flags = f"--mean {','.join(map(str, mean))} --std {','.join(map(str, std))}"
        undone = [-m / s for m, s in zip(mean, std, strict=True)], [1 / s for s in std]
        for shift, scale, text, way_out in (
            (mean, std, f"with {name} normalisation", f"{_ESTIMATE}, as in {flags}"),
            (*undone, f"with {name} normalisation undone", _TWICE),
        ):
            changed = Classifier(model.net, mean=shift, std=scale, batches=model.batches)
            accuracy = _accuracy(patient.ask(changed, batch.x), batch.y)
            if accuracy > best and patient.beaten_by(accuracy):
                says = f"accuracy is {patient.accuracy:.0%}, but {accuracy:.0%} {text}"
                gain = accuracy - patient.accuracy
                best, found = accuracy, (Finding("normalisation", "problem", says, way_out, gain),)
    yield from found


def _labels_outside(lowest: int, highest: int, classes: int) -> Iterator[Finding]:
    if lowest < 0 or highest >= classes:
        text = f"labels run from {lowest} to {highest}, but the model knows classes 0 to {classes - 1}"
        off = "they seem to start at 1: subtract 1" if (lowest, highest) == (1, classes) else "check them"
        yield Finding("labels", "problem", text, off)


def _labels(patient: Patient) -> Iterator[Finding]:
    y, classes = patient.batch.y, patient.logits.shape[1] - patient.model.rejects
    for shift in (-1, 1):
        better = _accuracy(patient.logits, (y + shift) % classes)
        if patient.beaten_by(better):
            text = f"accuracy is {patient.accuracy:.0%}, but {better:.0%} with labels {shift:+d}"
            yield Finding("labels", "problem", text, "the labels are off by one; correct them in the data")
    if len(y) > 1 and bool((y == y[0]).all()):
        yield Finding(
            "labels", "warning", f"all {len(y)} labels looked at are {int(y[0])}", "is it the right split?"
        )


def _accuracy_at_all(patient: Patient) -> Iterator[Finding]:
    y = patient.batch.y
    found = against_majority(patient.logits.argmax(1) == y, y)
    text = f"accuracy is {patient.accuracy:.1%} on {len(y)} examples"
    if found.at_chance:
        yield Finding(
            "accuracy",
            "warning",
            f"{text}, no better than always predicting the majority class ({found.majority:.1%})",
            "are model and data meant for each other?",
        )
    else:
        yield Finding("accuracy", "good", text)


def _outputs(patient: Patient) -> Iterator[Finding]:
    logits = patient.logits
    if bool(logits.isnan().any()):
        share = float(logits.isnan().any(1).double().mean())
        yield Finding(
            "nan",
            "problem",
            f"{share:.0%} of the outputs hold NaN",
            "look for a division or a logarithm of zero",
        )
        return
    if bool(((logits.sum(1) - 1).abs() < 1e-4).all() & (logits >= 0).all()):
        yield Finding(
            "probabilities",
            "warning",
            "the outputs are probabilities, not logits: attacks see vanishing gradients",
            "return the layer before the softmax, or declare --model-output probability",
        )
    if len(logits) > 1 and float((logits - logits[0]).abs().max()) <= 1e-6 * float(
        logits.abs().max().clamp_min(1e-12)
    ):
        yield Finding(
            "constant",
            "problem",
            "every input gets the same output",
            "check the weights and the preprocessing",
        )


def _steadiness(patient: Patient) -> Iterator[Finding]:
    if patient.in_training:
        names = ", ".join(patient.in_training[:3]) + (" …" if len(patient.in_training) > 3 else "")
        yield Finding(
            "mode", "problem", f"layers are in train mode: {names}", "call model.eval() in the factory"
        )
    if patient.moved > _STEADY:
        yield Finding(
            "randomness",
            "warning",
            f"two calls on the same inputs differ by {patient.moved:.2g} of the largest logit",
            "if that is no defence, a dropout is on; if it is, use --suite rand",
        )
        return
    change = patient.change(_ask(patient.model, patient.batch.x.flip(0)).flip(0))
    if change > _STEADY:
        text = f"outputs depend on the other inputs in the batch (by {change:.2g} of the largest logit)"
        way_out = "is a batch norm using batch statistics, or does the model remember?"
        yield Finding("state", "problem", text, way_out)
    else:
        yield Finding("steadiness", "good", "the same inputs get the same outputs, in any order")


def _gradients(patient: Patient) -> Iterator[Finding]:
    if patient.model.access != "gradients":
        why = f", for {patient.model.hides}" if patient.model.hides else ""
        text, way_out = f"the model gives {patient.model.access} only{why}", "use --suite black-box, or RayS"
        yield Finding("gradients", "warning", text, way_out)
        return
    x = patient.batch.x.clone().requires_grad_()
    logits = patient.model(x)
    if not logits.requires_grad:
        yield Finding(
            "gradients", "problem", "no gradient reaches the input", "is something detached, or in numpy?"
        )
        return
    try:
        (grad,) = torch.autograd.grad(margin_loss(logits, patient.batch).sum(), x)
    except RuntimeError as error:
        yield Finding(
            "gradients", "problem", f"the gradient fails: {error}", "use --suite black-box until it is mended"
        )
        return
    zero = float((grad.flatten(1).nan_to_num().abs().amax(1) == 0).double().mean())
    if zero > 0.01:
        text = f"{zero:.0%} of the examples have a zero gradient, so gradient attacks see nothing there"
        yield Finding(
            "gradients", "warning", text, "a rounding or saturated step hides it; the doubts will say more"
        )
    else:
        yield Finding("gradients", "good", "gradients reach the input")


_CHECKS: tuple[Callable[[Patient], Iterator[Finding]], ...] = (
    _outputs,
    _labels,
    _accuracy_at_all,
    _units,
    _steadiness,
    _gradients,
)
