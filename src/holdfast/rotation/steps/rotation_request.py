"""Settings that all parameter sets of a pool share, and the contents of a pool: its sets and its generator, with their
sizes and qualities.
"""

import json
import secrets
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.core.batch import UNLABELLED, Batch, Data
from holdfast.core.chain import canonical
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.evidence import Columns
from holdfast.core.meter import results_in_pieces
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.training import without_prefix
from holdfast.recipes.training.fit import Training
from holdfast.recipes.training.recipe import trained_as
from holdfast.reports.words import strict
from holdfast.rotation import Generator, Members, Source, Task, loaded, put
from holdfast.rotation.collecting import Beginning
from holdfast.rotation.generating import unpacked_generator
from holdfast.rotation.pool import Pool
from holdfast.runs.assess.preparation import enough_threads
from holdfast.runs.assess.request import DescribedModel
from holdfast.runs.engine.run import MemoryStore
from holdfast.runs.harden.attempt_training import learner_of, refuse_untrainable
from holdfast.runs.harden.candidates import Candidate
from holdfast.runs.harden.held_out import (
    digest_of,
    refuse_missing_classes,
    split_of,
    without_held,
    without_judged,
)
from holdfast.runs.store.columns import ColumnFile
from holdfast.runs.store.folder import StoredStage, differences

FIRST = 2_000
"""Number of held-out examples on which a set is judged first; it is doubled as long as a gate is unclear."""
MOST, EVERY = 8_000, 5
"""One in `EVERY` training examples is held out, and at most `MOST` in total."""
_SAMPLE = 8  # inputs that show whether a network changes its input in place
_MAY_BE_SEEN = (
    "sets are trained further from the given model, which may have been trained on the held-out examples; then "
    "the measured accuracy of sets and bases is too high"
)


