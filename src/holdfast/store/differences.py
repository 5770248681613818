"""Describes how the settings of the run in a folder differ from the settings of the requested run."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from holdfast.core.names import limits_text, threat_text
from holdfast.harness import KINDS

MOST = 4
"""Largest number of differences that are listed; further ones are only counted."""
_FIRST = ("threat", "suite", "seed")
_DIGITS = 12  # digits of a digest that are shown
_DIGEST = re.compile("[0-9a-f]{64}")


def differences(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Return the differences between the settings of two runs as text, such as `threat: linf:0.1 → linf:0.2; seed: 0 →
    1`.

    The text is empty if no difference can be listed.
    """
    names = dict.fromkeys([*_FIRST, *sorted({*known, *wanted} - {"stages"}), "stages"])
    lines = [line for name in names for line in _of(name, known.get(name), wanted.get(name))]
    more = [f"and {len(lines) - MOST} more"] if len(lines) > MOST else []
    return "; ".join([*lines[:MOST], *more])


def _of(name: str, known: Any, wanted: Any) -> Iterator[str]:
    try:
        if name == "threat":
            known, wanted = _threat(known), _threat(wanted)
        elif name == "settings":  # settings by recipe; a different recipe is shown under `recipe`
            both = known.keys() & wanted.keys()
            known, wanted = ({recipe: side[recipe] for recipe in both} for side in (known, wanted))
        elif name == "stages":
            yield from _stages(known, wanted)
            return
    except (AttributeError, KeyError, TypeError, ValueError):  # another version has another format
        pass
    yield from _changes(known, wanted, name)


def _threat(threat: Mapping[str, Any]) -> str:
    """The threat model in the syntax of the command line."""
    eps = float(threat["eps"])
    size = "" if eps == float("inf") else f":{eps:.6g}" + ("px" if threat.get("per") == "pixel" else "")
    kind = str(threat["norm"]).lower()
    change = limits_text(kind, threat["limits"]) if threat.get("limits") else f"{kind}{size}"
    return threat_text(change, threat.get("goal"), threat.get("access", "gradients"), threat.get("queries"))


def _stages(known: Sequence[Mapping[str, Any]], wanted: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Differences of the attacks by name; for equal attacks, differences of their settings."""
    for kind in KINDS.values():
        if not kind.listed:
            continue
        sides = [[stage for stage in stages if stage["kind"] == kind.name] for stages in (known, wanted)]
        before, after = ([stage["attack"] for stage in side] for side in sides)
        if before != after:
            yield f"{kind.listed}: {', '.join(before) or 'none'} → {', '.join(after) or 'none'}"
            continue
        for one, other in zip(*sides, strict=True):
            yield from _changes(one["settings"], other["settings"], one["attack"])


def _changes(known: object, wanted: object, where: str) -> Iterator[str]:
    """`PGD.steps: 3 → 5` for every value that differs."""
    if isinstance(known, dict) and isinstance(wanted, dict):
        for name in sorted({*known, *wanted}):
            yield from _changes(known.get(name), wanted.get(name), f"{where}.{name}")
    elif known != wanted:
        yield f"{where}: {_shown(known)} → {_shown(wanted)}"


def _shown(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, str):
        return value[:_DIGITS] if _DIGEST.fullmatch(value) else value
    return json.dumps(value)
