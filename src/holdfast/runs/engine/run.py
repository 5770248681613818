"""Execution of the steps of a run: each artefact that is not stored yet is computed and stored.

`Run.document`, `Run.stage` and `Run.step` are the steps of a run. A step is skipped if its artefact is stored. A stage
with shards is divided among the processes of the executor, and each shard is stored when it is finished.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from holdfast.core.evidence import Columns, Seconds
from holdfast.core.pieces import Room
from holdfast.runs.engine.executor import Executor, Inline, MemoryStore, OutOfTime, Stopwatch, Store, Task
from holdfast.runs.engine.progress import Progress, Step, silent
from holdfast.runs.engine.signals import Stopper
from holdfast.runs.store.folder import StoredStage


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
    report: Callable[[Mapping[int, Columns], int], None]
    """function that is called with the columns of the finished shards, and the number of finished examples of other
    shards"""
    timed: bool = True
    """whether the deadline of the run applies to the stage"""


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
        work, done = shards(), self.store.shards(name)
        for shard in range(len(self.shards)):
            if shard not in done and (columns := work.filled(shard)) is not None:
                done[shard] = columns
        tasks = {shard: work.task(shard) for shard in range(len(self.shards)) if shard not in done}
        work.report(done, 0)
        if tasks:
            until = self.deadline if work.timed else math.inf
            for shard, columns in self.executor.measure(self, name, tasks, until, partial(work.report, done)):
                done[shard] = columns
                work.report(done, 0)
        reached = next((shard for shard in range(len(self.shards)) if shard not in done), None)
        # shards after a gap are left out: the columns of a stage are those of its first examples
        consecutive = [done[shard] for shard in sorted(done) if reached is None or shard < reached]
        columns = work.join(consecutive) if consecutive else {"id": torch.empty(0, dtype=torch.int64)}
        artefact = StoredStage(columns, reached)
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
        self.progress(Step(stage, place, len(self.stages), done, of, surviving, examples, title=title))
