"""Stores of the artefacts of a run: in memory, or in a run folder.

An artefact is either the columns of a stage or a JSON document. It is written once. Shards of a stage that is not
complete are stored one by one, so that a run that is stopped loses at most one shard for each process.
"""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

from holdfast.core.evidence import Columns, Seconds
from holdfast.store.folder import Split, StoredStage


class Store(Protocol):
    """The artefacts of a run. `RunFolder` is a store whose artefacts survive the end of the process."""

    def stage(self, name: str) -> StoredStage | None:
        """The columns of a complete stage; None if it is not complete."""

    def shards(self, stage: str) -> dict[int, Columns]:
        """The finished shards of a stage that is not complete."""

    def keep_shard(self, stage: str, shard: int, columns: Columns) -> None:
        """Store a finished shard."""

    def complete(
        self,
        stage: str,
        columns: Columns,
        reached: int | None = None,
        about: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Store the columns of a whole stage, and drop its shards.

        `reached` is the number of measured shards if time ran out, else None. `about` are plain values that describe
        the columns.
        """

    def document(self, kind: str) -> Mapping[str, Any] | None:
        """A stored document, such as the doubts; None if there is none."""

    def record(self, kind: str, content: Mapping[str, Any]) -> None:
        """Store a document. It replaces an earlier one of the same kind."""

    def splits(self) -> Sequence[Split]:
        """The batch splits after memory ran out, in order."""

    def add_split(self, stage: str, shard: int, at: int, size: int) -> None:
        """Record that memory ran out before row `at` of a shard; batches have `size` examples from there on."""

    def begin(self, stage: str, shard: int) -> None:
        """Count an attempt at a shard."""

    def spend(self, stage: str, shard: int, seconds: Seconds, *, done: bool) -> None:
        """Add to the time of a shard."""

    def spent(self, stage: str) -> Seconds:
        """The time of a stage over all attempts."""


@dataclass
class MemoryStore:
    """A store that ends with the process. Nothing is converted to JSON or copied."""

    _stages: dict[str, StoredStage] = field(default_factory=dict)
    _shards: defaultdict[str, dict[int, Columns]] = field(default_factory=lambda: defaultdict(dict))
    _documents: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    _splits: list[Split] = field(default_factory=list)
    _seconds: defaultdict[str, Seconds] = field(default_factory=lambda: defaultdict(Seconds))

    def stage(self, name: str) -> StoredStage | None:
        """The columns of a complete stage; None if it is not complete."""
        return self._stages.get(name)

    def shards(self, stage: str) -> dict[int, Columns]:
        """The finished shards of a stage that is not complete."""
        return dict(self._shards[stage])

    def keep_shard(self, stage: str, shard: int, columns: Columns) -> None:
        """Store a finished shard."""
        self._shards[stage][shard] = columns

    def complete(
        self,
        stage: str,
        columns: Columns,
        reached: int | None = None,
        about: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Store the columns of a whole stage, and drop its shards."""
        self._stages[stage] = StoredStage(columns, reached, about)
        self._shards.pop(stage, None)

    def document(self, kind: str) -> Mapping[str, Any] | None:
        """A stored document; None if there is none."""
        return self._documents.get(kind)

    def record(self, kind: str, content: Mapping[str, Any]) -> None:
        """Store a document. It replaces an earlier one of the same kind."""
        self._documents[kind] = content

    def splits(self) -> Sequence[Split]:
        """The batch splits after memory ran out, in order."""
        return self._splits

    def add_split(self, stage: str, shard: int, at: int, size: int) -> None:
        """Record a batch split."""
        self._splits.append({"stage": stage, "shard": shard, "at": at, "size": size})

    def begin(self, stage: str, shard: int) -> None:
        """Do nothing: attempts are counted in a folder only."""

    def spend(self, stage: str, shard: int, seconds: Seconds, *, done: bool) -> None:
        """Add to the time of a stage."""
        before = self._seconds[stage]
        self._seconds[stage] = Seconds(before.cpu + seconds.cpu, before.wall + seconds.wall)

    def spent(self, stage: str) -> Seconds:
        """The time of a stage."""
        return self._seconds[stage]


_RECORDED_S = 1.0
"""Interval in seconds at which times are stored; a killed attempt loses at most this much."""


@dataclass
class Stopwatch:
    """Stores the time that a shard takes, in intervals."""

    store: Store
    stage: str
    shard: int = 0
    cpu: bool = True
    """whether the CPU time of this process is that of the shard"""
    _cpu: float = field(default_factory=time.process_time)
    _wall: float = field(default_factory=time.perf_counter)

    def tick(self, *, done: bool = False, least: float = _RECORDED_S) -> None:
        """Store the time since the last call, if it is at least `least` seconds or the shard is `done`."""
        cpu, wall = time.process_time(), time.perf_counter()
        if done or wall - self._wall >= least:
            seconds = Seconds(cpu - self._cpu if self.cpu else 0.0, wall - self._wall)
            self.store.spend(self.stage, self.shard, seconds, done=done)
            self._cpu, self._wall = cpu, wall
