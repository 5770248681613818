"""Converts the outline of a run, with its stages and its threat model, to strict JSON and back."""

from collections.abc import Mapping
from typing import Any

from holdfast.reports.numbers import strict
from holdfast.runs.harness import KINDS, Outline, StageOutline
from holdfast.threats.stored import threat_from_json, threat_to_json

Json = dict[str, Any]

_OF_STEP = ("name", "attack", "settings", "wave_of", "adaptive")


def outline_to_json(outline: Outline) -> Json:
    """Return the outline of a run as strict JSON: its stages, threat model, seed and suite."""
    return {
        "stages": [strict({**vars(step), "kind": step.kind.name}) for step in outline.steps],
        "threat": threat_to_json(outline.threat),
        "seed": outline.seed,
        "suite": outline.suite,
        "minimum_norm": outline.smallest,
    }


def outline_from_json(content: Mapping[str, Any]) -> Outline:
    """Return the outline of a run, such as its stages and threat model, from its JSON. It is the inverse of
    `outline_to_json`.
    """
    return Outline(
        tuple(
            StageOutline(
                **{name: step[name] for name in _OF_STEP},
                kind=KINDS[step["kind"]],
                notes=tuple(step["notes"]),
            )
            for step in content["stages"]
        ),
        threat_from_json(content["threat"]),
        content["seed"],
        content["suite"],
        content["minimum_norm"],
    )
