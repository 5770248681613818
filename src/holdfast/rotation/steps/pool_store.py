"""Stores the artefacts of a run of the engine as encrypted files of a pool."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from holdfast.core.evidence import Columns
from holdfast.rotation.pool.pool import Pool
from holdfast.runs.engine.store import MemoryStore
from holdfast.runs.store.folder import StoredStage


@dataclass
class PoolStore(MemoryStore):
    """Store of a run whose stages are encrypted files of a pool.

    Shards, batch splits and times are in memory only, and are lost when the process ends. The states of the parameter
    sets are in the ledger, which the steps of the rotation use directly.
    """

    pool: Pool = field(kw_only=True)

    def stage(self, name: str) -> StoredStage | None:
        """Return the decrypted columns of a stage from the pool, or None if the stage is not complete."""
        stored = self.pool.kept(name)
        return None if stored is None else StoredStage(stored.columns, about=stored.about)

    def complete(
        self,
        stage: str,
        columns: Columns,
        reached: int | None = None,
        about: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Encrypt the columns of a finished stage and store them in the pool."""
        self.pool.keep(stage, columns, about)
