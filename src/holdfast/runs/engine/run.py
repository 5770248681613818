"""Execution of the steps of a run, each stored once, and the executor that measures the shards of a step in this
process.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol

import torch

from holdfast.core.errors import HoldfastError, TargetError, TargetLost, TargetRefused, UsageError
from holdfast.core.evidence import Columns, Seconds
from holdfast.core.meter import Room
from holdfast.core.model import Bounds, Model
from holdfast.core.types import Ids, Inputs, Logits
from holdfast.runs.engine.progress import Progress, Step, Stopper, silent
from holdfast.runs.store.folder import Split, StoredStage


class Store(Protocol):
    """Protocol of a storage of the artefacts of a run. Those in a `RunFolder` remain after the end of the process."""

    def stage(self, name: str) -> StoredStage | None:
        """Return the stored columns of a stage, or None if the stage is not complete."""

    def shards(self, stage: str) -> dict[int, Columns]:
        """Return the columns of the finished shards of an incomplete stage, by the index of the shard."""

    def keep_shard(self, stage: str, shard: int, columns: Columns) -> None:
        """Store the columns of a finished shard."""

    def complete(
        self,
        stage: str,
        columns: Columns,
        reached: int | None = None,
        about: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Store the columns of a complete stage, and delete those of its separate shards.

        `reached` is the number of measured shards if time ran out, and otherwise None. `about` contains plain values
        that describe the columns.
        """

    def document(self, kind: str) -> Mapping[str, Any] | None:
        """Return a stored JSON document of a run, such as that with the doubts, or None if it is not stored."""

    def record(self, kind: str, content: Mapping[str, Any]) -> None:
        """Store a JSON document of a run. It replaces an earlier document of the same kind."""

    def splits(self) -> Sequence[Split]:
        """Return where in a run memory ran out, and the smaller batch size that was used from there on, in order of
        time.
        """

    def add_split(self, stage: str, shard: int, at: int, size: int) -> None:
        """Record that memory ran out before row `at` of a shard, and that batches contain `size` examples from there
        on.
        """

    def begin(self, stage: str, shard: int) -> None:
        """Record that the measurement of a shard begins."""

    def spend(self, stage: str, shard: int, seconds: Seconds, *, done: bool) -> None:
        """Add `seconds` to the recorded computing time of a shard."""

    def spent(self, stage: str) -> Seconds:
        """Return the computing time of a stage, including the time before a run was interrupted and resumed."""


