"""Stores the checkpoints of a training: the last one and the best one, each in a file that is written atomically."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch

from holdfast.core.checkpoint import Checkpoint, TrainingPlan
from holdfast.core.errors import TargetError
from holdfast.runs.store.files import make_private, usable, write_atomically
from holdfast.runs.store.records import document

LAST, BEST = "last.safetensors", "best.safetensors"
_WITHIN = "within.safetensors"  # the last checkpoint within an epoch
_BATCH = "batch.json"  # exists after memory ran out
_KEY = "holdfast"
_OTHER_CLASSES = (
    0.02  # predictions of other classes, per example of them, up to which a network counts as constant
)


@dataclass(frozen=True)
class Point:
    """Measurements at the end of an epoch, which are a point of the training curve. Within a time budget, short epochs
    may have none.
    """

    epoch: int
    loss: float
    """mean training loss over the updates of the epoch"""
    accuracy: float
    """accuracy on the training examples of the epoch"""
    lr: float
    """learning rate at the end of the epoch"""
    batch: int
    """number of examples in an update"""
    clean: float
    """clean accuracy on the held-out examples"""
    robust: float
    """accuracy on the held-out examples under the attack by which the checkpoint is chosen"""
    cpu_s: float
    """seconds of CPU time since the previous point"""
    wall_s: float
    """wall-clock seconds since the previous point"""
    forwards: float = 0.0
    """number of forward passes of an example through the trained network since the previous point, on average; 0 if the
    recipe does not count them"""
    dearer: float = 1.0
    """passes of an update at the end of the epoch, as a multiple of the passes of the first update"""
    hardware: str = ""
    """description of the hardware, in one line"""
    part: float = 1.0
    """fraction of the epoch that was trained"""
    share: float = 1.0
    """fraction of the schedules of learning rate and eps that was done at the end of the epoch"""
    certified: float | None = None
    """accuracy on the held-out examples that bounds prove, by which the checkpoint of a certified training is chosen;
    None for other recipes"""

    most_predicted: float = 0.0
    """share of the held-out examples for which the network predicts its most frequent class, on clean inputs"""
    class_share: float = 0.0
    """share of the held-out examples whose label is that class"""

    @property
    def epochs(self) -> float:
        """Number of epochs that were trained by the end of this epoch. It is fractional if this epoch is incomplete."""
        return self.epoch - 1 + self.part

    @property
    def is_constant(self) -> bool:
        """Whether the network predicts one class for nearly all held-out examples, also for those of other classes."""
        return 1 - self.most_predicted <= _OTHER_CLASSES * (1 - self.class_share)

    @property
    def score(self) -> tuple[float, float]:
        """Measurements by which the checkpoint is chosen: the certified accuracy if it was measured, otherwise that
        under attack, and at equality the clean accuracy.
        """
        return self.robust if self.certified is None else self.certified, self.clean

    def to_json(self) -> dict[str, Any]:
        """Return the measurements of the epoch as a dictionary for JSON."""
        return dict(vars(self))


def last_epoch(curve: Sequence[Point]) -> int:
    """Return the number of epochs up to the last point of a training curve."""
    return curve[-1].epoch if curve else 0


@dataclass(frozen=True)
class SavedCheckpoint:
    """A saved checkpoint of a training, with the training curve up to it."""

    checkpoint: Checkpoint
    curve: tuple[Point, ...]
    batch: int = 0
    """number of examples in an update; 0 if the checkpoint is not within an epoch"""
    spent_s: tuple[float, float] = (0.0, 0.0)
    """seconds of CPU time and wall-clock time in the epoch of a checkpoint within it"""


def save(
    folder: Path,
    name: str,
    checkpoint: Checkpoint,
    curve: tuple[Point, ...],
    *,
    batch: int = 0,
    spent_s: tuple[float, float] = (0.0, 0.0),
) -> None:
    """Write a checkpoint and the training curve up to it to the file `name` in `folder`, atomically. `batch` and
    `spent_s` are those of a checkpoint within an epoch.
    """
    metadata_of_checkpoint = {
        "epoch": checkpoint.epoch,
        "of": checkpoint.of,
        "measured": dict(checkpoint.measured),
        "part": checkpoint.part,
        "updates": checkpoint.updates,
        "plans": [vars(plan) for plan in checkpoint.plans],
        "step": checkpoint.step,
        "batch": batch,
        "spent_s": spent_s,
        "curve": [point.to_json() for point in curve],
    }
    metadata = {_KEY: json.dumps(metadata_of_checkpoint, sort_keys=True)}
    with usable(folder):
        make_private(folder)
        write_atomically(folder / name, safetensors.torch.save(dict(checkpoint.tensors), metadata))


def save_within(
    folder: Path, checkpoint: Checkpoint, curve: tuple[Point, ...], batch: int, spent_s: tuple[float, float]
) -> None:
    """Write a checkpoint within an epoch. It replaces the one before."""
    save(folder, _WITHIN, checkpoint, curve, batch=batch, spent_s=spent_s)


def saved_within(folder: Path, epoch: int, batch: int) -> SavedCheckpoint | None:
    """Return the checkpoint within an epoch that was stored after the end of epoch `epoch`, with batches of `batch`
    examples, or None if there is none.
    """
    within = saved(folder, _WITHIN)
    return within if within and within.checkpoint.epoch >= epoch and within.batch == batch else None


def seconds_within(folder: Path, epoch: int) -> float:
    """Return the wall-clock seconds from the end of epoch `epoch` to the last checkpoint within an epoch after it."""
    within = saved(folder, _WITHIN)
    return within.spent_s[1] if within is not None and within.checkpoint.epoch >= epoch else 0.0


def delete_within(folder: Path) -> None:
    """Delete the checkpoint within an epoch, after the end of the epoch is stored."""
    (folder / _WITHIN).unlink(missing_ok=True)


def save_batch(folder: Path, batch: int) -> None:
    """Save the batch size that a training uses for its next updates."""
    with usable(folder):
        make_private(folder)
        write_atomically(folder / _BATCH, document({"batch": batch}))


def saved_batch(folder: Path) -> int | None:
    """Return the batch size that `save_batch` saved last, or None if memory has never run out in this training."""
    path = folder / _BATCH
    return int(json.loads(path.read_text())["batch"]) if path.is_file() else None


def saved(folder: Path, name: str) -> SavedCheckpoint | None:
    """Return the checkpoint of a training in the file `name` of `folder`, or None if there is no such file.

    Raises `TargetError` if the file is invalid.
    """
    path = folder / name
    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            description: Mapping[str, Any] = json.loads((file.metadata() or {})[_KEY])
        tensors = safetensors.torch.load_file(path)
        curve = tuple(Point(**point) for point in description["curve"])
        plans = tuple(TrainingPlan(**plan) for plan in description["plans"])
        where = (description["part"], description["updates"], plans, description["step"])
        cpu_s, wall_s = description["spent_s"]
        return SavedCheckpoint(
            Checkpoint(description["epoch"], description["of"], tensors, description["measured"], *where),
            curve,
            description["batch"],
            (cpu_s, wall_s),
        )
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise TargetError(
            f"{str(path)!r} is no checkpoint of a training: {error}; restore it from a copy"
        ) from error
