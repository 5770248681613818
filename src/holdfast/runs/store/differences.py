"""Describes how the settings of the run in a folder differ from the settings of the requested run."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from holdfast.core.errors import TargetError
from holdfast.runs.harness.kinds import KINDS
from holdfast.threats.stored import threat_from_json

MOST = 4
"""Largest number of differences that are listed; further ones are only counted."""
_FIRST = ("threat", "suite", "seed")
_DIGITS = 12  # digits of a digest that are shown
_DIGEST = re.compile("[0-9a-f]{64}")


def differences(stored: Mapping[str, Any], requested: Mapping[str, Any]) -> str:
    """Return the differences between the settings of two runs as text, such as `threat: linf:0.1 → linf:0.2; seed: 0 →
    1`.

    The text is empty if no difference can be listed.
    """
    names = dict.fromkeys([*_FIRST, *sorted({*stored, *requested} - {"stages", "functions"}), "stages"])
    lines = [
        *_functions(stored, requested),
        *(line for name in names for line in _of(name, stored.get(name), requested.get(name))),
    ]
    more = [f"and {len(lines) - MOST} more"] if len(lines) > MOST else []
    return "; ".join([*lines[:MOST], *more])


def _of(name: str, stored: Any, requested: Any) -> Iterator[str]:
    try:
        if name == "threat":
            if _file_content(stored) != _file_content(requested):
                yield f"another content of the file {requested['limits'].get('file')}"
            stored, requested = threat_from_json(stored).text, threat_from_json(requested).text
        elif name == "settings":  # settings by recipe; a different recipe is shown under `recipe`
            common = stored.keys() & requested.keys()
            stored, requested = ({recipe: side[recipe] for recipe in common} for side in (stored, requested))
        elif name == "stages":
            yield from _stages(stored, requested)
            return
    except (
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        TargetError,
    ):  # another version has another format
        pass
    yield from _changes(stored, requested, name)


def _functions(stored: Mapping[str, Any], requested: Mapping[str, Any]) -> Iterator[str]:
    """Differences of the functions of the user, whose digests have keys such as `pgd.training.optimizer`."""
    before, now = (side.get("functions") or {} for side in (stored, requested))
    for key in sorted(before.keys() & now.keys()):
        if before[key] != now[key]:
            recipe, _, name = key.rsplit(".", 2)
            address = stored["settings"][recipe]["training"][name]
            yield f"the function {name} has changed ({address})"
    sides = (
        (before, now, "given before and {} not given now"),
        (now, before, "not given before and {} given now"),
    )
    for these, others, change in sides:
        missing = sorted({key.rpartition(".")[2] for key in these.keys() - others.keys()})
        if missing:
            listed = " and ".join(filter(None, (", ".join(missing[:-1]), missing[-1])))
            noun, verb, be = ("function", "was", "is") if len(missing) == 1 else ("functions", "were", "are")
            yield f"the {noun} {listed} {verb} {change.format(be)}"


def _file_content(threat: Mapping[str, Any]) -> Any:
    """The content of the file of a threat model on texts, or None."""
    return (threat.get("limits") or {}).get("content")


def _stages(stored: Sequence[Mapping[str, Any]], requested: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Differences of the attacks by name; for equal attacks, differences of their settings."""
    for kind in KINDS.values():
        if not kind.listed:
            continue
        sides = [[stage for stage in stages if stage["kind"] == kind.name] for stages in (stored, requested)]
        stored_attacks, requested_attacks = ([stage["attack"] for stage in side] for side in sides)
        if stored_attacks != requested_attacks:
            yield f"{kind.listed}: {', '.join(stored_attacks) or 'none'} → {', '.join(requested_attacks) or 'none'}"
            continue
        for stored_stage, requested_stage in zip(*sides, strict=True):
            yield from _changes(stored_stage["settings"], requested_stage["settings"], stored_stage["attack"])


def _changes(stored: object, requested: object, path: str) -> Iterator[str]:
    """`PGD.steps: 3 → 5` for every value that differs."""
    if isinstance(stored, dict) and isinstance(requested, dict):
        for name in sorted({*stored, *requested}):
            yield from _changes(stored.get(name), requested.get(name), f"{path}.{name}")
    elif stored != requested:
        yield f"{path}: {_shown(stored)} → {_shown(requested)}"


def _shown(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, str):
        return value[:_DIGITS] if _DIGEST.fullmatch(value) else value
    return json.dumps(value)
