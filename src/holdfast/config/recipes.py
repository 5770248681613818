"""Recipes by name: `{use: trades, beta: 6}` becomes the dataclass, every setting checked."""

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from typing import Any, get_type_hints

from holdfast import recipes as catalogue
from holdfast.config.attacks import setting
from holdfast.config.grammar import nearest
from holdfast.config.naming import PRESETS, RECIPES
from holdfast.core.constraints import L0, L1, L2, Linf
from holdfast.core.errors import UsageError
from holdfast.recipes.protocol import Recipe


def build_recipe(spec: Mapping[str, Any]) -> Recipe:
    """The recipe that `use:` names, with its settings checked against their types and ranges."""
    name = str(spec["use"])
    cls = getattr(catalogue, RECIPES[name])
    said = {**PRESETS.get(name, {}), **{key: value for key, value in spec.items() if key != "use"}}
    recipe: Recipe = cls(**_checked(cls, said, f"recipe {name}"))
    return recipe


def _checked(cls: type[Any], said: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings that are said, each as the type of its field; a part keeps what its recipe sets and nobody says."""
    hints = get_type_hints(cls, include_extras=True)
    parts = {f.name: f.default_factory for f in fields(cls)}
    values: dict[str, Any] = {}
    for key, value in said.items():
        if key not in parts:
            raise UsageError(f"{where} has no setting {key!r}{nearest(str(key), parts)}")
        hint = hints[key]
        if is_dataclass(hint) and isinstance(hint, type):
            if not isinstance(value, Mapping):
                raise UsageError(
                    f"{where}: {key} is {value!r}; set one of its parts, as in --set recipe.{key}.epochs=10"
                )
            part = parts[key]
            assert part is not MISSING
            values[key] = replace(part(), **_checked(hint, value, f"{where}: {key}"))
        else:
            values[key] = setting(hint, value, f"{where}: {key}")
    return values


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """Every setting of a recipe as plain values, those of its parts nested."""

    def plain(value: Any) -> Any:
        if isinstance(value, (Linf, L2, L1, L0)):
            pixels = "px" if isinstance(value, L0) and value.per == "pixel" else ""
            return f"{type(value).__name__.lower()}:{value.eps!r}{pixels}"
        if isinstance(value, tuple):
            return [plain(one) for one in value]
        if is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
        return getattr(value, "__name__", value) if callable(value) else value

    found: dict[str, Any] = plain(recipe)
    return found
