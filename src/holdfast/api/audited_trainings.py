"""Trains networks for audits: by a function of the user, or as the card of a hardened model states."""

import json
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch

from holdfast.api.recipe_building import build_recipe, functions_in
from holdfast.core.batch import Batch
from holdfast.core.chain import canonical, digest
from holdfast.core.draws import Draws
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Inputs, Labels
from holdfast.io.files import text_of_file
from holdfast.io.functions import TrainingFunction, open_training, refuse_other_classes
from holdfast.io.models.cards import trained_by
from holdfast.io.models.models import CARD
from holdfast.recipes.training.recipe import Recipe
from holdfast.rotation.collecting import with_fresh_weights
from holdfast.runs.harden.attempt_training import refuse_untrainable
from holdfast.threats.parsing import parse_threat


@dataclass(frozen=True)
class CardTraining:
    """The training of a hardened model, repeated on other examples and from fresh weights."""

    name: str
    """path of the card"""
    digest: str
    """SHA-256 in hex of the recipe, its settings and the threat"""
    recipe: Recipe
    threat: ThreatModel

    def __call__(self, model: Classifier, x: Inputs, y: Labels, seed: int) -> Classifier:
        """Train a copy of `model` with fresh weights on the examples, and return it in eval mode."""
        rng = Draws(seed)
        trained = with_fresh_weights(model, rng.at("begin"), "own")
        examples = Batch(x, y, torch.arange(len(x), device=x.device))
        (last,) = deque(self.recipe(trained, examples, self.threat, rng=rng), maxlen=1)
        last.put_into(trained)
        return trained.eval()


Training = CardTraining | TrainingFunction
"""A training that an audit repeats."""


def open_any_training(train: object) -> Training:
    """Return a training that is given as a folder that `harden` wrote, or as a function (`FILE.py:F`)."""
    if isinstance(train, str) and (Path(train) / CARD).is_file():
        return open_card_training(train)
    return open_training(train)


def trained_like(training: Training, model: Classifier, x: Inputs, y: Labels, seed: int) -> Classifier:
    """Train a network on inputs, and return it as a classifier with the properties of `model`. A function of the user
    gets the inputs with the preprocessing of `model`.
    """
    if isinstance(training, CardTraining):
        refuse_untrainable(model)
        return training(model, x, y, seed)
    net = training(model.preprocess(x), y, seed)
    mean, std = (None if value is None else value.tolist() for value in (model.mean, model.std))
    trained = model.renormalised(mean, std).to(x.device)
    trained.net, trained.classes = net, None
    with torch.no_grad():
        logits = trained(x[:1])
    assert model.classes is not None
    refuse_other_classes(training.name, logits, model.classes)
    return trained


def open_card_training(folder: str) -> CardTraining:
    """Return the training in the card of a hardened model. Raises `UsageError` if the card names a function."""
    path = Path(folder) / CARD
    spec = trained_by(str(path))
    if spec is None:
        raise UsageError(f"{str(path)!r} names no recipe; give a function, as in net.py:fit")
    for key, value in functions_in(spec).items():
        raise UsageError(
            f"recipe.training.{key} is {value} in {str(path)!r}, and code that a card names is not run; give a "
            "function that trains the network, as in net.py:fit"
        )
    threat = json.loads(text_of_file(path, "card")).get("threat")
    if not isinstance(threat, str):
        raise TargetError(
            f"{str(path)!r} states no threat of the training, but {threat!r:.80}; restore the card"
        )
    identity = digest(canonical({**spec, "threat": threat}))
    return CardTraining(str(path), identity, build_recipe(spec), parse_threat(threat).opened())
