"""Recipes: each trains a new model that is more robust. A class is loaded when it is used.

`holdfast.core.catalogue` is the list of them.
"""

from typing import Any

from holdfast.core.catalogue import RECIPES, load_class

_MODULES = {entry.cls: entry.module for entry in RECIPES.values()}
__all__ = sorted(_MODULES)  # noqa: PLE0605


def __getattr__(name: str) -> type[Any]:
    return load_class(__name__, _MODULES, name)


def __dir__() -> list[str]:
    return __all__
