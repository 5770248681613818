"""Recipes: training methods, each of which returns a new model that is more robust.

A class is imported when it is first used; `holdfast.core.catalogue` lists all recipes.
"""

from typing import Any

from holdfast.core.catalogue import RECIPES, load_class

_MODULES = {entry.cls: entry.module for entry in RECIPES.values()}
__all__ = sorted(_MODULES)  # noqa: PLE0605


def __getattr__(name: str) -> type[Any]:
    return load_class(__name__, _MODULES, name)


def __dir__() -> list[str]:
    return __all__
