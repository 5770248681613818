"""Threat models as JSON: as a run stores them, and back, and as a report shows them."""

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module
from typing import Any

from holdfast.core.constraints import L0, Constraint
from holdfast.core.errors import TargetError
from holdfast.core.threat import ThreatModel

Json = dict[str, Any]

_HOMES: Mapping[str, str] = {
    **dict.fromkeys(("Linf", "L2", "L1", "L0"), "holdfast.core.constraints"),
    "Corruptions": "holdfast.threats.transformations",
    "TrainingSet": "holdfast.threats.triggers",
    "Patch": "holdfast.threats.transformations",
    "Spatial": "holdfast.threats.transformations",
    "Colour": "holdfast.threats.transformations",
    "Table": "holdfast.threats.tables",
    "TextEdits": "holdfast.threats.text_edits",
    "WordEmbeddings": "holdfast.threats.word_embeddings",
    "ByteChanges": "holdfast.threats.byte_changes",
    "Stamped": "holdfast.threats.triggers",
    **dict.fromkeys(("SNR", "Peak", "LinfOfClips", "L2OfClips"), "holdfast.threats.signals"),
    **dict.fromkeys(("Observations", "Actions", "Parameters"), "holdfast.threats.policies"),
}
"""Modules of the classes of constraints, of which a run imports its own alone."""
_WHOLE = ("Corruptions", "TrainingSet")
"""Constraints whose size is a whole number."""


def threat_to_json(threat: ThreatModel) -> Json:
    """Return a threat model as the strict JSON of a run, from which `threat_from_json` returns an equal one."""
    constraint = threat.constraint
    return {
        "norm": type(constraint).__name__,
        "eps": _strict(constraint.eps),
        "per": constraint.per if isinstance(constraint, L0) else None,
        "limits": dict(constraint.limits),
        "goal": threat.goal,
        "access": threat.access,
        "queries": threat.queries,
        **({"unit": threat.unit} if threat.unit else {}),
        **({"objective": threat.objective} if threat.objective else {}),
    }


def threat_for_report(threat: ThreatModel) -> Json:
    """Return a threat model as strict JSON for a report, without the content of files. Its entry `constraint` is text
    such as `linf:8/255`.
    """
    stored, constraint = threat_to_json(threat), threat.constraint
    unit = f",unit={stored.pop('unit')}" if threat.unit else ""
    stored["limits"].pop("content", None)  # of a file, which is stored with the run
    counted = {
        "l0_unit": "pixels" if constraint.counts_pixels else "values",
        "decibels": constraint.in_decibels,
    }
    ordered = {name: stored.pop(name) for name in ("norm", "eps", "per")}
    return {"constraint": f"{constraint}{unit}", **ordered, **counted, **stored}


def threat_from_json(threat: Mapping[str, Any]) -> ThreatModel:
    """Return the threat model in the JSON of `threat_to_json`. A training states its constraint and its unit alone.

    Raises `TargetError` for limits of other types, and for a constraint that this version does not support.
    """
    return ThreatModel(
        _constraint(threat),
        threat.get("goal"),
        threat.get("access", "gradients"),
        threat.get("queries"),
        unit=threat.get("unit", ""),
        objective=threat.get("objective", ""),
    )


def _constraint(threat: Mapping[str, Any]) -> Constraint:
    name, eps = threat["norm"], float(threat["eps"])
    if name not in _HOMES:
        raise TargetError(
            f"the run has the threat model {name}, which this version does not support; install the version "
            "that wrote it"
        )
    kind = getattr(import_module(_HOMES[name]), name)
    if threat.get("limits"):
        return _of_limits(kind, threat["limits"], eps)
    counted = {"per": threat["per"]} if name == "L0" else {}
    created: Constraint = kind(int(eps) if name in _WHOLE else eps, **counted)
    return created


def _of_limits(kind: type[Any], limits: Mapping[str, Any], eps: float) -> Constraint:
    """Return the constraint with the stored limits. Raises `TargetError` for limits of other types, and for another
    eps.
    """
    texts = {field.name for field in fields(kind) if field.type is str}
    try:
        for name, value in limits.items():
            number = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
            if not (isinstance(value, str) if name in texts else number):
                raise TypeError(f"{name} is {value!r}")
        constraint: Constraint = kind(**limits)
        if "content" in limits and not isinstance(json.loads(limits["content"]), dict):
            raise TypeError("content is no JSON object")
    except (TypeError, ValueError, KeyError) as error:
        raise TargetError(f"the limits of the threat model are damaged: {error}; repeat the run") from error
    if constraint.eps != eps:
        raise TargetError(
            f"eps of the threat model is {eps:g}, and its limits have {constraint.eps:g}; repeat the run"
        )
    return constraint


def _strict(eps: float) -> float | str:
    """Return a size as strict JSON, in which infinity is text."""
    return float(eps) if math.isfinite(eps) else str(eps)
