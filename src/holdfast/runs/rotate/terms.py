"""What the sets of a pool are of: a model, its examples, a threat, a recipe and a source, opened and ready."""

import json
from collections.abc import Mapping
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
from holdfast.core.threat import ThreatModel
from holdfast.ops.fit import Training
from holdfast.ops.recipe import trained_as
from holdfast.reports.numbers import strict
from holdfast.rotation import Source, Task, loaded, put
from holdfast.rotation.collecting import Beginning
from holdfast.runs.candidates import Candidate
from holdfast.runs.held_out import digest_of, refuse_classes, split_of, without_held, without_judged
from holdfast.runs.order import Subject
from holdfast.runs.pieces import in_pieces
from holdfast.runs.trainable import learner_of, refuse_untrainable
from holdfast.store.differences import differences
from holdfast.store.pool import Pool

FIRST = 2_000
"""Held-out examples that a set is judged on at first; where that leaves a gate unclear, twice as many."""
MOST, EVERY = 8_000, 5
"""One training example in `EVERY` is held out, and at most `MOST`."""
_SEEN = 8
_SEEN_BEFORE = (
    "sets go on from the given model, which may have been trained on the examples that are held out to judge them; "
    "where it was, their accuracy flatters, theirs and the bases' alike"
)


@dataclass(frozen=True)
class Examples:
    """Training examples, parted once into what sets are trained on and what judges them."""

    train: Batch
    held: Batch
    digest: str
    name: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Terms:
    """What every set of a pool has in common."""

    subject: Subject
    """the model whose architecture and preprocessing they share"""
    threat: ThreatModel
    said: str
    """the threat as the command line takes it"""
    candidate: Candidate
    """the recipe that trains them"""
    source: Source
    examples: Examples
    seed: int = 0
    begins: Beginning = "he"
    device: str = "cpu"
    settings: Mapping[str, Any] = field(default_factory=dict)
    """what opens all of it again, as plain values"""

    @property
    def model(self) -> Classifier:
        """The given model."""
        return self.subject.model

    @cached_property
    def train(self) -> Batch:
        """What sets are trained on, and nothing is judged by."""
        return self.examples.train.to(torch.device(self.device))

    @cached_property
    def held(self) -> Batch:
        """What judges them, in an order drawn by the seed."""
        return self.examples.held.to(torch.device(self.device))

    @cached_property
    def first_held(self) -> Batch:
        """The first of them, on which sets are judged at first."""
        return self.held.take(torch.arange(min(FIRST, len(self.held))))

    def task(self, epochs: int) -> Task:
        """How a set is trained, in so many epochs."""
        recipe = trained_as(self.candidate.recipe, replace(self.training, epochs=epochs))
        return Task(self.model, self.train, self.threat, recipe, recipe, self.begins)

    @property
    def training(self) -> Training:
        """Of the recipe, before a budget says how many epochs there are."""
        return self.candidate.recipe.training

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be known of the examples that judge."""
        if self.source.anew:
            return self.examples.notes
        return (*self.examples.notes, _SEEN_BEFORE)

    def of_set(self, pool: Pool, name: str) -> Classifier:
        """A set of the pool as a model."""
        return loaded(self.model, pool.weights(name), name)

    def of_weights(self, weights: Mapping[str, Tensor]) -> Classifier:
        """A model with other parameters, whose other numbers follow from training examples."""
        return put(self.model, weights, self.train)

    def about(self) -> dict[str, Any]:
        """What the pool says of itself, by which `refuse_other` knows it again."""
        of, examples = type(self.source).__name__.lower(), self.examples
        said = {
            "model": {key: value for key, value in self.subject.card.items() if key != "files"},
            "digest": self.subject.digest,
            "data": {
                "name": examples.name,
                "digest": examples.digest,
                "train": len(examples.train),
                "held": len(examples.held),
            },
            "threat": self.said,
            "recipe": {"name": self.candidate.name, "settings": dict(self.candidate.settings)},
            "source": {"name": of, **vars(self.source)},
            "begins": self.begins,
            "seed": self.seed,
            "settings": dict(self.settings),
        }
        plain: dict[str, Any] = json.loads(canonical(strict(said)))
        return plain

    def refuse_other(self, pool: Pool) -> None:
        """`UsageError` where the pool is of another model, of other data, or was collected otherwise."""
        known, mine = pool.manifest["about"], self.about()
        words = {"digest": "model, of other weights or preprocessing", "begins": "beginning"}
        for key in ("digest", "data", "threat", "recipe", "source", "begins", "seed"):
            if known.get(key) != mine[key]:
                sides = ({key: side.get(key), **_named(key, side)} for side in (known, mine))
                told = differences(*sides).removeprefix(key).lstrip(".: ")
                raise UsageError(
                    f"{str(pool.path)!r} is of another {words.get(key, key)} ({told}); bring that back, or begin "
                    f"another pool"
                )


def _named(key: str, about: Mapping[str, Any]) -> dict[str, Any]:
    """What a person knows a model by, beside its digest."""
    card = about.get("model") or {}
    return {"model": {name: card.get(name) for name in ("name", "mean", "std")}} if key == "digest" else {}


def parted(data: Batch, test: Data, name: str, classes: int, seed: int) -> Examples:
    """Without test examples; a fifth, and no more than four times what judges at first, is held out."""
    refuse_classes(data, classes)
    fresh, judged = without_judged(data.take(data.y != UNLABELLED), test)
    rest, held = split_of(fresh, seed, most=MOST, every=EVERY)
    rest, twice = without_held(rest, held)
    order = Draws(seed).at("judging").bits(held.ids).argsort()
    notes = tuple(note for note in (judged, twice) if note)
    if notes:
        refuse_classes(rest, classes, after="; ".join(notes))
    return Examples(rest, held.take(order), digest_of(fresh), name, notes)


def ready(subject: Subject, device: str, examples: Examples) -> Subject:
    """With a copy of the model that can be trained; raises `UsageError` and `TargetError` where it cannot."""
    refuse_untrainable(subject.model)
    seen = examples.train.x[:_SEEN].to(torch.device(device))
    return replace(subject, model=learner_of(subject.model, seen).eval())


def state_of(model: Classifier) -> dict[str, Tensor]:
    """What a set of the pool holds: the network's parameters and buffers, off the accelerator."""
    assert isinstance(model.net, nn.Module)
    return {name: value.detach().cpu() for name, value in model.net.state_dict().items()}


def accuracy(model: Classifier, data: Batch) -> float:
    """Share that is right."""

    def right(some: Batch) -> int:
        with torch.no_grad():
            return int((model(some.x).argmax(1) == some.y).sum())

    return sum(in_pieces(data, right)) / len(data)
