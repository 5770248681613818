"""Chooses where the shards of an assessment are measured, and what is sent to the workers of a Ray cluster."""

import io
import pickle
import pickletools
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

import torch

from holdfast.core.batch import Batch, Data
from holdfast.core.errors import Remedy, TargetError, UsageError
from holdfast.core.meter import Room
from holdfast.io.data.arrays import Arrays
from holdfast.io.data.pictures import Pictures
from holdfast.io.files import megabytes
from holdfast.io.models.factories import CODE, imported_from
from holdfast.runs.assess.measuring import ShardMeasure, WorkerSetup
from holdfast.runs.assess.preparation import model_digest, readied, with_surrogates
from holdfast.runs.assess.request import AssessRequest, DescribedModel, Opening
from holdfast.runs.engine.processes import import_path, unshared, worker_processes
from holdfast.runs.engine.progress import Notify
from holdfast.runs.engine.ray_cluster import RayOptions, connected
from holdfast.runs.engine.run import Executor, Inline, Measure
from holdfast.runs.harness.measure import ShardTask
from holdfast.runs.harness.plan import Plan
from holdfast.runs.harness.target import LOOKED_AT

if TYPE_CHECKING:
    from holdfast.runs.engine.ray_tasks import RayTasks


@contextmanager
def executor_for(
    request: AssessRequest,
    subject: DescribedModel,
    measure: ShardMeasure,
    digests: Mapping[str, Any],
    opening: Opening | None,
    notify: Notify,
    detail: Notify,
) -> Iterator[Executor]:
    """Context manager that yields the executor that an assessment requests: this process, worker processes, or a
    cluster.

    `measure` measures a shard in this process. `digests` are those of the run, with which a worker compares what it
    opens. Worker processes open the model and the data with `opening`; without it they receive copies. `notify` and
    `detail` are called with messages on a cluster.
    """
    if request.ray is not None:
        with _cluster(request, request.ray, subject, measure, digests["model"], notify, detail) as tasks:
            yield tasks
    elif request.workers is None:
        yield Inline(measure)
    else:
        compared = {what: digests[what] for what in ("model", "data")}
        compared["surrogates"] = [surrogate.digest for surrogate in request.surrogates]
        opening = opening or partial(_as_given, subject, measure.data, request.surrogates)
        setup = WorkerSetup(
            opening, compared, _without_surrogates(measure.plan), request.device, request.batch_size
        )
        with worker_processes(setup, request.workers) as workers:
            yield workers


@contextmanager
def _cluster(
    request: AssessRequest,
    options: RayOptions,
    subject: DescribedModel,
    measure: ShardMeasure,
    digest: str,
    notify: Notify,
    detail: Notify,
) -> "Iterator[RayTasks]":
    """Yield the executor on a Ray cluster. The opened model is sent to the workers."""
    from holdfast.runs.engine.ray_tasks import ray_tasks

    assert request.workers is not None  # the request of a cluster without a number of workers is refused
    device = "cuda" if options.gpus_per_worker else request.device
    plan, data = _without_surrogates(measure.plan), measure.data
    model = SentModel(subject, request.surrogates, plan, known_rows(data, request.batch_size), digest, device)
    files = shipped_files(options.ship)
    with ray_tasks(
        partial(shipment, model, files),
        partial(with_examples, data),
        request.workers,
        device,
        options,
        paths=tuple(import_path()),
        notify=notify,
        detail=detail,
    ) as tasks:
        if files:
            notify(f"sent to the nodes with --ship: {', '.join(files)}")
        yield tasks


@contextmanager
def executor_of(
    work: "Sendable", workers: int | None, options: RayOptions | None, device: str, notify: Notify
) -> Iterator[Executor]:
    """Context manager that yields the executor of other work than an assessment: this process, `workers` processes, or
    that many workers of a cluster. The work is sent to each of them once, and tasks as they are.
    """
    if workers is None:
        with work.opened() as measure:
            yield Inline(measure)
    elif options is None:
        with worker_processes(process_shipment(work), workers) as processes:
            yield processes
    else:
        from holdfast.runs.engine.ray_tasks import ray_tasks

        setup = partial(shipment, work, shipped_files(options.ship))
        paths = tuple(import_path())
        with ray_tasks(
            setup, lambda task: task, workers, device, options, paths=paths, notify=notify
        ) as tasks:
            yield tasks


