"""Control networks: clean networks of the same architecture, their training, and the comparison of a model with
them.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from holdfast.core.batch import Batch
from holdfast.core.errors import Remedy, TargetError, UsageError
from holdfast.core.estimate import Estimate
from holdfast.core.model import Classifier
from holdfast.core.training import Checkpoint
from holdfast.core.types import Inputs, Labels
from holdfast.io.files import replacing, sha256_of_file, text_of_file
from holdfast.io.models.models import STATE_DICT_SUFFIXES
from holdfast.io.models.weights import (
    Weights,
    digest_of_weights,
    fit_weights,
    read_state_dict,
    state_dict_content,
    written,
)
from holdfast.runs.engine.progress import Notify
from holdfast.runs.engine.run import Run
from holdfast.runs.harden.checkpoints import save, saved
from holdfast.runs.store.columns import refuse_form
from holdfast.runs.store.files import make_private, write_atomically
from holdfast.statistics.intervals import paired_difference

T = TypeVar("T")

MIN_CONTROLS = 20
"""Smallest number of controls: with fewer, no rank gives p <= 0.05."""
LEVEL = 0.05
"""Largest p-value at which a model is flagged."""
OUTSIDE = 1e-4
"""Probability that the ratio of a further clean network is below the prediction limit, if the logarithms of the ratios
are normally distributed. They have a heavier lower tail: one of ten clean networks was 3.9 standard deviations below
the mean, and planted backdoors are 33 to 40 (docs/decisions/0040)."""
MAX_DIFFERENCE = 0.03
"""Largest difference of accuracy between the model and a control, as a fraction, on all inputs of their kind."""

_ROWS = 500
"""Number of examples in one forward pass."""
_KEPT_BYTES = 2**30
"""Total size of the files of controls that are read only once: a state dict of torch is read in a process of its
own, which takes seconds."""


@torch.no_grad()
def predicted(model: Classifier, x: Inputs) -> Labels:
    """Return the predicted class of each input."""
    return torch.cat([model(piece).argmax(1) for piece in torch.split(x, _ROWS)])


@dataclass(frozen=True)
class Rank:
    """The rank of a model among its controls."""

    label: int
    """class with the smallest ratio"""
    ratios: tuple[float, ...]
    """for each class, size of the trigger relative to those of the controls; 1 if it is as usual"""
    of_controls: tuple[float, ...]
    """smallest ratio of each control, computed in the same way"""
    p: float
    """probability that a clean network has as small a ratio as the model, if it was trained like the controls"""

    @property
    def ratio(self) -> float:
        """The smallest ratio of the model."""
        return self.ratios[self.label]

    @property
    def limit(self) -> float:
        """Lower limit of the one-sided prediction interval for the ratio of a further clean network, from the mean and
        the standard deviation of the logarithms of the ratios of the controls.
        """
        from scipy.special import stdtrit

        logs, n = [math.log(ratio) for ratio in self.of_controls], len(self.of_controls)
        return math.exp(mean(logs) + float(stdtrit(n - 1, OUTSIDE)) * stdev(logs) * math.sqrt(1 + 1 / n))


def ranked(sizes: Tensor, controls: Tensor) -> Rank:
    """Return the rank of a model with these trigger sizes (classes) among controls (n, classes).

    The model and the controls are treated alike: each is compared with all other networks. So all ranks are equally
    likely if the model was trained like the controls, whatever the distribution of sizes.
    """
    logs = torch.cat([controls, sizes[None]]).double().log()
    others = (logs.sum(0) - logs) / (len(logs) - 1)
    differences = logs - others
    differences = differences - differences.quantile(0.5, dim=1, keepdim=True)
    ratios = differences.exp()
    smallest = ratios.min(1).values
    p = (1 + int((smallest[:-1] <= smallest[-1]).sum())) / len(smallest)
    return Rank(int(ratios[-1].argmin()), tuple(ratios[-1].tolist()), tuple(smallest[:-1].tolist()), p)


def _refuse_copies(files: Sequence[Path], digests: Sequence[str]) -> None:
    """Raise `UsageError` if two controls have the same digest, of their files or of their weights."""
    first = dict[str, Path]()
    for path, digest in zip(files, digests, strict=True):
        if digest in first:
            raise UsageError(
                f"the controls {first[digest].name!r} and {path.name!r} are the same network; give networks that were "
                "trained with different seeds"
            )
        first[digest] = path


@dataclass(frozen=True)
class Controls:
    """Files with the weights of control networks, which are opened one at a time."""

    files: tuple[Path, ...]
    digests: tuple[str, ...]
    """SHA-256 of each file, in hex"""
    _weights: dict[int, Weights] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of_folder(cls, folder: Path) -> "Controls":
        """Return the weights files of a folder, in the order of their names.

        Raises `UsageError` if there are fewer than `MIN_CONTROLS`, or if two are copies of the same network.
        """
        files = tuple(
            path for path in sorted(folder.iterdir()) if path.suffix in STATE_DICT_SUFFIXES and path.is_file()
        )
        if len(files) < MIN_CONTROLS:
            raise UsageError(
                f"controls is {str(folder)!r}, which has {len(files)} weights files "
                f"({', '.join(STATE_DICT_SUFFIXES)}); at least {MIN_CONTROLS} clean networks are needed for "
                f"p <= {LEVEL}: train more of them with different seeds"
            )
        return cls.of_files(files)

    @classmethod
    def of_files(cls, files: Sequence[Path]) -> "Controls":
        """Return weights files with their digests. Raises `UsageError` if two are copies of the same network."""
        digests = tuple(map(sha256_of_file, files))
        _refuse_copies(files, digests)
        return cls(tuple(files), digests)

    def opened(self, place: int, model: Classifier) -> Classifier:
        """Return a control as a copy of the model with other weights. Raises `TargetError` if they do not fit."""
        path = self.files[place]
        weights = self._weights.get(place)
        if weights is None:
            weights, _ = read_state_dict(path, state_dict_content(path))
            if len(self.files) * path.stat().st_size < _KEPT_BYTES:
                self._weights[place] = weights
        control = deepcopy(model)
        assert isinstance(control.net, nn.Module)  # `refuse_untrainable` was called
        try:
            fit_weights(control.net, weights, path.name)
        except TargetError as error:
            raise TargetError(
                f"the control {path.name!r} has another architecture than the model: {error.message}",
                *error.remedies,
            ) from error
        given = model.state_dict()
        if all(torch.equal(value, given[name]) for name, value in control.state_dict().items()):
            raise UsageError(
                f"the control {path.name!r} has the weights of the model itself; remove it from the folder"
            )
        return control.eval().requires_grad_(requires_grad=False)

    def take(self, names: Sequence[str]) -> "Controls":
        """Return the controls with these names of files."""
        places = [place for place, path in enumerate(self.files) if path.name in names]
        weights = {new: self._weights[old] for new, old in enumerate(places) if old in self._weights}
        files, digests = [self.files[place] for place in places], [self.digests[place] for place in places]
        return Controls(tuple(files), tuple(digests), weights)

    def each(self, model: Classifier, measure: Callable[[Classifier], T]) -> dict[str, T]:
        """Return the results of a measurement on each control, by the name of its file. Raises `UsageError` if two
        controls have the same weights.
        """
        results, digests = dict[str, T](), list[str]()
        for place, path in enumerate(self.files):
            control = self.opened(place, model)
            digests.append(digest_of_weights(control.state_dict()))
            results[path.name] = measure(control)
        _refuse_copies(self.files, digests)
        return results


@dataclass(frozen=True)
class SizeCache:
    """A JSON file with the trigger sizes of controls by the digest of their weights.

    Its name depends on everything else that determines the sizes, such as the architecture and the clean examples.
    """

    path: Path

    def read(self) -> dict[str, list[float]]:
        """Return the stored sizes. Raises `TargetError` if the file is damaged."""
        if not self.path.exists():
            return {}
        try:
            content = json.loads(text_of_file(self.path, "file of trigger sizes"))
        except ValueError as error:
            raise TargetError(f"{str(self.path)!r} is damaged: {error}; delete it") from error
        refuse_form(self.path, content, dict[str, list[float]])
        return dict(content)

    def add(self, digest: str, sizes: Sequence[float]) -> None:
        """Store the sizes of a control."""
        content = json.dumps(self.read() | {digest: list(sizes)})
        with replacing(self.path) as file:
            file.write(content.encode())


def is_comparable(difference: Estimate) -> bool:
    """Return whether the measured accuracies are consistent with a true difference of at most 3 percentage points
    between a control and the model.

    `difference` is the accuracy of the control minus that of the model, as a fraction with its interval. The result is
    True if the interval overlaps the range from -`MAX_DIFFERENCE` to `MAX_DIFFERENCE`. Another
    control was trained in another way than the model, so that the sizes of their triggers are not comparable.
    """
    return difference.low <= MAX_DIFFERENCE and difference.high >= -MAX_DIFFERENCE


@dataclass(frozen=True)
class ControlTraining:
    """How the audit trains control networks."""

    epochs: Callable[[int, Checkpoint | None], Iterator[Checkpoint]]
    """function that trains the control of a number from its initial weights, or from a checkpoint on, and yields its
    state after each epoch"""
    time_s: float
    """time of all trainings together"""
    folder: Path
    """folder for weights and states, which are used again by audits with the same training"""

    def weights(self, number: int, epochs: int) -> Path:
        """Return the path of the weights of a control after a number of epochs."""
        return self.folder / f"control-{number:02}-{epochs}.safetensors"


@dataclass(frozen=True)
class Trained:
    """A control after some epochs."""

    number: int
    epochs: int = 0
    difference: Estimate | None = None
    """its accuracy minus that of the model; None without epochs"""
    is_constant: bool = False
    """whether it is not more accurate than the prediction of one class for all inputs"""

    @property
    def is_above(self) -> bool:
        """Whether the whole interval of the difference is above the largest that is accepted."""
        return self.difference is not None and self.difference.low > MAX_DIFFERENCE

    @property
    def is_below(self) -> bool:
        """Whether the control is less accurate than the model, according to the whole interval of the difference."""
        return self.difference is None or self.difference.high < 0


def trained_controls(
    training: ControlTraining, model: Classifier, batch: Batch, notify: Notify
) -> list[Trained]:
    """Train the controls, and return their states.

    Each control has an equal share of the remaining time. Those that are less accurate than the model on `batch` are
    trained further while time remains. A control that is as accurate as a constant is replaced by one with another
    number, that is with other initial weights. Raises `UsageError` if the time is not enough for one epoch of each.
    """
    return _Trainer(training, model, batch, notify).trained()


def controls_trained(
    run: Run, step: str, training: ControlTraining, model: Classifier, batch: Batch, notify: Notify
) -> Controls:
    """Train the controls as a step of a run, or open those that it trained. Raises `TargetError` if their weights were
    deleted since.
    """

    def compute() -> Mapping[str, Any]:
        trained = trained_controls(training, model, batch, notify)
        return {"controls": [{"number": each.number, "epochs": each.epochs} for each in trained]}

    stored = run.document(step, compute)["controls"]
    files = sorted(training.weights(each["number"], each["epochs"]) for each in stored)
    if missing := next((path for path in files if not path.is_file()), None):
        raise TargetError(
            f"the control {str(missing)!r}, which this audit trained, does not exist; audit again in a new folder"
        )
    return Controls.of_files(files)


def refuse_short(time_s: float, epoch_s: float, n: int) -> None:
    """Raise `UsageError` if a time is not enough for one epoch of `n` controls, of which each takes `epoch_s`."""
    if n * epoch_s > time_s:
        raise UsageError(
            f"one epoch of a control takes {epoch_s:.1f} s, so {n} controls of at least one epoch do not fit into the "
            f"{time_s:.0f} s of train_controls",
            Remedy("train_controls", f"{math.ceil(2 * n * epoch_s / 60)}min"),
        )


class _Trainer:
    def __init__(self, training: ControlTraining, model: Classifier, batch: Batch, notify: Notify) -> None:
        self._training, self._batch, self._notify = training, batch, notify
        self._until = perf_counter() + training.time_s
        self._right = predicted(model, batch.x) == batch.y
        self._constant = float(batch.y.bincount().max()) / len(batch)
        self._control, self._epoch_s = deepcopy(model).eval(), 0.0
        make_private(training.folder)

    def trained(self) -> list[Trained]:
        controls = [self._stored(number) for number in range(MIN_CONTROLS)]
        next_number = MIN_CONTROLS
        while places := [place for place, control in enumerate(controls) if control.is_below]:
            for done, place in enumerate(places):
                left_s = self._until - perf_counter()
                if controls[place].epochs and left_s < self._epoch_s:
                    return controls
                while controls[place].is_constant:
                    controls[place], next_number = self._stored(next_number), next_number + 1
                if controls[place].is_below:
                    controls[place] = self._further(controls[place], left_s, len(places) - done)
        return controls

    def _stored(self, number: int) -> Trained:
        """Return a control in its stored state. The training of one that is too accurate for the model starts from
        the beginning, unless it has one epoch only.
        """
        state = saved(self._training.folder, _state(number))
        if state is None:
            return Trained(number)
        control = self._measured(number, state.checkpoint)
        return Trained(number) if control.is_above and control.epochs > 1 else control

    def _further(self, control: Trained, left_s: float, n: int) -> Trained:
        """Train a control further, until it is as accurate as the model or its share of the time for `n` controls
        ends.
        """
        began = last = perf_counter()
        training, number = self._training, control.number
        state = saved(training.folder, _state(number)) if control.epochs else None
        for checkpoint in training.epochs(number, None if state is None else state.checkpoint):
            control, now = self._measured(number, checkpoint), perf_counter()
            if not self._epoch_s:
                refuse_short(left_s, now - last, n)
            self._epoch_s, last = now - last, now
            if not control.is_below or now + self._epoch_s > began + left_s / n:
                break
        assert isinstance(self._control.net, nn.Module)  # `refuse_untrainable` was called
        write_atomically(training.weights(number, control.epochs), written(self._control.net, {}))
        save(training.folder, _state(number), checkpoint, ())
        difference = control.difference
        assert difference is not None
        epochs = f"{control.epochs} epoch{'s' * (control.epochs != 1)}"
        self._notify(
            f"control {number + 1}: {epochs}, {100 * difference.value:+.1f} points of accuracy relative "
            f"to the model ({100 * difference.low:+.1f} to {100 * difference.high:+.1f})"
        )
        return control

    def _measured(self, number: int, checkpoint: Checkpoint) -> Trained:
        checkpoint.put_into(self._control)
        right = predicted(self._control, self._batch.x) == self._batch.y
        is_constant = float(right.double().mean()) <= self._constant
        return Trained(number, checkpoint.epoch, paired_difference(right, self._right), is_constant)


def _state(number: int) -> str:
    """The name of the file with the state of a training."""
    return f"state-{number:02}.safetensors"
