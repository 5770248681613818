"""Reads how a model was trained from its model card: the recipe and its settings.

A card is a file beside the weights that `harden` wrote, or the description of a bundled model.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from holdfast.core.errors import TargetError
from holdfast.core.remedies import Remedy
from holdfast.io.files import text_of_file
from holdfast.io.models.models import BUNDLED_FOLDER, CARD

_INDENT = "    "  # indent of the settings in a bundled card


def trained_by(address: str) -> dict[str, Any] | None:
    """Return the recipe with which a model was trained, from its model card, as a dictionary of settings. The name of
    the recipe has the key `use`.

    The result is None if the model has no card, or if its card contains no recipe.
    """
    bundled, beside = BUNDLED_FOLDER / f"{address}.md", Path(address).with_name(CARD)
    if "/" not in address and bundled.is_file():
        lines = bundled.read_text(encoding="utf-8").splitlines()
        return _recipe(json.loads("\n".join(line for line in lines if line.startswith(_INDENT)) or "{}"))
    if not (Path(address).is_file() and beside.exists()):
        return None
    text = text_of_file(beside, "card")
    try:
        card = json.loads(text)
        name, settings = card["recipe"], card["settings"]
        if not isinstance(name, str) or not isinstance(settings.get("training", {}), dict):
            raise TypeError("recipe is not a text, or settings.training is not an object")
        return _recipe({**settings, "recipe": name})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TargetError(
            f"{str(beside)!r} is not the card of a hardened model: {error!r}; restore it",
            Remedy("recipe", "pgd"),
        ) from error


def _recipe(card: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the name and settings of the recipe, without the other entries of a bundled card."""
    if "recipe" not in card:
        return None
    return {
        "use": card["recipe"],
        **{key: card[key] for key in card if key not in ("recipe", "threat", "seed")},
    }
