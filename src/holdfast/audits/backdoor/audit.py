"""The steps of the audit of a model: trigger inversion, controls, and STRIP for a stream of inputs."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import TypedDict

from holdfast.audits.backdoor.controls import (
    MIN_CONTROLS,
    Controls,
    Rank,
    SizeCache,
    ranked,
    refuse_other_accuracy,
)
from holdfast.audits.backdoor.inversion import Inversion, Inverted, joined
from holdfast.audits.backdoor.strip import Strip
from holdfast.audits.stored_steps import Number, Share, Size, StoredSteps
from holdfast.core.batch import Batch, Data
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.evidence import Columns
from holdfast.core.model import Classifier
from holdfast.core.remedies import Remedy
from holdfast.core.types import Inputs, PerExample
from holdfast.io.models.weights import written
from holdfast.runs.engine.progress import Notify
from holdfast.runs.engine.run import Run
from holdfast.runs.store.column_forms import IDS, Form, whole
from holdfast.runs.store.files import make_private, write_atomically
from holdfast.runs.store.forms import Flag

CLEAN = 2000
"""Number of clean examples of the audit, at most: 5 % of the training examples of most data sets."""
GROUP = 5
"""Number of classes of which triggers are searched in one batch; a stopped search continues after the last group."""
MAX_EPOCHS = 10
"""Largest number of epochs of a control that the audit trains."""
ACCURACY, TRANSFER, STRIP_CLEAN, STRIP = "accuracy", "transfer", "strip-clean", "strip"
"""Names of steps: the accuracies, the success of the trigger on the controls, and the entropies of clean examples and
of the stream."""
_ROWS = 500
"""Number of examples in one forward pass."""


@dataclass(frozen=True)
class ControlTraining:
    """How the audit trains control networks."""

    train: Callable[[int, int], Classifier]
    """function that trains a control, of a number and with a number of epochs"""
    time_s: float
    """time of all trainings together"""
    folder: Path
    """folder for the weights, which are used again by audits with the same training"""


@dataclass(frozen=True)
class BackdoorRequest:
    """What the audit of a model compares, and with which settings."""

    batch: Batch
    """clean examples"""
    classes: int
    controls: Controls | None = None
    training: ControlTraining | None = None
    """training of controls; None if they are given or absent"""
    sizes: SizeCache | None = None
    """trigger sizes of controls that earlier audits measured"""
    stream: Data | None = None
    """inputs that the model received; None for none"""
    seed: int = 0
    inversion: Inversion = field(default_factory=Inversion)
    strip: Strip = field(default_factory=Strip)

    @property
    def n_controls(self) -> int:
        """Number of controls; 0 for none."""
        trained = 0 if self.training is None else MIN_CONTROLS
        return trained if self.controls is None else len(self.controls.files)

    def steps(self) -> tuple[str, ...]:
        """Return the names of the steps, in their order."""
        n = self.n_controls
        return (
            *(("training",) if self.training else ()),
            ACCURACY,
            *(name for name, _ in groups_of(self.classes)),
            *((*(f"control-{place}" for place in range(n)), TRANSFER) if n else ()),
            *((STRIP_CLEAN, STRIP) if self.stream is not None else ()),
        )


def refuse_other_shape(batch: Batch, stream: Data) -> None:
    """Raise `UsageError` if the inputs of a stream cannot be mixed with clean examples."""
    shape = stream.read(0, 1).example_shape
    if shape != batch.example_shape:
        raise UsageError(
            f"inputs of the stream {stream.name} have shape {shape}, and the clean examples {batch.example_shape}; "
            "inputs of the same shape were expected",
            Remedy("stream"),
        )


def groups_of(classes: int) -> Iterator[tuple[str, list[int]]]:
    """Yield the groups of classes of which triggers are searched in one batch, each with the name of its stage."""
    for place, first in enumerate(range(0, classes, GROUP)):
        yield f"inversion-{place}", list(range(first, min(first + GROUP, classes)))


@dataclass(frozen=True)
class Compared:
    """A model beside its controls."""

    accuracies: Mapping[str, float]
    """clean accuracy of each control, by the name of its file"""
    rank: Rank
    transfer: tuple[float, ...]
    """success of the trigger with the smallest ratio on each control"""


@dataclass(frozen=True)
class Streamed:
    """The entropies of a stream of inputs, beside those of clean examples."""

    ids: Tensor
    entropy: PerExample
    threshold: float

    @property
    def suspect(self) -> Tensor:
        """Whether the entropy of each input is below the threshold."""
        return self.entropy < self.threshold


@dataclass(frozen=True)
class Measured:
    """All measurements of the audit of a model."""

    examples: int
    """number of clean examples"""
    accuracy: float
    inverted: Inverted
    compared: Compared | None
    streamed: Streamed | None


def measure(run: Run, model: Classifier, request: BackdoorRequest, notify: Notify) -> None:
    """Take the steps of the audit that are not stored in the run.

    `model` is in eval mode. Raises `UsageError` or `TargetError` if the controls cannot be compared with it.
    """
    steps = _Steps(run, model, request, notify)
    controls = request.controls if request.training is None else steps.trained(request.training)
    steps.accuracies(controls)
    inverted = steps.inverted()
    if controls is not None:
        steps.compared(controls, inverted)
    steps.streamed()


class Settings(TypedDict):
    """Settings in `run.json` from which the finding is computed."""

    classes: Annotated[Size, Field(ge=2)]
    controls: Size
    """number of controls; 0 for none"""
    stream: Flag
    class_names: list[str] | None


class _Data(TypedDict):
    n: Size


class _Accuracy(TypedDict):
    model: Share
    controls: dict[str, Share]


class _Sizes(TypedDict):
    sizes: list[Annotated[Number, Field(gt=1e-30)]]


def measured(steps: StoredSteps) -> Measured:
    """Return the measurements of the stored steps of an audit. Raises `TargetError` if they contradict each other."""
    settings = steps.settings(Settings)
    parts = list[Columns]()
    for name, classes in groups_of(settings["classes"]):
        parts.append(steps.columns(name, _FORMS, k=len(classes)))
        if parts[-1]["id"].tolist() != classes:
            raise steps.refuse(name, f"the classes {parts[-1]['id'].tolist()}", str(classes))
    inverted, accuracy = joined(parts), steps.document(ACCURACY, _Accuracy)
    compared = streamed = None
    if settings["controls"]:
        sizes = [steps.document(f"control-{place}", _Sizes)["sizes"] for place in range(settings["controls"])]
        transfer = steps.document(TRANSFER, dict[str, Share])
        names = accuracy["controls"].keys()
        if {*map(len, sizes)} != {settings["classes"]} or not len(sizes) == len(transfer) == len(names):
            raise steps.refuse(
                TRANSFER, f"{len(transfer)} controls", f"{len(sizes)} with a size for each class"
            )
        rank = ranked(inverted.size, torch.tensor(sizes))
        compared = Compared(accuracy["controls"], rank, tuple(transfer.values()))
    if settings["stream"]:
        clean = steps.columns(STRIP_CLEAN, {"entropy": Form()})["entropy"]
        columns = steps.columns(STRIP, {"id": IDS, "entropy": Form()})
        if not len(clean):
            raise steps.refuse(STRIP_CLEAN, "no entropy", "at least one")
        streamed = Streamed(columns["id"], columns["entropy"], Strip().threshold(clean))
    return Measured(steps.data(_Data)["n"], accuracy["model"], inverted, compared, streamed)


_FORMS = {
    "id": whole("k"),
    "mask": Form(("k",), further=True, low=0, high=1),
    "pattern": Form(("k",), further=True),
    "size": Form(("k",), low=1e-30),
    "success": Form(("k",), low=0, high=1),
    "steps": whole("k"),
}


@dataclass(frozen=True)
class _Steps:
    run: Run
    model: Classifier
    request: BackdoorRequest
    notify: Notify

    @property
    def rng(self) -> Draws:
        return Draws(self.request.seed).at("backdoor")

    def trained(self, training: ControlTraining) -> Controls:
        """Train the controls that are not in the folder of the training yet."""
        epochs = self.run.document("training", lambda: {"epochs": epochs_within(training)})["epochs"]
        folder = training.folder / f"{epochs}-epochs"
        make_private(folder)
        for place in range(MIN_CONTROLS):
            path = folder / f"control-{place:02}.safetensors"
            if path.exists():
                continue
            self.notify(f"training control {place + 1} of {MIN_CONTROLS}, {epochs} epochs each")
            net = training.train(place, epochs).net
            assert isinstance(net, torch.nn.Module)
            write_atomically(path, written(net, {}))
        return Controls.of_folder(folder)

    def accuracies(self, controls: Controls | None) -> None:
        """Measure the clean accuracies of the model and of the controls, and refuse controls that differ too much."""
        batch = self.request.batch

        def compute() -> Mapping[str, Any]:
            of_controls = (
                {} if controls is None else controls.each(self.model, partial(accuracy, batch=batch))
            )
            return {"model": accuracy(self.model, batch), "controls": of_controls}

        measured = self.run.document(ACCURACY, compute)
        trained = self.request.training is not None
        refuse_other_accuracy(measured["model"], measured["controls"], len(batch), trained=trained)

    def inverted(self) -> Inverted:
        """Search the triggers of the model, one group of classes after the other."""
        groups = groups_of(self.request.classes)
        return joined([self.run.stage(name, partial(self.group, of)).columns for name, of in groups])

    def group(self, classes: list[int]) -> Columns:
        """Search the triggers of some classes of the model."""
        return self.search(self.model, classes).columns()

    def search(self, model: Classifier, classes: list[int]) -> Inverted:
        """Search the triggers of some classes of a model."""
        batch = self.request.batch
        return self.request.inversion(model, batch.x, batch.y, classes, rng=self.rng.at("inversion"))

    def compared(self, controls: Controls, inverted: Inverted) -> None:
        """Search the triggers of the controls, and measure the success of the most unusual trigger on them."""
        sizes = [
            self.run.document(f"control-{place}", partial(self.control, controls, place))["sizes"]
            for place in range(len(controls.files))
        ]
        rank = ranked(inverted.size, torch.tensor(sizes))
        trigger, others = inverted.trigger(rank.label), self.request.batch.y != rank.label
        stamped = trigger.stamped(self.request.batch.x[others], self.model.bounds)

        def success(control: Classifier) -> float:
            return float((predicted(control, stamped) == rank.label).double().mean())

        self.run.document(TRANSFER, lambda: controls.each(self.model, success))

    def control(self, controls: Controls, place: int) -> Mapping[str, Any]:
        """Search the triggers of a control, unless an earlier audit did with the same settings."""
        cache, digest = self.request.sizes, controls.digests[place]
        known = {} if cache is None else cache.read()
        if digest in known:
            return {"sizes": known[digest]}
        self.notify(f"searching the triggers of control {place + 1} of {len(controls.files)}")
        inverted = self.search(controls.opened(place, self.model), list(range(self.request.classes)))
        sizes = inverted.size.tolist()
        if cache is not None:
            cache.add(digest, sizes)
        return {"sizes": sizes}

    def streamed(self) -> None:
        """Measure the entropies of the stream, and those of one half of the clean examples; the other half is laid over
        them.
        """
        if self.request.stream is None:
            return
        batch, stream = self.request.batch, self.request.stream
        order = (
            self.rng.at("strip", "halves").bits(batch.ids.cpu()).argsort()
        )  # a file may be sorted by class
        measured, laid_over = order.to(batch.x.device).tensor_split(2)

        def entropies(inputs: Batch) -> Columns:
            overlays, rng = batch.x[laid_over], self.rng.at("strip")
            entropy = self.request.strip.entropy(self.model, inputs.x, inputs.ids, overlays, rng=rng)
            return {"id": inputs.ids.cpu(), "entropy": entropy.cpu()}

        def of_stream() -> Columns:
            starts = range(0, len(stream), _ROWS)
            pieces = [entropies(stream.read(start, start + _ROWS).to(batch.x.device)) for start in starts]
            return {name: torch.cat([piece[name] for piece in pieces]) for name in ("id", "entropy")}

        self.run.stage(STRIP_CLEAN, lambda: entropies(batch.take(measured)))
        self.run.stage(STRIP, of_stream)


@torch.no_grad()
def predicted(model: Classifier, x: Inputs) -> Tensor:
    """Return the predicted class of each input."""
    return torch.cat([model(piece).argmax(1) for piece in torch.split(x, _ROWS)])


def accuracy(model: Classifier, batch: Batch) -> float:
    """Return the share of examples that a model predicts correctly."""
    return float((predicted(model, batch.x) == batch.y).double().mean())


def epochs_within(training: ControlTraining) -> int:
    """Return how many epochs each control can be trained within the time, from the time of one epoch.

    Raises `UsageError` if the time is not enough for one.
    """
    started = time.perf_counter()
    training.train(0, 1)
    epoch_s = time.perf_counter() - started
    epochs = int((training.time_s - epoch_s) / (MIN_CONTROLS * epoch_s))
    if epochs < 1:
        needed = math.ceil(2 * (MIN_CONTROLS + 1) * epoch_s / 60)
        raise UsageError(
            f"one epoch of a control takes {epoch_s:.1f} s, so {MIN_CONTROLS} controls of at least one epoch do not "
            f"fit into the {training.time_s:.0f} s of train_controls",
            Remedy("train_controls", f"{needed}min"),
        )
    return min(epochs, MAX_EPOCHS)
