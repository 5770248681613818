"""Executors measure the shards of a stage: in this process, or in several (`processes.py`)."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from holdfast.core.evidence import Columns
from holdfast.core.model import Bounds, Model
from holdfast.core.types import Ids, Inputs, Logits
from holdfast.engine.store import Stopwatch
from holdfast.ops.pieces import Room

if TYPE_CHECKING:
    from holdfast.engine.run import Run


class OutOfTime(Exception):
    """The deadline passed during a shard; the shard must be measured again from its start."""


Task = Any
"""One shard to measure, with the columns that it needs: an object of the verb, which can be pickled."""

Measure = Callable[[Task, Room, float], Columns]
"""Measures a task: a pure function of the task, of what the run was started with, and of the room.

It is called with the room and the `time.perf_counter()` of the deadline, after which it raises `OutOfTime`.
"""


class Executor(Protocol):
    """Measures the shards of a stage, and stores each."""

    def measure(
        self,
        run: "Run",
        stage: str,
        tasks: Mapping[int, Task],
        until: float,
        moved: Callable[[int], None],
    ) -> Iterator[tuple[int, Columns]]:
        """Yield each shard after it is measured and stored; stop early at the deadline `until`.

        `moved` is called with the number of finished examples in shards that are not finished.
        """

    def pause(self) -> None:
        """Release what the executor holds until the next stage."""


@dataclass(frozen=True)
class Inline:
    """Measures shards in the process of the run, one after another."""

    work: Measure | None = None
    """None for a run without shards"""

    def measure(
        self,
        run: "Run",
        stage: str,
        tasks: Mapping[int, Task],
        until: float,
        moved: Callable[[int], None],
    ) -> Iterator[tuple[int, Columns]]:
        """Measure the shards in turn, and yield each with its columns; stop at the deadline."""
        assert self.work is not None
        for shard, task in tasks.items():
            if time.perf_counter() >= until:
                return
            run.store.begin(stage, shard)
            stopwatch, room, finished = Stopwatch(run.store, stage, shard), run.room(stage, shard), 0

            def progress(n: int, stopwatch: Stopwatch = stopwatch) -> None:
                nonlocal finished
                finished += n
                stopwatch.tick()
                moved(finished)

            room.progress = progress
            try:
                columns = self.work(task, room, until)
            except OutOfTime:
                stopwatch.tick(least=0.0)
                return
            run.keep(stage, shard, columns, stopwatch)
            yield shard, columns

    def pause(self) -> None:
        """Do nothing: the model belongs to the process of the run."""


@dataclass(frozen=True)
class Timed:
    """A model whose calls raise `OutOfTime` after a deadline."""

    model: Model
    deadline: float

    @property
    def bounds(self) -> Bounds:
        """The input bounds of the model."""
        return self.model.bounds

    def __call__(self, x: Inputs, ids: Ids | None = None) -> Logits:
        """Logits of the model. Raises `OutOfTime` after the deadline."""
        if time.perf_counter() >= self.deadline:
            raise OutOfTime
        return self.model(x, ids)
