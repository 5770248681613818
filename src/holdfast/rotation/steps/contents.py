"""Reads and stores the contents of a pool: parameter sets, surrogates, the generator, candidates, and secret
examples.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.evidence import Columns
from holdfast.core.model import Classifier
from holdfast.core.training import without_prefix
from holdfast.rotation import Generator, Members, loaded
from holdfast.rotation.generating import unpacked_generator
from holdfast.rotation.pool.pool import Pool
from holdfast.rotation.steps.generator_quality import GENERATOR
from holdfast.rotation.steps.rotation_request import RotateRequest
from holdfast.runs.engine.executor import MemoryStore
from holdfast.runs.store.columns import ColumnFile
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


OWN = 4
"""Number of surrogates of a surrogate-only attacker."""
PLAN = "plan"
"""Name of the file with the plan of a collection, which contains the number of epochs of each training."""
_SEED = "secret"  # name of the file with the secret seed


def training_name(k: int) -> str:
    """Return the name of the file that contains the parameter sets of training run number `k`."""
    return f"run_{k}"


def surrogate_name(k: int) -> str:
    """Return the name of the file that contains surrogate number `k`."""
    return f"own_{k}"


def secret(pool: Pool) -> Draws:
    """Return the secret random stream of a pool, which is created at the first call.

    Its seed comes from the operating system and is stored encrypted, because anyone with the seed could repeat the
    collection.
    """
    stored = pool.kept(_SEED)
    if stored is None:
        pool.keep(_SEED, {"seed": torch.tensor([secrets.randbits(62)])}, {})
        stored = pool.kept(_SEED)
        assert stored is not None
    return Draws(int(stored.columns["seed"]))


def epochs_of(pool: Pool) -> int:
    """Return the planned number of epochs of each training run of a pool. Raises `UsageError` if there is no plan."""
    plan = pool.kept(PLAN)
    if plan is None:
        raise UsageError(
            f"nothing was collected in {str(pool.path)!r} yet; run holdfast rotate collect first"
        )
    return int(plan.about["epochs"])


def collected_members(pool: Pool) -> Members:
    """Return the parameter sets of all training runs of a pool. Raises `UsageError` if some are missing."""
    plan = pool.kept(PLAN)
    runs = 1 if plan is None else int(plan.about["runs"])
    members: Members | None = None
    for run, stored in enumerate(_complete(pool, [training_name(k) for k in range(runs)])):
        tensors = without_prefix(stored.columns, "set.")
        sets = Members(tensors, torch.full((int(stored.about["sets"]),), run))
        members = sets if members is None else members.joined(sets)
    assert members is not None
    return members


def surrogates(pool: Pool, request: RotateRequest) -> list[Classifier]:
    """Return the surrogate models of the surrogate-only attacker from the pool. Raises `UsageError` if some are
    missing.
    """
    files = _complete(pool, [surrogate_name(k) for k in range(OWN)])
    return [loaded(request.model, stored.columns, "own") for stored in files]


def _complete(pool: Pool, names: list[str]) -> list[ColumnFile]:
    """The stored trainings of these names. Raises `UsageError` if some are missing."""
    files = [stored for name in names if (stored := pool.kept(name)) is not None]
    if len(files) < len(names):
        raise UsageError(
            f"{str(pool.path)!r} contains {len(files)} of {len(names)} runs; finish the collection first, by "
            "resuming it"
        )
    return files


def bases(pool: Pool) -> tuple[str, ...]:
    """Return the names of the bases of a pool in their order."""
    return tuple(member.name for member in pool.ledger.members if member.role == "base")


def bases_left(pool: Pool) -> tuple[str, ...]:
    """Return the names of the bases of a pool that were not deleted."""
    return tuple(m.name for m in pool.ledger.members if m.role == "base" and not m.deleted)


def generator_of(pool: Pool, request: RotateRequest) -> Generator | None:
    """Return the generator of the pool, or None if there is none."""
    stored = pool.kept(GENERATOR)
    if stored is None:
        return None
    device = torch.device(request.device)
    return unpacked_generator({name: value.to(device) for name, value in stored.columns.items()})
