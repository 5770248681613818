"""Settings that all parameter sets of a pool share: the model, the examples, the threat model and the recipe."""

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.core.batch import UNLABELLED, Batch, Data
from holdfast.core.chain import canonical
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Classifier
from holdfast.core.pieces import results_in_pieces
from holdfast.core.threat import ThreatModel
from holdfast.recipes.training.fit import Training
from holdfast.recipes.training.recipe import trained_as
from holdfast.reports.numbers import strict
from holdfast.rotation import Source, Task, loaded, put
from holdfast.rotation.collecting import Beginning
from holdfast.rotation.pool.pool import Pool
from holdfast.runs.assess.preparation import enough_threads
from holdfast.runs.assess.request import Subject
from holdfast.runs.harden.attempt_training import learner_of, refuse_untrainable
from holdfast.runs.harden.candidates import Candidate
from holdfast.runs.harden.held_out import (
    digest_of,
    refuse_missing_classes,
    split_of,
    without_held,
    without_judged,
)
from holdfast.runs.store.differences import differences

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

    subject: Subject
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


def trainable_subject(subject: Subject, device: str, examples: Examples) -> Subject:
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
