"""The JSON Schema of configuration files, with which editors check them. It contains all settings,
attacks and recipes.
"""

from collections.abc import Callable, Mapping
from dataclasses import MISSING
from typing import Any, get_origin, get_type_hints

from pydantic import TypeAdapter

from holdfast import rotation
from holdfast.attacks.protocol import Attack
from holdfast.attacks.suites import SUITES
from holdfast.core.catalogue import RECIPES, load, names
from holdfast.core.constraints import Constraint
from holdfast.recipes.training.fit import Training
from holdfast.rotation import Codec, Immunise, LatentDiffusion
from holdfast.settings.grammar import AUTO, CARD, SOURCES
from holdfast.settings.texts import CONSENT
from holdfast.settings.values import written_fields
from holdfast.verbs.checked_settings import VERBS, VerbSettings
from holdfast.verbs.opening.recipes import (
    attack_names,
    functions,
    is_function_or_name,
    named_alternatives,
    part_of,
)
from holdfast.verbs.settings import RotateSettings


def settings_schema() -> dict[str, Any]:
    """Return the JSON Schema of configuration files, which the command `holdfast validate --schema` prints. A test
    compares it with the stored copy.

    The top level has the keys of all verbs, and for each verb a section with its name and its keys.
    """
    definitions: dict[str, Any] = {
        "attack": {"oneOf": [_tagged(n, c, {}) for n, c in attack_names().items()]},
        "recipe": {"oneOf": [_recipe(name) for name in (AUTO, CARD, *names("recipes"))]},
        "source": {"oneOf": [_tagged(n, getattr(rotation, of), {}) for n, of in SOURCES.items()]},
    }
    keys_by_verb = {verb: _keys(kind, definitions) for verb, kind in VERBS.items()}
    # those of serve and monitor first, so that keys that other verbs have too are described as those describe them
    order = sorted(VERBS, key=lambda verb: verb not in ("serve", "monitor"))
    shared = {key: value for verb in order for key, value in keys_by_verb[verb].items()}
    shared["recipe"] = {
        "description": "Training method, see holdfast harden and holdfast rotate.",
        "anyOf": [{"enum": [AUTO, CARD, *names("recipes")]}, {"$ref": "#/$defs/recipe"}],
    }
    for key in ("mean", "std"):
        _take_numbers(definitions["SurrogateSettings"]["properties"][key], optional=True)
    sections = {
        verb: {
            "description": f"Settings of {verb} alone. They take precedence over the keys at the top.",
            "anyOf": [
                {"type": "object", "properties": keys, "additionalProperties": False},
                {"type": "null"},
            ],
        }
        for verb, keys in keys_by_verb.items()
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "holdfast.yaml",
        "description": "All settings of the commands. Each command accepts those at the top that it uses, and those in "
        "the section with its name.",
        "type": "object",
        "properties": {**shared, **sections},
        "additionalProperties": False,
        "$defs": definitions,
    }