@dataclass(frozen=True)
class Examples:
    """Training examples of a pool, split once into examples for training the parameter sets and held-out examples for
    judging them.
    """

    train: Batch
    held_out: Batch
    digest: str
    name: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class RotateRequest:
    """Settings that all parameter sets of a pool share: the model, the examples, the threat model and the recipe."""

    subject: DescribedModel
    """the model, with the architecture and preprocessing of all sets"""
    threat: ThreatModel
    threat_text: str
    """the threat model in the syntax of the command line"""
    candidate: Candidate
    """the recipe of the training"""
    source: Source
    examples: Examples
    seed: int = 0
    begins: Beginning = "he"
    device: str = "cpu"
    settings: Mapping[str, Any] = field(default_factory=dict)
    """settings from which the model, the examples and the recipe can be opened again, as plain values"""

    @property
    def model(self) -> Classifier:
        """The model that defines the architecture and the preprocessing of all parameter sets of the pool."""
        return self.subject.model

    @cached_property
    def train(self) -> Batch:
        """Examples on which parameter sets are trained, on the device."""
        return self.examples.train.to(torch.device(self.device))

    @cached_property
    def held_out(self) -> Batch:
        """Held-out examples on which parameter sets are judged, in random order, on the device."""
        return self.examples.held_out.to(torch.device(self.device))

    @cached_property
    def first_held_out(self) -> Batch:
        """The held-out examples on which each parameter set is judged first."""
        return self.held_out.take(torch.arange(min(FIRST, len(self.held_out))))

    def enough_threads(self) -> AbstractContextManager[None]:
        """Return a context manager in which torch uses one thread if the network is too small to benefit from more."""
        return enough_threads(self.model, self.train.x[:_SAMPLE])

    def task(self, epochs: int) -> Task:
        """Return the settings of the training of a parameter set for the given number of epochs."""
        recipe = trained_as(self.candidate.recipe, replace(self.training, epochs=epochs))
        return Task(self.model, self.train, self.threat, recipe, recipe, self.begins)

    @property
    def training(self) -> Training:
        """Training settings of the recipe, before a time budget determines the number of epochs."""
        return self.candidate.recipe.training

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the report on the held-out examples, such as removed duplicates."""
        if self.source.from_fresh_weights:
            return self.examples.notes
        return (*self.examples.notes, _MAY_BE_SEEN)

    def of_set(self, pool: Pool, name: str) -> Classifier:
        """Return a parameter set of the pool as a model."""
        return loaded(self.model, pool.weights(name), name)

    def of_weights(self, weights: Mapping[str, Tensor]) -> Classifier:
        """Return a model with the given parameters. Its batch norm statistics are computed from training examples."""
        return put(self.model, weights, self.train)

    def about(self) -> dict[str, Any]:
        """Return the settings as they are stored in the manifest of the pool, for the comparison when the pool is
        opened again.
        """
        source_name, examples = type(self.source).__name__.lower(), self.examples
        settings = {
            "model": {key: value for key, value in self.subject.card.items() if key != "files"},
            "digest": self.subject.digest,
            "data": {
                "name": examples.name,
                "digest": examples.digest,
                "train": len(examples.train),
                "held": len(examples.held_out),
            },
            "threat": self.threat_text,
            "recipe": {"name": self.candidate.name, "settings": dict(self.candidate.settings)},
            "source": {"name": source_name, **vars(self.source)},
            "begins": self.begins,
            "seed": self.seed,
            "settings": dict(self.settings),
        }
        plain_settings: dict[str, Any] = json.loads(canonical(strict(settings)))
        return plain_settings

    def refuse_other(self, pool: Pool) -> None:
        """Raise `UsageError` if the pool was created with another model, other data or other settings."""
        stored, requested = pool.manifest["about"], self.about()
        descriptions = {"digest": "model (other weights or preprocessing)", "begins": "initialisation"}
        for key in ("digest", "data", "threat", "recipe", "source", "begins", "seed"):
            if stored.get(key) != requested[key]:
                sides = ({key: side.get(key), **_named(key, side)} for side in (stored, requested))
                difference = differences(*sides).removeprefix(key).lstrip(".: ")
                raise UsageError(
                    f"{str(pool.path)!r} was created with another {descriptions.get(key, key)} ({difference}); use "
                    "that again, or create another pool"
                )


def _named(key: str, about: Mapping[str, Any]) -> dict[str, Any]:
    """Properties by which the user can identify a model, in addition to its digest."""
    card = about.get("model") or {}
    return {"model": {name: card.get(name) for name in ("name", "mean", "std")}} if key == "digest" else {}


def split_examples(data: Batch, test: Data, name: str, classes: int, seed: int) -> Examples:
    """Remove test examples from the training examples, and split the remaining ones. One in five of them, and at most
    8,000, are held out.
    """
    refuse_missing_classes(data, classes)
    fresh, judged = without_judged(data.take(data.y != UNLABELLED), test)
    rest, held_out = split_of(fresh, seed, most=MOST, every=EVERY)
    rest, duplicates = without_held(rest, held_out)
    order = Draws(seed).at("judging").bits(held_out.ids).argsort()
    notes = tuple(note for note in (judged, duplicates) if note)
    if notes:
        refuse_missing_classes(rest, classes, after="; ".join(notes))
    return Examples(rest, held_out.take(order), digest_of(fresh), name, notes)


def trainable_subject(subject: DescribedModel, device: str, examples: Examples) -> DescribedModel:
    """Return the model of a run as a copy that can be trained.

    Raises `UsageError` or `TargetError` if the model cannot be trained.
    """
    refuse_untrainable(subject.model)
    inputs = examples.train.x[:_SAMPLE].to(torch.device(device))
    return replace(subject, model=learner_of(subject.model, inputs).eval())


def state_of(model: Classifier) -> dict[str, Tensor]:
    """Return the parameters and buffers of a network on the CPU, which form a parameter set of the pool."""
    assert isinstance(model.net, nn.Module)
    return {name: value.detach().cpu() for name, value in model.net.state_dict().items()}


def accuracy(model: Classifier, data: Batch) -> float:
    """Return the fraction of the examples that a model classifies correctly."""

    def right(some: Batch) -> int:
        with torch.no_grad():
            return int((model(some.x).argmax(1) == some.y).sum())

    return sum(results_in_pieces(data, right)) / len(data)


GENERATOR = "generator"
"""Name of the file with the trained generator."""


@dataclass(frozen=True)
class TrainedGenerator:
    """Size and quality of the trained generator of a pool."""

    sets: int
    parameters: int
    rank: int
    """number of directions in which the sets differ"""
    variance_lost: float
    """fraction of the variance that the codec does not reconstruct"""
    accuracy_lost: float
    """accuracy that a set loses by encoding and decoding, as a mean over sets"""
    codec_s: float
    diffusion_s: float


def trained_generator(pool: Pool) -> TrainedGenerator | None:
    """Return the size and the quality of the generator of a pool, or None if there is no generator."""
    stored = pool.kept(GENERATOR)
    return None if stored is None else TrainedGenerator(**stored.about)


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
