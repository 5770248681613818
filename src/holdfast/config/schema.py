"""The JSON Schema of the YAML file, for editors: the settings, and every attack under its `use:` tag."""

from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any, get_origin, get_type_hints

from pydantic import TypeAdapter

from holdfast.attacks.protocol import Attack
from holdfast.config.attacks import attack_names, functions
from holdfast.config.settings import AssessSettings


def schema() -> dict[str, Any]:
    """The published schema; `holdfast validate --schema` prints it, a test keeps the stored copy in step."""
    content = AssessSettings.model_json_schema()
    content["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    content["title"] = "holdfast.yaml"
    content["$defs"] = {
        **content.pop("$defs"),
        "attack": {"oneOf": [_attack(n, c) for n, c in attack_names().items()]},
    }
    properties = content["properties"]
    properties["surrogates"]["items"] = {"anyOf": [{"type": "string"}, properties["surrogates"]["items"]]}
    properties["attacks"] = {
        **properties["attacks"],
        "anyOf": [{"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/attack"}}, {"type": "null"}],
    }
    held = content["$defs"]["SurrogateSettings"]["properties"]
    for place, key in (
        (properties, "bounds"),
        *((p, k) for p in (properties, held) for k in ("mean", "std")),
    ):
        numbers = {"type": "array", "items": {"type": ["number", "string"]}}
        absent = [] if key == "bounds" else [{"type": "null"}]
        place[key]["anyOf"] = [numbers, {"type": "string"}, *absent]
        for old in ("type", "items", "minItems", "maxItems", "prefixItems"):
            place[key].pop(old, None)
    return content


def _attack(name: str, cls: type[Any]) -> dict[str, Any]:
    hints = get_type_hints(cls, include_extras=True)
    properties: dict[str, Any] = {"use": {"const": name}}
    for f in fields(cls):
        properties[f.name] = _setting(hints[f.name])
        if f.default is not MISSING:
            properties[f.name]["default"] = getattr(f.default, "__name__", f.default)
    needed = ["use", *(f.name for f in fields(cls) if f.default is MISSING)]
    about = (cls.__doc__ or "").strip().splitlines()[0]
    return {
        "type": "object",
        "title": name,
        "description": about,
        "properties": properties,
        "required": needed,
        "additionalProperties": False,
    }


def _setting(hint: Any) -> dict[str, Any]:
    if hint is Attack:
        return {"$ref": "#/$defs/attack"}
    if get_origin(hint) is Callable:
        return {"enum": sorted(functions(hint))}
    content: dict[str, Any] = TypeAdapter(hint).json_schema()
    if content.get("type") == "number":
        limits = {key: content[key] for key in content if key != "type"}
        return {"anyOf": [{"type": "number", **limits}, {"type": "string", "pattern": "^[0-9.eE+/ -]+$"}]}
    return content
