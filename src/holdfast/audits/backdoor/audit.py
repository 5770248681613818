"""The steps of the audit of a model: trigger inversion, controls, and STRIP for a stream of inputs."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
from holdfast.runs.store.files import make_private, write_atomically

CLEAN = 2000
"""Number of clean examples of the audit, at most: 5 % of the training examples of most data sets."""
GROUP = 5
"""Number of classes of which triggers are searched in one batch; a stopped search continues after the last group."""
MAX_EPOCHS = 10
"""Largest number of epochs of a control that the audit trains."""
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

    def steps(self) -> tuple[str, ...]:
        """Return the names of the steps, in their order."""
        n = MIN_CONTROLS if self.controls is None else len(self.controls.files)
        compared = self.controls is not None or self.training is not None
        return (
            *(("training",) if self.training else ()),
            "accuracy",
            *(f"inversion-{group}" for group in range(len(self.groups))),
            *((*(f"control-{place}" for place in range(n)), "transfer") if compared else ()),
            *(("strip-clean", "strip") if self.stream is not None else ()),
        )

    @property
    def groups(self) -> list[list[int]]:
        """The classes, divided into the groups of which triggers are searched in one batch."""
        return [list(range(self.classes))[first : first + GROUP] for first in range(0, self.classes, GROUP)]


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

    batch: Batch
    accuracy: float
    inverted: Inverted
    compared: Compared | None
    streamed: Streamed | None


def measured(run: Run, model: Classifier, request: BackdoorRequest, notify: Notify) -> Measured:
    """Take the steps of the audit that are not stored in the run, and return all measurements.

    `model` is in eval mode. Raises `UsageError` or `TargetError` if the controls cannot be compared with it.
    """
    steps = _Steps(run, model, request, notify)
    controls = request.controls if request.training is None else steps.trained(request.training)
    accuracies = steps.accuracies(controls)
    inverted = steps.inverted()
    compared = None if controls is None else steps.compared(controls, accuracies["controls"], inverted)
    return Measured(request.batch, accuracies["model"], inverted, compared, steps.streamed())


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

    def accuracies(self, controls: Controls | None) -> Mapping[str, Any]:
        """Measure the clean accuracies of the model and of the controls, and refuse controls that differ too much."""
        batch = self.request.batch

        def compute() -> Mapping[str, Any]:
            of_controls = (
                {} if controls is None else controls.each(self.model, partial(accuracy, batch=batch))
            )
            return {"model": accuracy(self.model, batch), "controls": of_controls}

        measured = self.run.document("accuracy", compute)
        trained = self.request.training is not None
        refuse_other_accuracy(measured["model"], measured["controls"], len(batch), trained=trained)
        return measured

    def inverted(self) -> Inverted:
        """Search the triggers of the model, one group of classes after the other."""
        groups = enumerate(self.request.groups)
        return joined(
            [self.run.stage(f"inversion-{place}", partial(self.group, of)).columns for place, of in groups]
        )

    def group(self, classes: list[int]) -> Columns:
        """Search the triggers of some classes of the model."""
        return self.search(self.model, classes).columns()

    def search(self, model: Classifier, classes: list[int]) -> Inverted:
        """Search the triggers of some classes of a model."""
        batch = self.request.batch
        return self.request.inversion(model, batch.x, batch.y, classes, rng=self.rng.at("inversion"))

    def compared(self, controls: Controls, accuracies: Mapping[str, float], inverted: Inverted) -> Compared:
        """Search the triggers of the controls, and rank the model among them."""
        sizes = [
            self.run.document(f"control-{place}", partial(self.control, controls, place))["sizes"]
            for place in range(len(controls.files))
        ]
        rank = ranked(inverted.size, torch.tensor(sizes))
        trigger, others = inverted.trigger(rank.label), self.request.batch.y != rank.label
        stamped = trigger.stamped(self.request.batch.x[others], self.model.bounds)

        def success(control: Classifier) -> float:
            return float((predicted(control, stamped) == rank.label).double().mean())

        transfer = self.run.document("transfer", lambda: controls.each(self.model, success))
        return Compared(accuracies, rank, tuple(transfer.values()))

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

    def streamed(self) -> Streamed | None:
        """Measure the entropies of the stream, and those of one half of the clean examples; the other half is laid over
        them.
        """
        if self.request.stream is None:
            return None
        batch, stream = self.request.batch, self.request.stream
        half = len(batch) // 2

        def entropies(inputs: Batch) -> Columns:
            overlays, rng = batch.x[half:], self.rng.at("strip")
            entropy = self.request.strip.entropy(self.model, inputs.x, inputs.ids, overlays, rng=rng)
            return {"id": inputs.ids.cpu(), "entropy": entropy.cpu()}

        def of_stream() -> Columns:
            starts = range(0, len(stream), _ROWS)
            pieces = [entropies(stream.read(start, start + _ROWS).to(batch.x.device)) for start in starts]
            return {name: torch.cat([piece[name] for piece in pieces]) for name in ("id", "entropy")}

        clean = self.run.stage("strip-clean", lambda: entropies(batch.take(torch.arange(half)))).columns
        columns = self.run.stage("strip", of_stream).columns
        threshold = self.request.strip.threshold(clean["entropy"])
        return Streamed(columns["id"], columns["entropy"], threshold)


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
