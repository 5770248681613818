"""Runs the stages of a run shard by shard, and records the time that each takes."""

import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from holdfast.core.batch import Batch, Data
from holdfast.core.evidence import Columns
from holdfast.core.model import Bounds, Model
from holdfast.core.purpose import purpose
from holdfast.core.types import Ids, Inputs, Logits, Mask
from holdfast.harness import (
    Plan,
    Room,
    Seconds,
    Stage,
    Target,
    broken,
    due,
    join,
    ready,
    run_across,
    run_clean,
    run_fit,
    run_stage,
    unattacked,
)
from holdfast.runs.assembling import counted, is_of_rows, listed
from holdfast.runs.entry import refuse_batch
from holdfast.runs.keeping import Keeper
from holdfast.runs.order import Progress, Step
from holdfast.runs.signals import Stopper
from holdfast.sources.served import Served
from holdfast.store.folder import Stage as Kept

_NOTED_S = 1.0
"""Interval in seconds at which time is recorded; a killed attempt loses at most this much."""


@dataclass
class Watch:
    """Records the elapsed time of one shard in steps."""

    book: Callable[[Seconds, bool], None]
    _cpu: float = field(default_factory=time.process_time)
    _wall: float = field(default_factory=time.perf_counter)

    def tick(self, *, done: bool = False, least: float = _NOTED_S) -> None:
        """Record the time since the last call, if it is at least `least` seconds or the shard is `done`."""
        cpu, wall = time.process_time(), time.perf_counter()
        if done or wall - self._wall >= least:
            self.book(Seconds(cpu - self._cpu, wall - self._wall), done)
            self._cpu, self._wall = cpu, wall


class Hands(Protocol):
    """Measures the shards of a stage, in this process or in worker processes."""

    def measure(
        self,
        course: "Course",
        stage: Stage,
        left: Sequence[int],
        by_stage: Mapping[str, Columns],
        said: Callable[[int], None],
    ) -> Iterator[tuple[int, Columns]]:
        """Yield each shard of `left` when it is finished; stops early if time runs out.

        `said` is called with the number of finished examples in shards that are not finished.
        """


@dataclass(frozen=True)
class Alone:
    """Measures shards in the process of the run, one after another."""

    def measure(
        self,
        course: "Course",
        stage: Stage,
        left: Sequence[int],
        by_stage: Mapping[str, Columns],
        said: Callable[[int], None],
    ) -> Iterator[tuple[int, Columns]]:
        """Measure the shards in turn, and yield each with its columns; stops at the deadline."""
        chosen = course.due(stage, by_stage)
        for shard in left:
            if stage.kind != "clean" and time.perf_counter() >= course.deadline:
                return
            try:
                yield shard, course.shard(stage, shard, chosen, by_stage, said)
            except OutOfTime:
                return


class OutOfTime(Exception):
    """The deadline passed during a shard; the shard must be measured again from its start."""


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


