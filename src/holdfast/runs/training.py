"""A training that can be stopped anywhere: the last checkpoint and the best one, each a whole file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch

from holdfast.core.checkpoint import Checkpoint, TrainingPlan
from holdfast.core.errors import TargetError
from holdfast.store.files import usable, write_atomically
from holdfast.store.records import document

LAST, BEST = "last.safetensors", "best.safetensors"
_BATCH = "batch.json"  # there once memory has run out
_KEY = "holdfast"


@dataclass(frozen=True)
class Point:
    """One epoch as the curve shows it."""

    epoch: int
    loss: float
    """mean over the updates of the epoch"""
    accuracy: float
    """share of what was trained on that was right"""
    lr: float
    """the last learning rate"""
    batch: int
    """examples of an update"""
    clean: float
    """accuracy on the held-out examples"""
    robust: float
    """the same under the attack that chooses the checkpoint"""
    cpu_s: float
    wall_s: float
    forwards: float = 0.0
    """of an example through the network that is trained; 0 where the recipe does not count them"""
    dearer: float = 1.0
    """passes of an update at its end, in multiples of those of the first one"""
    hardware: str = ""
    """what it was trained on, in one line"""
    part: float = 1.0
    """share of the epoch that was trained"""
    share: float = 1.0
    """share of the schedules of rate and eps that was done at its end"""

    @property
    def epochs(self) -> float:
        """Epochs that are done at its end."""
        return self.epoch - 1 + self.part

    def to_json(self) -> dict[str, Any]:
        """As it is written down."""
        return dict(vars(self))


@dataclass(frozen=True)
class Kept:
    """What an earlier attempt left."""

    checkpoint: Checkpoint
    curve: tuple[Point, ...]


def keep(folder: Path, name: str, checkpoint: Checkpoint, curve: tuple[Point, ...]) -> None:
    """Write a checkpoint with the curve up to it, whole or not at all."""
    said = {
        "epoch": checkpoint.epoch,
        "of": checkpoint.of,
        "measured": dict(checkpoint.measured),
        "part": checkpoint.part,
        "updates": checkpoint.updates,
        "plans": [vars(plan) for plan in checkpoint.plans],
        "curve": [point.to_json() for point in curve],
    }
    metadata = {_KEY: json.dumps(said, sort_keys=True)}
    with usable(folder):
        folder.mkdir(exist_ok=True)
        write_atomically(folder / name, safetensors.torch.save(dict(checkpoint.tensors), metadata))


def keep_batch(folder: Path, batch: int) -> None:
    """Write down how many examples an update has from here on."""
    with usable(folder):
        folder.mkdir(exist_ok=True)
        write_atomically(folder / _BATCH, document({"batch": batch}))


def kept_batch(folder: Path) -> int | None:
    """What `keep_batch` wrote last; None where memory has never run out."""
    path = folder / _BATCH
    return int(json.loads(path.read_text())["batch"]) if path.is_file() else None


def kept(folder: Path, name: str) -> Kept | None:
    """The checkpoint of that name; None where there is none yet."""
    path = folder / name
    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            said: Mapping[str, Any] = json.loads((file.metadata() or {})[_KEY])
        tensors = safetensors.torch.load_file(path)
        curve = tuple(Point(**point) for point in said["curve"])
        plans = tuple(TrainingPlan(**plan) for plan in said["plans"])
        where = (said["part"], said["updates"], plans)
        return Kept(Checkpoint(said["epoch"], said["of"], tensors, said["measured"], *where), curve)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise TargetError(
            f"{str(path)!r} is no checkpoint of a training: {error}; restore it from a copy"
        ) from error
