"""Reports the measurements of each epoch of a training to a function of the user and to experiment trackers."""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

from holdfast.core.errors import Interrupted
from holdfast.io.trackers import Ended, Tracker, open_tracker
from holdfast.runs.engine.progress import Notify, ignore
from holdfast.runs.harden.checkpoints import Point
from holdfast.runs.store.files import CHECKPOINTS, make_private, usable, write_atomically
from holdfast.runs.store.records import document

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
