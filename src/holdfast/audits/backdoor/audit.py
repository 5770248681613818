"""The steps of the audit of a model: trigger inversion, controls, and STRIP for a stream of inputs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from holdfast.audits.backdoor import measurements
from holdfast.audits.backdoor.controls import (
    MIN_CONTROLS,
    Controls,
    ControlTraining,
    SizeCache,
    predicted,
    ranked,
    trained_controls,
)
from holdfast.audits.backdoor.inversion import Inversion, Inverted, Strip, joined
from holdfast.core.batch import Batch, Data
from holdfast.core.draws import Draws
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.evidence import Columns
from holdfast.core.model import Classifier
from holdfast.core.remedies import Remedy
from holdfast.core.types import Mask
from holdfast.runs.engine.progress import Notify
from holdfast.runs.engine.run import Run
from holdfast.statistics.intervals import mcnemar

CLEAN = 2000
"""Number of clean examples of the audit, at most: 5 % of the training examples of most data sets."""
_ROWS = 500
"""Number of inputs of the stream that are read at once."""


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
            *((measurements.TRAINING,) if self.training else ()),
            measurements.ACCURACY,
            *(name for name, _ in measurements.groups_of(self.classes)),
            *((*(f"control-{place}" for place in range(n)), measurements.TRANSFER) if n else ()),
            *((measurements.STRIP_CLEAN, measurements.STRIP) if self.stream is not None else ()),
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


def measure(run: Run, model: Classifier, request: BackdoorRequest, notify: Notify) -> None:
    """Take the steps of the audit that are not stored in the run.

    `model` is in eval mode. Raises `UsageError` or `TargetError` for controls of another architecture or copies.
    """
    steps = _Steps(run, model, request, notify)
    controls = request.controls if request.training is None else steps.trained(request.training)
    accuracies = steps.accuracies(controls)
    inverted = steps.inverted()
    if controls is not None:
        steps.compared(controls, inverted, accuracies)
    steps.streamed()


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
        """Train the controls. Raises `TargetError` if their weights were deleted since."""

        def compute() -> Mapping[str, Any]:
            trained = trained_controls(training, self.model, self.request.batch, self.notify)
            return {"controls": [{"number": each.number, "epochs": each.epochs} for each in trained]}

        stored = self.run.document(measurements.TRAINING, compute)["controls"]
        files = sorted(training.weights(each["number"], each["epochs"]) for each in stored)
        if missing := next((path for path in files if not path.is_file()), None):
            raise TargetError(
                f"the control {str(missing)!r}, which this audit trained, does not exist; audit again in a new folder"
            )
        return Controls.of_files(files)

    def accuracies(self, controls: Controls | None) -> measurements.Accuracies:
        """Measure the clean accuracies of the model and of the controls."""
        batch = self.request.batch

        def right(model: Classifier) -> Mask:
            return predicted(model, batch.x) == batch.y

        def compute() -> Mapping[str, Any]:
            of_model = right(self.model)

            def beside(control: Classifier) -> measurements.Beside:
                test = mcnemar(right(control), of_model)
                return {"ahead": test.only_first, "behind": test.only_second}

            of_controls = {} if controls is None else controls.each(self.model, beside)
            return {"model": float(of_model.double().mean()), "controls": of_controls}

        stored = self.run.document(measurements.ACCURACY, compute)
        return {"model": stored["model"], "controls": dict(stored["controls"])}

    def inverted(self) -> Inverted:
        """Search the triggers of the model, one group of classes after the other."""
        groups = measurements.groups_of(self.request.classes)
        return joined([self.run.stage(name, partial(self.group, of)).columns for name, of in groups])

    def group(self, classes: list[int]) -> Columns:
        """Search the triggers of some classes of the model."""
        return self.search(self.model, classes).columns()

    def search(self, model: Classifier, classes: list[int]) -> Inverted:
        """Search the triggers of some classes of a model."""
        batch = self.request.batch
        return self.request.inversion(model, batch.x, batch.y, classes, rng=self.rng.at("inversion"))

    def compared(self, controls: Controls, inverted: Inverted, accuracies: measurements.Accuracies) -> None:
        """Search the triggers of the controls that are comparable, if they are enough, and measure the success of the
        most unusual trigger on them. For the other controls, empty documents are stored.
        """
        beside = measurements.controls_of(accuracies, len(self.request.batch))
        used = [control.name for control in beside if control.is_comparable]
        used = used if len(used) >= MIN_CONTROLS else []
        sizes = []
        for place, path in enumerate(controls.files):
            compute = partial(self.control, controls, place) if path.name in used else _no_sizes
            sizes.append(self.run.document(f"control-{place}", compute)["sizes"])
        if not used:
            self.run.document(measurements.TRANSFER, dict)
            return
        rank = ranked(inverted.size, torch.tensor([each for each in sizes if each]))
        trigger, others = inverted.trigger(rank.label), self.request.batch.y != rank.label
        stamped = trigger.stamped(self.request.batch.x[others], self.model.bounds)

        def success(control: Classifier) -> float:
            return float((predicted(control, stamped) == rank.label).double().mean())

        self.run.document(measurements.TRANSFER, lambda: controls.take(used).each(self.model, success))

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

        self.run.stage(measurements.STRIP_CLEAN, lambda: entropies(batch.take(measured)))
        self.run.stage(measurements.STRIP, of_stream)


def _no_sizes() -> Mapping[str, Any]:
    """The document of a control that is not compared."""
    return {"sizes": []}
