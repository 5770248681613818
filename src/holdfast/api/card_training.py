"""Trains networks as a model of `holdfast harden` was trained, by the recipe in its card."""

import json
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from holdfast.api.recipe_building import build_recipe, functions_in
from holdfast.core.batch import Batch
from holdfast.core.chain import canonical, digest
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Inputs, Labels
from holdfast.io.models.cards import CARD, trained_by
from holdfast.recipes.training.recipe import Recipe
from holdfast.rotation.collecting import with_fresh_weights
from holdfast.settings.grammar import parse_threat
from holdfast.settings.threats_and_attacks import threat_model


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


def is_card_folder(train: object) -> bool:
    """Return whether a training is given as a folder that `harden` wrote."""
    return isinstance(train, str) and (Path(train) / CARD).is_file()


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
    card: Mapping[str, str] = json.loads(path.read_text(encoding="utf-8"))
    threat = card["threat"]
    identity = digest(canonical({**spec, "threat": threat}))
    return CardTraining(str(path), identity, build_recipe(spec), threat_model(parse_threat(threat)))