@contextmanager
def cluster_for(request: AssessRequest, detail: Notify) -> Iterator[None]:
    """Context manager with one connection to the cluster that an assessment requests, for several assessments. It does
    nothing for a request without a cluster.
    """
    if request.ray is None or request.workers is None:
        yield
        return
    with connected(request.ray, request.workers, detail=detail):
        yield


def _without_surrogates(plan: Plan) -> Plan:
    """The plan without surrogates, which each worker prepares itself."""
    return replace(plan, threat=replace(plan.threat, surrogates=()))


def _as_given(
    subject: DescribedModel, data: Data, surrogates: tuple[DescribedModel, ...]
) -> tuple[DescribedModel, Data, tuple[DescribedModel, ...]]:
    return subject, data, surrogates


MAX_SHIPPED = 50_000_000
"""Largest number of bytes of the code that is sent with `--ship`."""


@dataclass(frozen=True)
class ShardWithExamples:
    """The work of a shard, together with the examples that the worker needs for it."""

    task: ShardTask
    examples: Arrays


@dataclass(frozen=True)
class Rows:
    """The part of a data set that a worker has: the first examples, with which the model is inspected, and those of one
    shard.
    """

    name: str
    classes: tuple[str, ...] | None
    n: int
    """number of examples of the whole data set"""
    sample: Arrays
    digest: str = ""
    shards: dict[int, Arrays] = field(default_factory=dict)
    """the examples of the current shard, by their first row"""

    def __len__(self) -> int:
        return self.n

    def read(self, start: int, stop: int) -> Batch:
        """Return the examples `start` to `stop`, which must be those of the sample or of the current shard."""
        if start in self.shards:
            return self.shards[start].read(0, stop - start)
        return self.sample.read(start, stop)


def stored_examples(data: Data, start: int, stop: int) -> Arrays:
    """Return the examples `start` to `stop` in the type in which they are stored, such as bytes."""
    if isinstance(data, Arrays):
        rows = slice(start, stop)
        return replace(data, x=data.x[rows], y=data.y[rows], ids=data.ids[rows])
    if isinstance(data, Pictures):
        return data.stored(start, stop)
    batch = data.read(start, stop)
    return Arrays(data.name, batch.x.numpy(), batch.y.numpy(), batch.ids.numpy(), data.classes)


def with_examples(data: Data, task: ShardTask) -> ShardWithExamples:
    """Return a task with the examples of its shard."""
    return ShardWithExamples(task, stored_examples(data, task.start, task.stop))


class Sendable(Protocol):
    """Protocol of what a worker receives once to measure shards: an object that can be pickled."""

    def opened(self) -> AbstractContextManager[Measure]:
        """Return a context manager that yields the function that measures shards."""


@dataclass(frozen=True)
class SentModel:
    """Everything that a worker needs to measure shards of a run: the opened model and surrogates, and the plan."""

    subject: DescribedModel
    surrogates: tuple[DescribedModel, ...]
    plan: Plan
    """the plan without surrogates, which the worker prepares itself"""
    rows: Rows
    digest: str
    device: str

    @contextmanager
    def opened(self) -> Iterator[Measure]:
        """Yield the function that measures shards. Raises `TargetError` if the model has another digest here."""
        device, adaptive = torch.device(self.device), bool(self.plan.adaptive)
        with (
            readied(self.subject, self.rows, device, adaptive=adaptive) as (target, sample),
            ExitStack() as stack,
        ):
            plan = with_surrogates(self.plan, stack, self.surrogates, sample, target)
            if model_digest(self.subject, target) != self.digest:
                raise TargetError(
                    "the model behaves differently on a node (one of them is randomised)",
                    Remedy("on", "local"),
                )

            def measure(work: ShardWithExamples, room: Room, until: float) -> Any:
                self.rows.shards.clear()
                self.rows.shards[work.task.start] = work.examples
                try:
                    return ShardMeasure(plan, target, self.rows, device)(work.task, room, until)
                finally:
                    self.rows.shards.clear()

            yield measure