@dataclass
class MemoryStore:
    """Storage of the artefacts of a run in memory. They are neither copied nor converted to JSON, and are lost at the
    end of the process.
    """

    _stages: dict[str, StoredStage] = field(default_factory=dict)
    _shards: defaultdict[str, dict[int, Columns]] = field(default_factory=lambda: defaultdict(dict))
    _documents: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    _splits: list[Split] = field(default_factory=list)
    _seconds: defaultdict[str, Seconds] = field(default_factory=lambda: defaultdict(Seconds))

    def stage(self, name: str) -> StoredStage | None:
        """Return the stored columns of a stage, or None if the stage is not complete."""
        return self._stages.get(name)

    def shards(self, stage: str) -> dict[int, Columns]:
        """Return the columns of the finished shards of an incomplete stage, by the index of the shard."""
        # a copy, because `Run.sharded_stage` adds shards to it
        return dict(self._shards[stage])

    def keep_shard(self, stage: str, shard: int, columns: Columns) -> None:
        """Store the columns of a finished shard."""
        self._shards[stage][shard] = columns

    def complete(
        self,
        stage: str,
        columns: Columns,
        reached: int | None = None,
        about: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Store the columns of a complete stage, and delete those of its separate shards.

        `reached` is the number of measured shards if time ran out, and otherwise None. `about` contains plain values
        that describe the columns.
        """
        self._stages[stage] = StoredStage(columns, reached, about)
        self._shards.pop(stage, None)

    def document(self, kind: str) -> Mapping[str, Any] | None:
        """Return a stored JSON document of a run, or None if it is not stored."""
        return self._documents.get(kind)

    def record(self, kind: str, content: Mapping[str, Any]) -> None:
        """Store a JSON document of a run. It replaces an earlier document of the same kind."""
        self._documents[kind] = content

    def splits(self) -> Sequence[Split]:
        """Return where in a run memory ran out, and the smaller batch size that was used from there on, in order of
        time.
        """
        return self._splits

    def add_split(self, stage: str, shard: int, at: int, size: int) -> None:
        """Record that memory ran out before row `at` of a shard, and that batches contain `size` examples from there
        on.
        """
        self._splits.append({"stage": stage, "shard": shard, "at": at, "size": size})

    def begin(self, stage: str, shard: int) -> None:
        """Do nothing, because the beginning of a shard is recorded only in a run folder."""

    def spend(self, stage: str, shard: int, seconds: Seconds, *, done: bool) -> None:
        """Add `seconds` to the recorded computing time of a stage."""
        before = self._seconds[stage]
        self._seconds[stage] = Seconds(before.cpu + seconds.cpu, before.wall + seconds.wall)

    def spent(self, stage: str) -> Seconds:
        """Return the recorded computing time of a stage."""
        return self._seconds[stage]


_RECORDED_S = 1.0
"""Interval in seconds at which times are stored; a killed attempt loses at most this much."""


@dataclass
class Stopwatch:
    """Measures the computing time of a shard, and adds it to the store of a run at regular intervals."""

    store: Store
    stage: str
    shard: int = 0
    cpu: bool = True
    """whether the CPU time of this process is added to that of the shard"""
    _cpu: float = field(default_factory=time.process_time)
    _wall: float = field(default_factory=time.perf_counter)

    def tick(self, *, done: bool = False, least: float = _RECORDED_S) -> None:
        """Store the computing time since it was last stored, if at least `least` seconds have passed or the shard is
        `done`.
        """
        cpu, wall = time.process_time(), time.perf_counter()
        if done or wall - self._wall >= least:
            seconds = Seconds(cpu - self._cpu if self.cpu else 0.0, wall - self._wall)
            self.store.spend(self.stage, self.shard, seconds, done=done)
            self._cpu, self._wall = cpu, wall


DEATHS = 3
"""A shard, or the start of a worker, is not tried again after this many workers were lost in it."""
ERRORS: Mapping[str, type[HoldfastError]] = {
    error.__name__: error for error in (HoldfastError, TargetError, TargetLost, TargetRefused, UsageError)
}
"""Classes of the errors that a worker may report by name; any other name becomes a `HoldfastError`."""


class OutOfTime(Exception):
    """Error for a shard that was not finished before the deadline of the run. The shard must then be measured again
    from its start.
    """


Task = Any
"""The work of one shard, with the columns that it needs: an object defined by the verb, which can be pickled."""

Measure = Callable[[Task, Room, float], Columns]
"""Function of a task, a room and a deadline that measures the task and returns its columns.

The result depends only on the task, the room, and what the run was started with. After the deadline, a value of
`time.perf_counter()`, the function raises `OutOfTime`.
"""

Moved = Callable[[int, int], None]
"""Function that is called with the number of finished examples in shards that are not finished yet, and the number of
these that an attack broke; 0 if it is not known."""


class Executor(Protocol):
    """Protocol of an object that measures the shards of a stage and stores the columns of each shard."""

    def measure(
        self, run: "Run", stage: str, tasks: Mapping[int, Task], until: float, moved: Moved
    ) -> Iterator[tuple[int, Columns]]:
        """Measure and store the shards of a stage, and yield the index and the columns of each shard when it is
        finished. No shard is started after the deadline `until`.
        """

    def pause(self) -> None:
        """Release resources, such as worker processes, that are not needed before the next stage."""


@dataclass(frozen=True)
class Inline:
    """Executor that measures shards in the process of the run, one after another."""

    work: Measure | None = None
    """function that measures a shard; None for a run without shards"""

    def measure(
        self, run: "Run", stage: str, tasks: Mapping[int, Task], until: float, moved: Moved
    ) -> Iterator[tuple[int, Columns]]:
        """Measure and store the shards of a stage one after another, and yield the index and the columns of each shard.
        Stop at the deadline `until`.
        """
        assert self.work is not None
        for shard, task in tasks.items():
            if time.perf_counter() >= until:
                return
            run.store.begin(stage, shard)
            stopwatch, room, finished = Stopwatch(run.store, stage, shard), run.room(stage, shard), 0

            def progress(n: int, stopwatch: Stopwatch = stopwatch, room: Room = room) -> None:
                nonlocal finished
                finished += n
                stopwatch.tick()
                moved(finished, room.n_broken)

            room.progress = progress
            try:
                columns = self.work(task, room, until)
            except OutOfTime:
                stopwatch.tick(least=0.0)
                return
            run.keep(stage, shard, columns, stopwatch)
            yield shard, columns

    def pause(self) -> None:
        """Do nothing, because this executor has no worker processes that could be stopped."""


@dataclass(frozen=True)
class Timed:
    """Wrapper of a model that raises `OutOfTime` for every call after the deadline of a run."""

    model: Model
    deadline: float

    @property
    def bounds(self) -> Bounds:
        """Lowest and highest valid input values of the model."""
        return self.model.bounds

    def __call__(self, x: Inputs, ids: Ids | None = None) -> Logits:
        """Return the logits of the model. Raises `OutOfTime` after the deadline."""
        if time.perf_counter() >= self.deadline:
            raise OutOfTime
        return self.model(x, ids)


def _nothing(stage: str, shard: int | None) -> None:
    """The default for `Run.stored`."""


@dataclass(frozen=True)
class Shards:
    """Functions that define how a stage is divided into shards, how a shard is measured, and how the results are
    joined.
    """

    filled: Callable[[int], Columns | None]
    """function that returns the columns of a shard in which nothing has to be measured, or None for other shards"""
    task: Callable[[int], Task]
    """function that returns the task of a shard"""
    join: Callable[[list[Columns]], Columns]
    """function that concatenates the columns of shards"""
    report: Callable[[Mapping[int, Columns], int, int], None]
    """function that is called with the columns of the finished shards, the number of finished examples of other shards,
    and the number of these that an attack broke"""
    timed: bool = True
    """whether the deadline of the run applies to the stage"""
    current: Callable[[int, Columns], bool] = lambda shard, columns: True
    """function that returns whether the stored columns of a shard are those of its task"""


@dataclass(frozen=True)
class Run:
    """One attempt to complete a run, which starts or resumes it: the store of its artefacts, its limits and its
    executor.
    """

    stages: tuple[str, ...]
    """names of the steps that take time, in their order"""
    store: Store = field(default_factory=MemoryStore)
    executor: Executor = field(default_factory=Inline)
    shards: tuple[tuple[int, int], ...] = ()
    """for each shard, its first row and the row after its last one"""
    batch_size: int = 1
    """number of examples in one forward pass; it is halved if memory runs out"""
    deadline: float = math.inf
    """value of `time.perf_counter()` after which no stage queries the model, except a stage whose shards are not
    `timed`"""
    stopper: Stopper = field(default_factory=Stopper)
    progress: Progress = silent
    stored: Callable[[str, int | None], None] = _nothing
    """function that is called after a shard is stored, and with None for the shard after the rest
    of a stage is stored"""
    titles: Mapping[str, str] = field(default_factory=dict)
    """names of stages in reports, by the names of the stages; a stage without one is shown by its own name"""
    n: int | None = None
    """number of examples, if the run measures robust accuracy; otherwise None"""
    in_looks: bool = False
    """whether the run measures a growing part of the examples, until a condition is decided"""
    partial: bool = False
    """whether `shards` are only the first ones, so that a stage stays incomplete after them"""

    def document(self, kind: str, compute: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """Return the JSON document of the given kind from the store of the run. If it is not stored, it is computed and
        stored first.
        """
        content = self.store.document(kind)
        if content is None:
            content = compute()
            self.record(kind, content)
        return content

    def record(self, kind: str, content: Mapping[str, Any]) -> None:
        """Store a JSON document of the run. An interrupt signal that arrives during the write takes effect after it."""
        with self.stopper.finishing():
            self.store.record(kind, content)

    def stage(self, name: str, compute: Callable[[], Columns]) -> StoredStage:
        """Return the columns of a stage that is not divided into shards. If they are not stored, they are computed and
        stored first.
        """

        def measured() -> StoredStage:
            try:
                return StoredStage(compute())
            except OutOfTime:  # the empty stage is stored, so that a resumed run reports the same
                return StoredStage({"id": torch.empty(0, dtype=torch.int64)}, 0)

        return self.step(name, measured)

    def step(self, name: str, compute: Callable[[], StoredStage]) -> StoredStage:
        """Return the artefact of a step of the run. If it is not stored, it is computed and stored first."""
        if (stored := self.store.stage(name)) is not None:
            return stored
        self.store.begin(name, 0)
        stopwatch = Stopwatch(self.store, name)
        artefact = compute()
        with self.stopper.finishing():
            self.store.complete(name, artefact.columns, artefact.reached, artefact.about)
            stopwatch.tick(done=True)
        self.stored(name, None)
        return artefact

    def sharded_stage(self, name: str, shards: Callable[[], Shards]) -> StoredStage:
        """Return the columns of a stage that is divided into shards. The executor of the run measures those shards that
        are not stored yet.

        `shards` is a function that returns the work; it is called unless the whole stage is stored.
        """
        if (stored := self.store.stage(name)) is not None:
            return stored
        work, stored_shards = shards(), self.store.shards(name)
        done = {shard: columns for shard, columns in stored_shards.items() if work.current(shard, columns)}
        for shard in range(len(self.shards)):
            if shard not in done and (columns := work.filled(shard)) is not None:
                done[shard] = columns
        tasks = {shard: work.task(shard) for shard in range(len(self.shards)) if shard not in done}
        work.report(done, 0, 0)
        if tasks:
            until = self.deadline if work.timed else math.inf
            for shard, columns in self.executor.measure(self, name, tasks, until, partial(work.report, done)):
                done[shard] = columns
                work.report(done, 0, 0)
        reached = next((shard for shard in range(len(self.shards)) if shard not in done), None)
        # shards after a gap are left out: the columns of a stage are those of its first examples
        consecutive = [done[shard] for shard in sorted(done) if reached is None or shard < reached]
        columns = work.join(consecutive) if consecutive else {"id": torch.empty(0, dtype=torch.int64)}
        artefact = StoredStage(columns, reached)
        if self.partial:
            return artefact
        with self.stopper.finishing():
            self.store.complete(name, artefact.columns, artefact.reached, artefact.about)
        if reached is not None:
            self.stored(name, None)
        return artefact

    def keep(self, stage: str, shard: int, columns: Columns, stopwatch: Stopwatch | None = None) -> None:
        """Store the columns of a finished shard, and the time that it took. An interrupt signal that arrives during the
        write takes effect after it.

        Without a stopwatch, only the end of the shard is recorded, because its time was stored before.
        """
        with self.stopper.finishing():
            self.store.keep_shard(stage, shard, columns)
            if stopwatch is None:
                self.store.spend(stage, shard, Seconds(), done=True)
            else:
                stopwatch.tick(done=True)
        self.stored(stage, shard)

    def room(self, stage: str, shard: int) -> Room:
        """Return the batch sizes for a shard, reduced wherever earlier stages or earlier attempts at this shard ran out
        of memory.

        Splits of other shards of the same stage are ignored, because it depends on the executor which of them are
        measured first.
        """
        size, splits, place = self.batch_size, {}, self.stages.index(stage)
        for split in self.store.splits():
            if self.stages.index(split["stage"]) < place:
                size = min(size, split["size"])
            elif (split["stage"], split["shard"]) == (stage, shard):
                splits[split["at"]] = split["size"]

        def halved(row: int, size: int) -> None:
            self.split(stage, shard, row, size)

        return Room(size, splits, halved)

    def split(self, stage: str, shard: int, row: int, size: int) -> None:
        """Record that memory ran out at a row of a shard, and the smaller batch size with which the run continues."""
        with self.stopper.finishing():
            self.store.add_split(stage, shard, row, size)

    def report(self, stage: str, done: int, of: int, surviving: int, examples: int) -> None:
        """Call the progress function of the run with the number of finished examples of a stage and the number that
        survive.
        """
        place = self.stages.index(stage) + 1
        title = self.titles.get(stage, "")
        counts = (place, len(self.stages), done, of, surviving, examples)
        self.progress(Step(stage, *counts, title=title, n=self.n, in_looks=self.in_looks))
