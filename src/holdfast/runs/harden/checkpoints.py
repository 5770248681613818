"""Stores the checkpoints of a training, and sends its measurements to experiment trackers."""

import csv
import io
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import safetensors
import safetensors.torch

from holdfast.core.errors import Interrupted, TargetError, UsageError, importing
from holdfast.core.training import Checkpoint, TrainingPlan
from holdfast.runs.engine.progress import Notify, ignore
from holdfast.runs.store.files import CHECKPOINTS, make_private, usable, write_atomically
from holdfast.runs.store.folder import document

Values = Mapping[str, float | int | str | None]
"""Measurements by name"""
_MLFLOW = {
    # with its own defaults, a training waits for minutes if the server is down
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    # a folder is written only if this is set
    "MLFLOW_ALLOW_FILE_STORE": "true",
}
"""Environment variables of MLflow, if they are not set already."""


class Ended(Enum):
    """How a run ended: by itself, by an interrupt or by an error. The values are names in MLflow."""

    FINISHED = "FINISHED"
    KILLED = "KILLED"
    FAILED = "FAILED"


_WANDB = {Ended.FINISHED: 0, Ended.KILLED: 255, Ended.FAILED: 1}
"""Exit codes from which Weights & Biases determines the state of a run."""


class Tracker(Protocol):
    """Protocol of an experiment tracker."""

    def start(self) -> None:
        """Connect to the server or the database, which may take seconds, before the training begins."""

    def log(self, values: Values, step: int) -> None:
        """Record the measurements of an epoch. `step` is its number among all epochs of the run, from 1."""

    def close(self, ended: Ended) -> None:
        """Write what is not written yet, and how the run ended."""


class CSVTracker:
    """A CSV file with one row for each epoch. An epoch that has a row already is not written again."""

    def __init__(self, path: Path, columns: Sequence[str], *, resume: bool) -> None:
        """Read the file, in which a resumed run continues, without changing it. Raises `UsageError` if it has rows of
        another run, or is not a log with these columns.
        """
        self._path, self._header, self._n_rows = path, ",".join(columns), 0
        content = self._content()
        other = f"csv:{path.with_stem(path.stem + '-2')}"
        first, end, _ = content.partition("\n")
        if first != self._header and (end or not self._header.startswith(first)):
            raise UsageError(
                f"the log {str(path)!r} exists and is not a log of a training, whose first line is {self._header}; "
                f"give another file, as in {other}"
            )
        if content and not resume:
            raise UsageError(
                f"the log {str(path)!r} exists and has rows of another run; delete it, or give another file as in "
                f"{other}"
            )

    def start(self) -> None:
        """Remove an incomplete last row, which a kill may leave, and count the others."""
        content = self._content()
        complete = content[: content.rfind("\n") + 1]
        if complete != content:
            self._path.write_text(complete, encoding="utf-8")
        self._n_rows = max(complete.count("\n") - 1, 0)

    def _content(self) -> str:
        return self._path.read_text(encoding="utf-8") if self._path.exists() else ""

    def log(self, values: Values, step: int) -> None:
        """Append a row with the measurements of an epoch."""
        if step <= self._n_rows:
            return
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if not self._path.exists() or not self._path.stat().st_size:
            text.write(f"{self._header}\n")
        writer.writerow(["" if value is None else value for value in values.values()])
        with self._path.open("a", encoding="utf-8") as file:
            file.write(text.getvalue())
        self._n_rows = step

    def close(self, ended: Ended) -> None:
        """Do nothing, because each row is written at once."""