@dataclass(frozen=True)
class Shipment:
    """The pickled model, and the code that it needs. Calling it opens the model: see `runs.engine.ray_worker`."""

    content: list[bytes]
    """the pickled `Sendable`, such as a `SentModel`; empty once it is opened, so that a worker keeps one copy of it"""
    modules: Mapping[str, tuple[str, bytes]]
    """path and content of each code file of the user that the pickled model refers to, by the name of the module"""
    files: Mapping[str, bytes]
    """content of each file of `--ship`, by its path"""

    @contextmanager
    def __call__(self) -> Iterator[Measure]:
        """Yield the function that measures shards. Shipped code is last on the import path."""
        with ExitStack() as stack:
            if self.files:
                folder = stack.enter_context(
                    tempfile.TemporaryDirectory(prefix="holdfast-", ignore_cleanup_errors=True)
                )
                _write(Path(folder), self.files)
                sys.path.append(folder)
                stack.callback(_forget, folder)
            for name, (path, content) in self.modules.items():
                if CODE.get(name) != (path, content):  # a worker may have opened an earlier state of the file
                    imported_from(Path(path), content, name)
            try:  # sent by the process of the run
                model: Sendable = pickle.loads(self.content.pop())  # noqa: S301
            except (
                ModuleNotFoundError
            ):  # the advice differs between the processes of this machine and those of Ray
                raise
            except (AttributeError, ImportError) as error:  # a name of a script, which a worker does not run
                raise unshared(error) from error
            yield stack.enter_context(model.opened())


def _forget(folder: str) -> None:
    """Remove a folder from the import path, and the modules that were imported from it."""
    sys.path.remove(folder)
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").is_relative_to(folder):
            del sys.modules[name]


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        place = folder / PurePosixPath(name)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)


def process_shipment(model: Sendable) -> Shipment:
    """Return the shipment of a model to worker processes of this machine.

    Raises `UsageError` for a model that cannot be pickled.
    """
    try:
        content = pickle.dumps(model)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise unshared(error) from error
    return Shipment([content], _user_modules(content), {})


def shipment(model: Sendable, files: Mapping[str, bytes], dumps: Callable[[Any], bytes]) -> bytes:
    """Return the pickled shipment of a model. `dumps` is the pickling function of Ray.

    Raises `UsageError` for a model or an attack that cannot be pickled.
    """
    try:
        content = dumps(model)
    except Exception as error:  # objects of the user may raise anything while they are pickled
        raise UsageError(
            f"a node cannot receive the model or an attack ({type(error).__name__}: {error}); define it with "
            "file.py:factory",
            Remedy("on", "local"),
        ) from error
    return pickle.dumps(Shipment([content], _user_modules(content), files))


def _user_modules(content: bytes) -> dict[str, tuple[str, bytes]]:
    """Return the code files of the user to which a pickle refers, as they were when they were loaded."""
    values = (value for _, value, _ in pickletools.genops(io.BytesIO(content)) if isinstance(value, str))
    names = (value.split(" ")[0] for value in values)
    return {name: CODE[name] for name in names if name in CODE}


def shipped_files(paths: Sequence[Path]) -> dict[str, bytes]:
    """Return the content of all files in `paths`, by their path relative to the parent of the given one. Hidden
    and compiled files are left out.

    Raises `UsageError` for a missing path, a path without files, a link that leads out of its folder, two equal names,
    and more than 50 MB.
    """
    contents: dict[str, bytes] = {}
    size = 0
    for given in paths:
        if not given.exists():
            raise UsageError(
                f"ship is {given}, which does not exist; give a file or a folder with code that the model needs"
            )
        base = given.resolve()
        each = sorted(path for path in base.rglob("*") if path.is_file()) if base.is_dir() else [base]
        each = [path for path in each if not _is_left_out(path.relative_to(base))]
        if not each:
            raise UsageError(
                f"ship is {given}, which contains no file; give a file or a folder with code that the model needs"
            )
        for path in each:
            name = path.relative_to(base.parent)
            if not path.resolve().is_relative_to(base):
                raise UsageError(
                    f"ship is {given}: {name} is a link out of the folder; replace it by the file, or remove it"
                )
            size += path.stat().st_size
            if size > MAX_SHIPPED:
                raise UsageError(
                    f"ship is {', '.join(map(str, paths))}, larger than {megabytes(MAX_SHIPPED)}; ship code only, "
                    "and install large packages on the nodes"
                )
            if name.as_posix() in contents:
                raise UsageError(f"ship contains two files named {name.as_posix()}; rename one of them")
            contents[name.as_posix()] = path.read_bytes()
    return contents


def _is_left_out(name: Path) -> bool:
    """Whether a file in a shipped folder is hidden or compiled."""
    return any(part.startswith(".") or part == "__pycache__" for part in name.parts)


def known_rows(data: Data, batch_size: int | None) -> Rows:
    """Return the part of a data set that is sent to every worker: its properties and its first examples, at most
    `batch_size`.
    """
    first = stored_examples(data, 0, min(LOOKED_AT, batch_size or LOOKED_AT, len(data)))
    return Rows(data.name, data.classes, len(data), first)
