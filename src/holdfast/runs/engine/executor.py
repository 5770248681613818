"""Executors, which measure the shards of a stage in the process of the run or in several worker processes."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from holdfast.core.errors import HoldfastError, TargetError, TargetLost, TargetRefused, UsageError
from holdfast.core.evidence import Columns
from holdfast.core.model import Bounds, Model
from holdfast.core.pieces import Room
from holdfast.core.types import Ids, Inputs, Logits
from holdfast.runs.engine.store import Stopwatch

if TYPE_CHECKING:
    from holdfast.runs.engine.run import Run


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


class Executor(Protocol):
    """Protocol of an object that measures the shards of a stage and stores the columns of each shard."""

    def measure(
        self,
        run: "Run",
        stage: str,
        tasks: Mapping[int, Task],
        until: float,
        moved: Callable[[int], None],
    ) -> Iterator[tuple[int, Columns]]:
        """Measure and store the shards of a stage, and yield the index and the columns of each shard when it is
        finished. No shard is started after the deadline `until`.

        `moved` is called with the number of finished examples in shards that are not finished yet.
        """

    def pause(self) -> None:
        """Release resources, such as worker processes, that are not needed before the next stage."""


@dataclass(frozen=True)
class Inline:
    """Executor that measures shards in the process of the run, one after another."""

    work: Measure | None = None
    """function that measures a shard; None for a run without shards"""

    def measure(
        self,
        run: "Run",
        stage: str,
        tasks: Mapping[int, Task],
        until: float,
        moved: Callable[[int], None],
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
