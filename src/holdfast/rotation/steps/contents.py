"""Reads the contents of a pool: parameter sets, surrogates, the generator, candidates, and the secret seed."""

import secrets

import torch

from holdfast.core.checkpoint import without_prefix
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Classifier
from holdfast.rotation import Generator, Members, loaded
from holdfast.rotation.generating import unpacked_generator
from holdfast.rotation.pool.pool import Pool
from holdfast.rotation.steps.generator_quality import GENERATOR
from holdfast.rotation.steps.rotation_request import RotateRequest
from holdfast.runs.store.columns import ColumnFile

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
