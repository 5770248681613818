"""Where a run keeps what it has measured: a folder, or memory alone."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from holdfast.core.evidence import Columns
from holdfast.harness import Seconds
from holdfast.store.folder import RunFolder, Split, Stage


class Keeper(Protocol):
    """Keeps shards, stages, documents and time; a folder keeps them through a kill."""

    def stage(self, name: str) -> Stage | None:
        """A stage that is over."""

    def shards(self, stage: str) -> dict[int, Columns]:
        """Finished shards of a stage that is not complete."""

    def keep_shard(self, stage: str, shard: int, columns: Columns) -> None:
        """Keep a finished shard."""

    def complete(self, stage: str, columns: Columns, reached: int | None) -> None:
        """Keep a finished stage; `reached` counts its shards where time ran out before the last."""

    def splits(self) -> Sequence[Split]:
        """Where memory ran out."""

    def add_split(self, stage: str, shard: int, at: int, size: int) -> None:
        """Keep that memory ran out."""

    def begin(self, stage: str, shard: int) -> None:
        """Count an attempt."""

    def spend(self, stage: str, shard: int, seconds: Seconds, *, done: bool) -> None:
        """Add to the time of a shard."""

    def spent(self, stage: str) -> Seconds:
        """Time of a stage over all attempts."""

    def document(self, kind: str) -> Mapping[str, Any] | None:
        """What was recorded of a kind."""

    def record(self, kind: str, content: Mapping[str, Any]) -> None:
        """Record a document."""


@dataclass
class InMemory:
    """Keeps nothing beyond the process: only the time and the splits that the run itself asks for again."""

    _splits: list[Split] = field(default_factory=list)
    _seconds: defaultdict[str, Seconds] = field(default_factory=lambda: defaultdict(Seconds))

    def stage(self, name: str) -> Stage | None:
        """Nothing: no earlier attempt left anything."""
        return None

    def shards(self, stage: str) -> dict[int, Columns]:
        """Nothing."""
        return {}

    def keep_shard(self, stage: str, shard: int, columns: Columns) -> None:
        """The run holds its shards itself."""

    def complete(self, stage: str, columns: Columns, reached: int | None) -> None:
        """The run holds its stages itself."""

    def splits(self) -> Sequence[Split]:
        """Where memory ran out."""
        return self._splits

    def add_split(self, stage: str, shard: int, at: int, size: int) -> None:
        """Keep that memory ran out."""
        self._splits.append({"stage": stage, "shard": shard, "at": at, "size": size})

    def begin(self, stage: str, shard: int) -> None:
        """There is one attempt."""

    def spend(self, stage: str, shard: int, seconds: Seconds, *, done: bool) -> None:
        """Add to the time of a stage."""
        known = self._seconds[stage]
        self._seconds[stage] = Seconds(known.cpu + seconds.cpu, known.wall + seconds.wall)

    def spent(self, stage: str) -> Seconds:
        """Time of a stage."""
        return self._seconds[stage]

    def document(self, kind: str) -> Mapping[str, Any] | None:
        """Nothing was recorded before."""
        return None

    def record(self, kind: str, content: Mapping[str, Any]) -> None:
        """The result holds it."""


@dataclass(frozen=True)
class InFolder:
    """Keeps everything in a run folder."""

    folder: RunFolder

    def stage(self, name: str) -> Stage | None:
        """A stage that is over, whose shards a kill may have left behind."""
        found = self.folder.stage(name)
        if found is not None:
            self.folder.drop_shards(name)
        return found

    def shards(self, stage: str) -> dict[int, Columns]:
        """Finished shards that are whole."""
        return self.folder.shards(stage)

    def keep_shard(self, stage: str, shard: int, columns: Columns) -> None:
        """Write a shard."""
        self.folder.keep_shard(stage, shard, columns)

    def complete(self, stage: str, columns: Columns, reached: int | None) -> None:
        """Write and record a stage."""
        self.folder.complete(stage, columns, reached)

    def splits(self) -> Sequence[Split]:
        """Where memory ran out, in every attempt."""
        return self.folder.splits()

    def add_split(self, stage: str, shard: int, at: int, size: int) -> None:
        """Write that memory ran out, before the run goes on."""
        self.folder.add_split(stage, shard, at, size)

    def begin(self, stage: str, shard: int) -> None:
        """Count an attempt."""
        self.folder.leases.begin(stage, shard)

    def spend(self, stage: str, shard: int, seconds: Seconds, *, done: bool) -> None:
        """Add to the time of a shard."""
        self.folder.leases.spend(stage, shard, seconds.cpu, seconds.wall, done=done)

    def spent(self, stage: str) -> Seconds:
        """Time of a stage over all attempts."""
        known = self.folder.leases.spent(stage)
        return Seconds(known.cpu_s, known.wall_s)

    def document(self, kind: str) -> Mapping[str, Any] | None:
        """What the chain names."""
        return self.folder.document(kind)

    def record(self, kind: str, content: Mapping[str, Any]) -> None:
        """Write a document and record it."""
        self.folder.record(kind, content)
