"""Converts documents of runs that an earlier version wrote with schema 1 to the keys of schema 2.

Such runs can be read, compared and used as a baseline, but not resumed. The files themselves are never changed.
"""

from collections.abc import Callable, Mapping
from typing import Any

VERSION = 1

DETAILS = frozenset(
    (
        "batch norm is folded into the layer before it",
        "convolutions run channels last",
        "convolutions of few channels give their input gradient as a matrix product",
    )
)
"""Notes of schema 1 that describe the optimised copy of the model, which attacks query.

In schema 2 they are in the separate field `details`.
"""

Json = dict[str, Any]


def manifest_of_schema_1(content: Json) -> Json:
    """Return the content of a `run.json` of schema 1 with the keys of schema 2. Its `schema_version` remains 1."""
    content = _renamed(content, {"others": "other_data"})
    config, notes = content.get("config"), content.get("notes")
    if not isinstance(config, Mapping) or not isinstance(config.get("stages"), list):
        return content  # a hardening: its keys are the same
    stages = [
        {"wave_of": "", "adaptive": False, **stage} if isinstance(stage, Mapping) else stage
        for stage in config["stages"]
    ]
    content["config"] = {**_renamed(config, {"smallest": "minimum_norm"}), "stages": stages}
    if isinstance(notes, list):
        content["notes"] = [note for note in notes if not _is_detail(note)]
        content["details"] = [note for note in notes if _is_detail(note)]
    return {"surrogates": [], "other_data": [], **content}


def document_of_schema_1(kind: str, content: Json) -> Json:
    """Return the content of a run document of schema 1 with the keys of schema 2. `kind` is the kind of document, such
    as `doubts`.
    """
    return _DOCUMENTS.get(kind, dict)(content)


def _is_detail(note: object) -> bool:
    return isinstance(note, str) and note in DETAILS


def _doubts(content: Json) -> Json:
    content = dict(_renamed(content, {"fallen": "broken"}))
    return content | _each(content, "doubts", {"says": "message"})


def _verdict(content: Json) -> Json:
    content = dict(_renamed(content, {"judged": "verdict_of"}))
    return content | _each(content, "gates", {"claim": "condition"})


def _adaptive(content: Json) -> Json:
    names = {
        "because": "reasons",
        "ways": "bypassed",
        "blind": "no_detector_gradient",
        "missed": "unfinished",
    }
    return dict(_renamed(content, names))


def _rotation(content: Json) -> Json:
    content = dict(
        _renamed(content, {"right": "n_correct", "instead": "alternatives", "verdict": "conclusion"})
    )
    row = {"who": "attacker", "holds": "has", "word": "effect", "says": "message", "turned": "broken_ids"}
    alternative = {
        "who": "alternative",
        "clean": "clean_accuracy",
        "thief": "stolen_set",
        "white": "white_box",
        "says": "message",
    }
    content |= _each(content, "rows", row) | _each(content, "alternatives", alternative)
    for entry in content.get("rows", ()):
        if isinstance(entry, dict) and entry.get("effect") == "untouched":
            entry["effect"] = "not affected"
    return content | {"doubt": _renamed(content.get("doubt"), {"says": "message"})}


_DOCUMENTS: Mapping[str, Callable[[Json], Json]] = {
    "doubts": _doubts,
    "verdict": _verdict,
    "adaptive": _adaptive,
    "rotation": _rotation,
}


def _each(content: Json, key: str, names: Mapping[str, str]) -> Json:
    """The list `key` with the keys of its entries renamed; empty if there is no such list."""
    entries = content.get(key)
    return {key: [_renamed(entry, names) for entry in entries]} if isinstance(entries, list) else {}


def _renamed(content: Any, names: Mapping[str, str]) -> Any:
    """The mapping with other keys; any other value, as in an altered file, is returned unchanged."""
    return (
        {names.get(key, key): value for key, value in content.items()}
        if isinstance(content, Mapping)
        else content
    )
