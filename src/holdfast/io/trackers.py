"""Experiment trackers that record the measurements of a training: a CSV file, TensorBoard, MLflow and Weights & Biases.

The packages of the last three are optional (`pip install "holdfast-ml[log]"`) and imported when a tracker is opened.
"""

import csv
import io
import os
import time
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

from holdfast.core.errors import TargetError, UsageError, importing

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