@dataclass(frozen=True)
class Course:
    """The state that all stages of a run share."""

    plan: Plan
    target: Target
    data: Data
    device: torch.device
    shards: tuple[tuple[int, int], ...]
    """first row and last row + 1 of each shard"""
    batch_size: int
    keeper: Keeper
    stopper: Stopper
    progress: Progress
    deadline: float
    """`time.perf_counter()` after which attacks may not query the model"""
    order: tuple[str, ...]
    """names of the stages, and of the steps after them"""
    hands: Hands = field(default_factory=Alone)
    fit: Batch | None = None
    """examples that learned attacks are fitted to"""
    served: Served | None = None
    """connection to the server of a served model, which may charge for each row"""
    across: tuple[Batch, ...] = ()
    """inputs of each data set, equally many, for the transfer of perturbations between data sets"""
    _last: dict[tuple[int, int], Batch] = field(default_factory=dict)

    def run(self) -> tuple[dict[str, Columns], tuple[str, ...]]:
        """Return the columns by stage, without adaptive stages, and notes on what time did not allow."""
        by_stage: dict[str, Columns] = {}
        return by_stage, self._through([s for s in self.plan.stages() if not s.adaptive], by_stage)

    def adapt(self, by_stage: dict[str, Columns], called: Container[str]) -> tuple[str, ...]:
        """Add the columns of the adaptive attacks named in `called`; returns notes on what time did not allow."""
        stages = [s for s in self.plan.stages() if s.adaptive and name_of(s) in called]
        return self._through(stages, by_stage)

    def _through(self, stages: Sequence[Stage], by_stage: dict[str, Columns]) -> tuple[str, ...]:
        cut: list[tuple[Stage, int]] = []
        for stage in stages:
            measured = self._at_once if stage.kind in ("fit", "across") else self._measured
            kept = self.keeper.stage(stage.name) or measured(ready(stage, by_stage), by_stage)
            columns = counted(stage.kind, kept, by_stage)
            if columns is not None:
                by_stage[stage.name] = columns
            cut_short = kept.reached is not None and stage.kind != "fit"  # reported for its attack
            if cut_short and not any(name_of(stage) == name_of(other) for other, _ in cut):
                cut.append((stage, len(kept.columns["id"])))
        return missed(cut, len(self.data), self.plan)

    def room(self, stage: str, shard: int) -> Room:
        """The batch size after earlier stages, and the known out-of-memory splits of this shard from earlier attempts.

        Splits of other shards of the stage are ignored: which of them were measured before depends on the worker.
        """
        size, known = self.batch_size, {}
        place = self.order.index(stage)
        for split in self.keeper.splits():
            if self.order.index(split["stage"]) < place:
                size = min(size, split["size"])
            elif (split["stage"], split["shard"]) == (stage, shard):
                known[split["at"]] = split["size"]

        def halved(row: int, size: int) -> None:
            with self.stopper.finishing():
                self.keeper.add_split(stage, shard, row, size)

        return Room(size, known, halved)

    def read(self, start: int, stop: int) -> Batch:
        """Examples `start` to `stop` on the device; the last range is cached."""
        if (start, stop) not in self._last:
            self._last.clear()
            self._last[start, stop] = self.data.read(start, stop).to(self.device)
        return self._last[start, stop]

    def tell(self, stage: str, done: int, of: int, standing: int, seen: int) -> None:
        """Report the progress of a stage."""
        self.progress(Step(stage, self.order.index(stage) + 1, len(self.order), done, of, standing, seen))

    def _at_once(self, stage: Stage, by_stage: Mapping[str, Columns]) -> Kept:
        """Measure a stage that has no shards: fitting an attack, or a transfer across data sets.

        After a kill, the whole stage is measured again.
        """
        of = len(self.across[0] if self.fit is None or stage.kind == "across" else self.fit)
        standing = int(
            (by_stage["clean"]["correct"] & by_stage["clean"]["eligible"] & ~broken(by_stage)).sum()
        )
        self.tell(stage.name, 0, of, standing, len(self.data))
        self.keeper.begin(stage.name, 0)
        watch = Watch(lambda seconds, last: self.keeper.spend(stage.name, 0, seconds, done=last))
        columns: Columns = {"id": torch.empty(0, dtype=torch.int64)}
        timed, reached = self._timed(), None
        try:
            with purpose(stage.name, 0, "attacks"):
                if stage.kind == "fit":
                    assert self.fit is not None
                    columns = run_fit(stage, self.plan, timed, self.fit.to(self.device), by_stage["clean"])
                else:
                    sets = [each.to(self.device) for each in self.across]
                    columns = run_across(stage, self.plan, timed, sets, self.room(stage.name, 0))
        except OutOfTime:
            reached = 0
        self.confirm()
        with self.stopper.finishing():
            self.keeper.complete(stage.name, columns, reached)
            watch.tick(done=True)
        self.settle(stage.name)
        return Kept(columns, reached)

    def _measured(self, stage: Stage, by_stage: Mapping[str, Columns]) -> Kept:
        done = self.keeper.shards(stage.name)
        chosen = self.due(stage, by_stage)
        for shard, (start, stop) in enumerate(self.shards):
            if chosen is not None and shard not in done and not chosen[start:stop].any():
                done[shard] = unattacked(_rows(by_stage["clean"], start, stop), stage.kind)
        left = [shard for shard in range(len(self.shards)) if shard not in done]

        def said(finished: int) -> None:
            self._tell(stage, done, by_stage, finished)

        said(0)
        for shard, columns in self.hands.measure(self, stage, left, by_stage, said) if left else ():
            done[shard] = columns
            said(0)
        reached = next((k for k in range(len(self.shards)) if k not in done), None)
        whole = [done[shard] for shard in sorted(done) if reached is None or shard < reached]
        columns = join(whole) if whole else {"id": torch.empty(0, dtype=torch.int64)}
        with self.stopper.finishing():
            self.keeper.complete(stage.name, columns, reached)
        if reached is not None:
            self.settle(stage.name)
        return Kept(columns, reached)

    def due(self, stage: Stage, by_stage: Mapping[str, Columns]) -> Mask | None:
        """Mask of the examples that a stage is run on; None for the clean stage, which runs on all."""
        return None if stage.kind == "clean" else due(stage, self.plan, by_stage)

    def shard(
        self,
        stage: Stage,
        shard: int,
        chosen: Mask | None,
        by_stage: Mapping[str, Columns],
        said: Callable[[int], None],
    ) -> Columns:
        """Measure and store one shard. Raises `OutOfTime` if time runs out before it is finished."""
        self.keeper.begin(stage.name, shard)
        watch = Watch(lambda seconds, last: self.keeper.spend(stage.name, shard, seconds, done=last))
        batch, room, finished = self.read(*self.shards[shard]), self.room(stage.name, shard), 0
        if stage.kind == "clean":
            bare, classes = self.target.bare, self.target.classes
            refuse_batch(batch, bare.bounds, classes, self.data.name, whole=self.data, remote=bare.remote)

        def progress(n: int) -> None:
            nonlocal finished
            finished += n
            watch.tick()
            said(finished)

        room.progress = progress
        timed = self._timed()
        try:
            with purpose(stage.name, shard, "clean" if chosen is None else "attacks"):
                columns = self._columns(stage, shard, chosen, by_stage, timed, batch, room)
        except OutOfTime:
            watch.tick(least=0.0)
            raise
        with self.stopper.finishing():
            self.keeper.keep_shard(stage.name, shard, columns)
            watch.tick(done=True)
        self.settle(stage.name, shard)
        return columns

    def _columns(
        self,
        stage: Stage,
        shard: int,
        chosen: Mask | None,
        by_stage: Mapping[str, Columns],
        target: Target,
        batch: Batch,
        room: Room,
    ) -> Columns:
        if chosen is None:
            return run_clean(self.plan, target, batch, room)
        rows = self.shards[shard]
        clean = _rows(by_stage["clean"], *rows)
        gone = broken(by_stage)[slice(*rows)] if stage.kind != "attack" else None
        columns = run_stage(stage, self.plan, target, batch, clean, chosen[slice(*rows)], room, gone)
        self.confirm()
        return columns

    def confirm(self) -> None:
        """Verify that a server that refused the last inputs still answers clean inputs."""
        if self.served is not None:
            self.served.confirm()

    def settle(self, stage: str, shard: int | None = None) -> None:
        """Delete journaled answers of a server for a shard or stage whose results are stored."""
        if self.served is not None:
            self.served.sent.done(stage, shard)

    def _timed(self) -> Target:
        """The target with models that raise `OutOfTime` after the deadline."""
        quick, view = (Timed(model, self.deadline) for model in (self.target.quick, self.target.view))
        return replace(self.target, quick=quick, view=view)

    def _tell(
        self, stage: Stage, done: Mapping[int, Columns], by_stage: Mapping[str, Columns], more: int = 0
    ) -> None:
        finished = sum(len(columns["id"]) for columns in done.values())
        if stage.kind == "clean":
            standing, seen = sum(int(c["correct"].sum()) for c in done.values()), finished
        else:
            standing, seen = self._standing(stage, done, by_stage), len(self.data)
        self.tell(stage.name, finished + more, len(self.data), standing, seen)

    def _standing(self, stage: Stage, done: Mapping[int, Columns], by_stage: Mapping[str, Columns]) -> int:
        left = by_stage["clean"]["correct"] & by_stage["clean"]["eligible"] & ~broken(by_stage)
        if stage.kind != "attack":
            return int(left.sum())
        fallen = 0
        for shard, columns in done.items():
            start, stop = self.shards[shard]
            fallen += int((left[start:stop] & columns["success"]).sum())
        return int(left.sum()) - fallen