class TensorBoardTracker:
    """A folder with event files of TensorBoard. A resumed run continues in the same folder."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._writer: Any = None
        self._create: Callable[..., Any] = _imported("tensorboard", "torch.utils.tensorboard").SummaryWriter

    def start(self) -> None:
        """Do nothing, because the event file begins at the first epoch that is logged."""

    def log(self, values: Values, step: int) -> None:
        """Add a scalar for each measurement."""
        if self._writer is None:
            # events of epochs that are trained again after a resume are not shown
            self._writer = self._create(self._folder, purge_step=step)
        for name, value in _scalars(values).items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, ended: Ended) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()


class MLflowTracker:
    """A run of MLflow at a tracking URI: a folder, a database or a server. A resumed run continues it."""

    def __init__(self, uri: str, known: str | None, keep: Callable[[str], None]) -> None:
        """Prepare the run `known`, or a new one whose id is passed to `keep`."""
        for name, value in _MLFLOW.items():
            os.environ.setdefault(name, value)
        self._mlflow, self._uri, self._run, self._keep = _imported("mlflow", "mlflow"), uri, known, keep
        self._client: Any = None

    def start(self) -> None:
        """Create the run in the experiment `holdfast`, or continue it."""
        self._client = self._mlflow.MlflowClient(tracking_uri=self._uri)
        if self._run is None:
            experiment = self._client.get_experiment_by_name("holdfast")
            number = (
                self._client.create_experiment("holdfast") if experiment is None else experiment.experiment_id
            )
            self._run = str(self._client.create_run(number).info.run_id)
            self._keep(self._run)
        self._client.update_run(self._run, "RUNNING")

    def log(self, values: Values, step: int) -> None:
        """Log a metric for each measurement."""
        now_ms, metric = int(1000 * time.time()), self._mlflow.entities.Metric
        metrics = [metric(name, value, now_ms, step) for name, value in _scalars(values).items()]
        self._client.log_batch(self._run, metrics=metrics)  # one request

    def close(self, ended: Ended) -> None:
        """Set the status of the run."""
        if self._run is not None and self._client is not None:
            self._client.set_terminated(self._run, ended.value)


class WandBTracker:
    """A run of Weights & Biases in a project. A resumed run continues it."""

    def __init__(self, project: str, known: str | None, keep: Callable[[str], None]) -> None:
        """Prepare the run `known`, or a new one whose id is passed to `keep`."""
        self._wandb, self._project, self._known, self._keep = (
            _imported("wandb", "wandb"),
            project,
            known,
            keep,
        )
        self._run: Any = None

    def start(self) -> None:
        """Create the run in the project, or continue it."""
        self._run = self._wandb.init(
            project=self._project,
            id=self._known,
            resume="allow" if self._known else None,
            settings=self._wandb.Settings(silent=True, init_timeout=30),
        )
        self._keep(str(self._run.id))

    def log(self, values: Values, step: int) -> None:
        """Log all measurements."""
        self._run.log(dict(_scalars(values)), step=step)

    def close(self, ended: Ended) -> None:
        """Send what was not sent yet."""
        if self._run is not None:
            self._run.finish(exit_code=_WANDB[ended])


def open_tracker(
    kind: str,
    place: str,
    known: str | None,
    keep: Callable[[str], None],
    *,
    columns: Sequence[str],
    resume: bool,
) -> Tracker:
    """Return an experiment tracker of a kind at a place, such as `csv` and a file.

    `known` is the id of the tracker's run if this run is resumed, and `keep` stores the id of a new one. `columns` are
    the names of all measurements. Raises `UsageError` if a package is missing or a CSV file has other content, and
    `TargetError` if the file cannot be written.
    """
    if kind == "tensorboard":
        return TensorBoardTracker(place)
    if kind == "mlflow":
        return MLflowTracker(place, known, keep)
    if kind == "wandb":
        return WandBTracker(place, known, keep)
    try:
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        return CSVTracker(Path(place), columns, resume=resume)
    except (OSError, UnicodeDecodeError) as error:
        raise TargetError(f"the log {place!r} cannot be written: {error}; give another file") from error


def _scalars(values: Values) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}


def _imported(package: str, module: str) -> Any:
    missing = f"the log is {package}, and the package {package} is missing"
    importing(package, missing, "log")  # torch has a module for TensorBoard, which needs the package
    return importing(module, missing, "log")


LAST, BEST = "last.safetensors", "best.safetensors"
_WITHIN = "within.safetensors"  # the last checkpoint within an epoch
_BATCH = "batch.json"  # exists after memory ran out
_KEY = "holdfast"
_OTHER_CLASSES = 0.02
"""Predictions of other classes, per example of them, up to which a network counts as constant."""


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


_IDS = "trackers.json"
"""File beside the checkpoints of a run with the ids of the runs of the experiment trackers."""


@dataclass(frozen=True)
class EpochRecord:
    """Measurements of one epoch of a training."""

    attempt: int
    """number of the attempt, from 1; `auto` may make several"""
    recipe: str
    epoch: int
    """number of the epoch in its attempt, from 1"""
    loss: float
    """mean training loss over the updates of the epoch"""
    accuracy: float
    """accuracy on the training inputs of the epoch"""
    clean: float
    """clean accuracy on the held-out examples"""
    robust: float
    """accuracy on the held-out examples under the attack by which the checkpoint is chosen"""
    certified: float | None
    """proved accuracy on the held-out examples; None if the recipe is not a certified training"""
    lr: float
    """learning rate of the last update, of the first parameter group"""
    passes: float
    """number of forward passes of an example since the previous record, on average"""
    seconds: float
    """wall-clock seconds since the previous record, with the evaluation"""


OnEpoch = Callable[[EpochRecord], None]
"""function of the user that is called with the measurements of each epoch"""


@dataclass
class EpochLog:
    """The function of the user and the trackers to which each epoch is reported.

    A tracker that raises an exception is reported once and not used again. An exception of the function of the user
    stops the run, whose last checkpoint contains the epoch.
    """

    on_epoch: OnEpoch | None = None
    trackers: dict[str, Tracker] = field(default_factory=dict)
    """trackers by the text of their settings"""
    notify: Notify = ignore
    again: str = ""
    """sentence on how to resume the run"""
    _n_logged: int = 0

    def start(self) -> None:
        """Start all trackers."""
        for name in list(self.trackers):
            self._attempted(name, self.trackers[name].start)

    def resumed(self, attempt: int, recipe: str, curve: Sequence[Point]) -> None:
        """Add stored epochs of an attempt to the trackers that may lack them, as after a kill."""
        for point in curve:
            self._track(_record(attempt, recipe, point), is_new=False)

    def epoch(self, attempt: int, recipe: str, point: Point) -> None:
        """Report an epoch that is stored in a checkpoint."""
        record = _record(attempt, recipe, point)
        self._track(record, is_new=True)
        if self.on_epoch is None:
            return
        try:
            self.on_epoch(record)
        except Exception as error:
            error.add_note(f"on_epoch raised this after epoch {record.epoch} of {recipe}; {self.again}")
            raise

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Context manager that closes all trackers at the end of a run, and passes to them how it ended."""
        ended = Ended.FAILED
        try:
            yield
            ended = Ended.FINISHED
        except (KeyboardInterrupt, Interrupted):
            ended = Ended.KILLED
            raise
        finally:
            for name in list(self.trackers):
                self._attempted(name, partial(self.trackers[name].close, ended))

    def _track(self, record: EpochRecord, *, is_new: bool) -> None:
        self._n_logged += 1
        for name, tracker in list(self.trackers.items()):
            # only a file shows which epochs it has
            if is_new or name.startswith("csv:"):
                self._attempted(name, partial(tracker.log, asdict(record), self._n_logged))

    def _attempted(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # noqa: BLE001 (a training does not end because a tracker fails)
            del self.trackers[name]
            message = (
                f"the log {name} failed ({type(error).__name__}: {' '.join(str(error).split())[:200]}); the training "
                "goes on without it"
            )
            if self.notify is ignore:
                warnings.warn(message, stacklevel=2)
            else:
                self.notify(f"warning: {message}")


def _record(attempt: int, recipe: str, point: Point) -> EpochRecord:
    return EpochRecord(
        attempt=attempt, recipe=recipe, epoch=point.epoch, loss=point.loss, accuracy=point.accuracy, clean=point.clean,
        robust=point.robust, certified=point.certified, lr=point.lr, passes=point.forwards, seconds=point.wall_s,
    )  # fmt: skip


def opened_trackers(
    targets: Mapping[str, tuple[str, str]], folder: Path | None, *, resume: bool
) -> dict[str, Tracker]:
    """Return the trackers of a run by the texts of their settings, from their kinds and places.

    The ids of their runs are stored in the run folder, so that a resumed run continues them.
    """
    path = None if folder is None else folder / CHECKPOINTS / _IDS
    ids = json.loads(path.read_text()) if resume and path is not None and path.is_file() else {}

    columns = [each.name for each in fields(EpochRecord)]

    def keep(target: str, number: str) -> None:
        ids[target] = number
        if path is not None:
            with usable(path.parent):
                make_private(path.parent)
                write_atomically(path, document(ids))

    return {
        target: open_tracker(
            kind, place, ids.get(target), partial(keep, target), columns=columns, resume=resume
        )
        for target, (kind, place) in targets.items()
    }