def _keys(kind: type[VerbSettings], definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the schemas of the keys of a verb, and add the schemas to which they refer to `definitions`."""
    content = kind.model_json_schema()
    definitions |= content.get("$defs", {})
    properties: dict[str, Any] = content["properties"]
    for key in CONSENT:
        properties.pop(key, None)
    if "suite" in properties:
        _take_attacks(properties)
    if "recipe" in properties:
        default = CARD if kind is RotateSettings else AUTO
        properties["recipe"] = {
            "description": properties["recipe"]["description"],
            "default": default,
            "anyOf": [{"enum": [default, *names("recipes")]}, {"$ref": "#/$defs/recipe"}],
        }
    if "source" in properties:
        properties["source"] = {
            "description": properties["source"]["description"],
            "anyOf": [{"enum": [*SOURCES]}, {"$ref": "#/$defs/source"}],
        }
        for key, cls in (("codec", Codec), ("generator", LatentDiffusion), ("immunise", Immunise)):
            properties[key] = {"description": properties[key]["description"], **_settings(cls, {})}
    if "bounds" in properties:
        _take_other_forms(properties)
    return properties


def _take_attacks(properties: dict[str, Any]) -> None:
    """Describe suites, attacks and surrogates in each form that a file may contain."""
    properties["surrogates"]["items"] = {"anyOf": [{"type": "string"}, properties["surrogates"]["items"]]}
    suites = [
        {"enum": [*SUITES]},
        {"type": "string"},
        {"type": "array", "minItems": 1, "items": {"type": "string"}},
    ]
    properties["suite"] = {**properties["suite"], "anyOf": [*suites, {"type": "null"}]}
    properties["attacks"] = {
        **properties["attacks"],
        "anyOf": [{"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/attack"}}, {"type": "null"}],
    }


def _take_other_forms(properties: dict[str, Any]) -> None:
    """Allow forms other than a list of numbers for some settings."""
    for key in ("bounds", "mean", "std"):
        _take_numbers(properties[key], optional=key != "bounds")
    ends = {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}
    properties["bounds"]["anyOf"] += [
        {
            "type": "array",
            "items": {"type": "array", "items": {"type": "number"}},
            "minItems": 2,
            "maxItems": 2,
        },
        {"type": "object", "additionalProperties": ends},
    ]
    side = {"anyOf": [{"type": "number"}, {"type": "array", "items": {"type": "number"}, "minItems": 1}]}
    pair = {"type": "array", "items": side, "minItems": 2, "maxItems": 2}
    properties["data_normalised"]["anyOf"] = [pair, {"type": "string"}, {"type": "null"}]
    names = {"type": "array", "items": {"type": ["string", "integer"]}, "minItems": 2}
    properties["class_names"]["anyOf"] = [names, {"type": "string"}, {"type": "null"}]


def _take_numbers(schema: dict[str, Any], *, optional: bool) -> None:
    """Allow text and fractions for a list of numbers."""
    numbers = {"type": "array", "items": {"type": ["number", "string"]}}
    for old in ("type", "items", "minItems", "maxItems", "prefixItems"):
        schema.pop(old, None)
    schema["anyOf"] = [numbers, {"type": "string"}, *([{"type": "null"}] if optional else [])]


def _recipe(name: str) -> dict[str, Any]:
    if name in (AUTO, CARD):
        training = _settings(Training, {})
        properties = {"use": {"const": name}, "training": training}
        return {"type": "object", "title": name, "properties": properties, "additionalProperties": False}
    return _tagged(name, load("recipes", name, type), RECIPES[name].settings if name in RECIPES else {})


def _tagged(name: str, cls: type[Any], preset: Mapping[str, Any]) -> dict[str, Any]:
    """Schema of a dataclass in a catalogue with its `use:` tag, and with the defaults of its name."""
    content = _settings(cls, preset)
    about = " ".join((cls.__doc__ or "").split("\n\n")[0].split())
    properties = {"use": {"const": name}, **content["properties"]}
    needed = ["use", *content["required"]]
    return {"title": name, "description": about, **content, "properties": properties, "required": needed}


def _settings(cls: type[Any], preset: Mapping[str, Any]) -> dict[str, Any]:
    hints = get_type_hints(cls, include_extras=True)
    properties: dict[str, Any] = {}
    for f in written_fields(cls):
        hint = hints[f.name]
        part = part_of(f, hint)
        properties[f.name] = _setting(hint) if part is None else _settings(part, {})
        if f.default is not MISSING:
            usual = preset.get(f.name, f.default)
            properties[f.name]["default"] = getattr(usual, "__name__", usual) if usual != () else []
    needed = [f.name for f in written_fields(cls) if f.default is MISSING and f.default_factory is MISSING]
    return {"type": "object", "properties": properties, "required": needed, "additionalProperties": False}


def _setting(hint: Any) -> dict[str, Any]:
    if hint is Attack:
        return {"$ref": "#/$defs/attack"}
    if hint == tuple[Constraint, ...]:  # each as in a threat
        return {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    if is_function_or_name(hint):
        return {"anyOf": [{"enum": [*named_alternatives(hint)]}, {"type": "string", "pattern": "\\.py:"}]}
    if get_origin(hint) is Callable:
        return {"enum": sorted(functions(hint))}
    content: dict[str, Any] = TypeAdapter(hint).json_schema()
    if content.get("type") == "number":
        limits = {key: content[key] for key in content if key != "type"}
        return {"anyOf": [{"type": "number", **limits}, {"type": "string", "pattern": "^[0-9.eE+/ -]+$"}]}
    return content
