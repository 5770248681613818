"""Storage of the measurements of a run: in a folder or in memory."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from holdfast.core.evidence import Columns
from holdfast.harness import Seconds
from holdfast.store.folder import RunFolder, Split, Stage


class Keeper(Protocol):
    """Stores shards, stages, documents and times. In a folder they survive a kill."""

    def stage(self, name: str) -> Stage | None:
        """The stored columns of a finished stage; None if it is not finished."""

    def shards(self, stage: str) -> dict[int, Columns]:
        """Finished shards of a stage that is not complete."""

    def keep_shard(self, stage: str, shard: int, columns: Columns) -> None:
        """Store a finished shard."""

    def complete(self, stage: str, columns: Columns, reached: int | None) -> None:
        """Store a finished stage. `reached` is the first unfinished shard if time ran out, else None."""

    def splits(self) -> Sequence[Split]:
        """Batch splits after out-of-memory errors."""

    def add_split(self, stage: str, shard: int, at: int, size: int) -> None:
        """Record that memory ran out, and the batch size from there on."""

    def begin(self, stage: str, shard: int) -> None:
        """Count an attempt at a shard."""

    def spend(self, stage: str, shard: int, seconds: Seconds, *, done: bool) -> None:
        """Add to the time of a shard."""

    def spent(self, stage: str) -> Seconds:
        """Time of a stage over all attempts."""

    def document(self, kind: str) -> Mapping[str, Any] | None:
        """The recorded document of a kind; None if there is none."""

    def record(self, kind: str, content: Mapping[str, Any]) -> None:
        """Record a document of a kind, such as the doubts."""


@dataclass
class InMemory:
    """Keeps only times and splits, in memory; they are lost at the end of the process."""

    _splits: list[Split] = field(default_factory=list)
    _seconds: defaultdict[str, Seconds] = field(default_factory=lambda: defaultdict(Seconds))

    def stage(self, name: str) -> Stage | None:
        """Return None, since there is no earlier attempt."""
        return None

    def shards(self, stage: str) -> dict[int, Columns]:
        """Return an empty dictionary, since there is no earlier attempt."""
        return {}

    def keep_shard(self, stage: str, shard: int, columns: Columns) -> None:
        """Do nothing: the run itself has its shards in memory."""

    def complete(self, stage: str, columns: Columns, reached: int | None) -> None:
        """Do nothing: the run itself has its stages in memory."""

    def splits(self) -> Sequence[Split]:
        """Batch splits after out-of-memory errors."""
        return self._splits

    def add_split(self, stage: str, shard: int, at: int, size: int) -> None:
        """Record that memory ran out, and the batch size from there on."""
        self._splits.append({"stage": stage, "shard": shard, "at": at, "size": size})

    def begin(self, stage: str, shard: int) -> None:
        """Do nothing: there is only one attempt."""

    def spend(self, stage: str, shard: int, seconds: Seconds, *, done: bool) -> None:
        """Add to the time of a stage."""
        known = self._seconds[stage]
        self._seconds[stage] = Seconds(known.cpu + seconds.cpu, known.wall + seconds.wall)

    def spent(self, stage: str) -> Seconds:
        """Wall and CPU time of a stage."""
        return self._seconds[stage]

    def document(self, kind: str) -> Mapping[str, Any] | None:
        """Return None, since there is no earlier attempt."""
        return None

    def record(self, kind: str, content: Mapping[str, Any]) -> None:
        """Do nothing: the result contains the document."""


@dataclass(frozen=True)
class InFolder:
    """Stores the measurements of a run in its folder."""

    folder: RunFolder

    def stage(self, name: str) -> Stage | None:
        """The stored columns of a finished stage. Deletes its shard files if a kill left some."""
        found = self.folder.stage(name)
        if found is not None:
            self.folder.drop_shards(name)
        return found

    def shards(self, stage: str) -> dict[int, Columns]:
        """Finished shards whose files are complete."""
        return self.folder.shards(stage)

    def keep_shard(self, stage: str, shard: int, columns: Columns) -> None:
        """Write the columns of a finished shard to its file."""
        self.folder.keep_shard(stage, shard, columns)

    def complete(self, stage: str, columns: Columns, reached: int | None) -> None:
        """Write the columns of a stage to its file, and record it in the chain."""
        self.folder.complete(stage, columns, reached)

    def splits(self) -> Sequence[Split]:
        """Batch splits after out-of-memory errors in all attempts."""
        return self.folder.splits()

    def add_split(self, stage: str, shard: int, at: int, size: int) -> None:
        """Write that memory ran out, and the batch size from there on, before the run continues."""
        self.folder.add_split(stage, shard, at, size)

    def begin(self, stage: str, shard: int) -> None:
        """Count an attempt at a shard."""
        self.folder.leases.begin(stage, shard)

    def spend(self, stage: str, shard: int, seconds: Seconds, *, done: bool) -> None:
        """Add to the time of a shard."""
        self.folder.leases.spend(stage, shard, seconds.cpu, seconds.wall, done=done)

    def spent(self, stage: str) -> Seconds:
        """Time of a stage over all attempts."""
        known = self.folder.leases.spent(stage)
        return Seconds(known.cpu_s, known.wall_s)

    def document(self, kind: str) -> Mapping[str, Any] | None:
        """The document of a kind that the chain lists."""
        return self.folder.document(kind)

    def record(self, kind: str, content: Mapping[str, Any]) -> None:
        """Write a document to its file, and record it in the chain."""
        self.folder.record(kind, content)
