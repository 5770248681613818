"""Training of control networks: each is trained until it is as accurate as the model, or until the time ends.

The state of each training is stored after each turn, so that a later audit uses the controls again, and trains those
further that are less accurate than its model.
"""

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from torch import nn

from holdfast.audits.backdoor.controls import MAX_DIFFERENCE, MIN_CONTROLS, predicted
from holdfast.core.batch import Batch
from holdfast.core.checkpoint import Checkpoint
from holdfast.core.errors import UsageError
from holdfast.core.estimate import Estimate
from holdfast.core.model import Classifier
from holdfast.core.remedies import Remedy
from holdfast.io.models.weights import written
from holdfast.runs.engine.progress import Notify
from holdfast.runs.harden.checkpoints import save, saved
from holdfast.runs.store.files import make_private, write_atomically
from holdfast.statistics.intervals import paired_difference


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
        """Return a control in its stored state. One that is too accurate for the model begins anew, unless it has one
        epoch only.
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
