"""Converts the outline of a run, with its stages and its threat model, to strict JSON and back."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from holdfast.core.constraints import L0, L1, L2, Constraint, Limited, Linf
from holdfast.core.corruptions import Corruptions
from holdfast.core.errors import TargetError
from holdfast.core.patches import Patch
from holdfast.core.threat import ThreatModel
from holdfast.core.transformations import Colour, Spatial
from holdfast.reports.numbers import number, strict
from holdfast.runs.harness import KINDS, Outline, StageOutline

Json = dict[str, Any]

_OF_STEP = ("name", "attack", "settings", "wave_of", "adaptive")


def outline_to_json(outline: Outline) -> Json:
    """Return the outline of a run as strict JSON: its stages, threat model, seed and suite."""
    constraint = outline.threat.constraint
    return {
        "stages": [strict({**vars(step), "kind": step.kind.name}) for step in outline.steps],
        "threat": {
            "norm": type(constraint).__name__,
            "eps": strict(float(constraint.eps)),
            "per": constraint.per if isinstance(constraint, L0) else None,
            "limits": dict(constraint.limits) if isinstance(constraint, Limited) else {},
            "goal": outline.threat.goal,
            "access": outline.threat.access,
            "queries": outline.threat.queries,
            **({"unit": outline.threat.unit} if outline.threat.unit else {}),
        },
        "seed": outline.seed,
        "suite": outline.suite,
        "minimum_norm": outline.smallest,
    }


def outline_from_json(content: Mapping[str, Any]) -> Outline:
    """Return the outline of a run, such as its stages and threat model, from its JSON. It is the inverse of
    `outline_to_json`.
    """
    threat = content["threat"]
    return Outline(
        tuple(
            StageOutline(
                **{name: step[name] for name in _OF_STEP},
                kind=KINDS[step["kind"]],
                notes=tuple(step["notes"]),
            )
            for step in content["stages"]
        ),
        ThreatModel(
            constraint_of(threat),
            threat["goal"],
            threat["access"],
            threat["queries"],
            unit=threat.get("unit", ""),
        ),
        content["seed"],
        content["suite"],
        content["minimum_norm"],
    )


def constraint_of(threat: Mapping[str, Any]) -> Constraint:
    """Return the constraint of a stored threat model."""
    eps = number(threat["eps"])
    if threat["norm"] == "L0":
        return L0(eps, threat["per"])
    if threat["norm"] == "Corruptions":
        return Corruptions(int(eps))
    if threat["norm"] == "TrainingSet":
        from holdfast.core.training_set import TrainingSet  # late: few runs are on training sets

        return TrainingSet(int(eps))
    if threat["norm"] == "Table":
        from holdfast.core.tables.table import Table  # late: few runs have rules

        return _of_limits(Table, threat, eps)
    if threat["norm"] == "TextEdits":
        from holdfast.core.text_edits import TextEdits  # late: few runs are on texts

        return _of_limits(TextEdits, threat, eps)
    if threat["norm"] == "Stamped":
        from holdfast.core.triggers import Stamped  # late: few runs have a trigger

        return _of_limits(Stamped, threat, eps)
    limited: dict[str, type[Patch | Spatial | Colour]] = {
        "Patch": Patch,
        "Spatial": Spatial,
        "Colour": Colour,
    }
    if threat["norm"] in limited:
        return limited[threat["norm"]](**threat["limits"])
    norms: dict[str, type[Linf | L2 | L1]] = {"Linf": Linf, "L2": L2, "L1": L1}
    if threat["norm"] not in norms:
        raise TargetError(
            f"the run has the threat model {threat['norm']}, which this version does not support; install the version "
            "that wrote it"
        )
    return norms[threat["norm"]](eps)


def _of_limits(kind: Callable[..., Constraint], threat: Mapping[str, Any], eps: float) -> Constraint:
    """Return the constraint with the stored limits. Raises `TargetError` for limits of other types, and for another
    eps.
    """
    limits = threat["limits"]
    texts = {name: limits[name] for name in ("file", "content") if name in limits}
    numbers = {name: value for name, value in limits.items() if name not in texts}
    try:
        if not all(isinstance(text, str) for text in texts.values()):
            raise TypeError(f"file is {texts.get('file')!r}")
        if any(
            isinstance(value, bool) or not isinstance(value, int | float) or value < 0
            for value in numbers.values()
        ):
            raise TypeError(f"{numbers}")
        constraint = kind(**limits)
        if isinstance(texts.get("content"), str) and not isinstance(json.loads(texts["content"]), dict):
            raise TypeError("content is no JSON object")
    except (TypeError, ValueError, KeyError) as error:
        raise TargetError(f"the limits of the threat model are damaged: {error}; repeat the run") from error
    if constraint.eps != eps:
        raise TargetError(
            f"eps of the threat model is {eps:g}, and its limits have {constraint.eps:g}; repeat the run"
        )
    return constraint
