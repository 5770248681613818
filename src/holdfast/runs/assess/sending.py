"""What the process of a run sends to the workers of a Ray cluster: the opened model, code of the user, and examples.

Workers read no file of the user. The model is sent once, and the examples of a shard with its task.
"""

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
from typing import Any, Protocol

import torch

from holdfast.core.batch import Batch, Data
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.pieces import Room
from holdfast.core.remedies import Remedy
from holdfast.io.data.arrays import Arrays
from holdfast.io.data.pictures import Pictures
from holdfast.io.files import megabytes
from holdfast.io.models.factories import CODE, imported_from
from holdfast.runs.assess.measuring import ShardMeasure
from holdfast.runs.assess.preparation import model_digest, readied, with_surrogates
from holdfast.runs.assess.request import Subject
from holdfast.runs.engine.children import unshared
from holdfast.runs.engine.executor import Measure
from holdfast.runs.harness import LOOKED_AT, Plan, ShardTask

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

    subject: Subject
    surrogates: tuple[Subject, ...]
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


def sender(data: Data) -> Callable[[ShardTask], ShardWithExamples]:
    """Return the function that adds the examples of `data` to a task."""
    return partial(with_examples, data)


def known_rows(data: Data, batch_size: int | None) -> Rows:
    """Return the part of a data set that is sent to every worker: its properties and its first examples, at most
    `batch_size`.
    """
    first = stored_examples(data, 0, min(LOOKED_AT, batch_size or LOOKED_AT, len(data)))
    return Rows(data.name, data.classes, len(data), first)