def missed(cut: Sequence[tuple[Stage, int]], of: int, plan: Plan) -> tuple[str, ...]:
    """Notes on the stages that time cut off, with the number of finished examples, and the effect on the metrics."""
    attacks = [(name_of(stage), n) for stage, n in cut if stage.kind == "attack"]
    done = [f"{name} finished {n:,} of {of:,} examples" for name, n in attacks if n]
    idle = [name for name, n in attacks if not n]
    if idle:
        done.append(f"{listed(idle)} finished none")
    said = [f"time ran out: {', '.join(done)}; {_meaning(plan)}"] if attacks else []
    for stage, _ in cut:
        if stage.kind != "attack":
            lost = "entropy, margin, precision and calibration under attack are"
            if stage.kind == "curve":
                lost = "its distances are"
            elif stage.kind == "detection":
                lost = "what the detector is worth is"
            elif stage.kind == "transfer":
                lost = "the transfer matrix is"
            elif stage.kind == "across":
                lost = "what was to be carried across data sets is"
            on = "its sample" if stage.kind in ("transfer", "across") else "every example"
            said.append(
                f"time ran out: the pass of {name_of(stage)} on {on} was not finished, so {lost} left out"
            )
    return tuple(said)


def _meaning(plan: Plan) -> str:
    if plan.smallest:
        return "a longer run may find smaller changes, so the distances are upper bounds"
    if plan.threat.goal is not None:
        return "a longer run may break more, so the targeted success rate is a lower bound"
    return "a longer run may break more, so robust accuracy is an upper bound"


def name_of(stage: Stage) -> str:
    """The name in the suite of the attack of a stage."""
    return stage.name if stage.member is None else stage.member.name


def shards_of(n: int, size: int) -> tuple[tuple[int, int], ...]:
    """Divide `n` rows into consecutive ranges of at most `size` rows."""
    return tuple((start, min(start + size, n)) for start in range(0, n, size))


def _rows(columns: Columns, start: int, stop: int) -> dict[str, Tensor]:
    return {name: values[start:stop] for name, values in columns.items() if is_of_rows(name)}
