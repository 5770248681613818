"""Holdfast: assess, certify, harden, audit and rotate machine-learning models against attacks.

A module is imported when one of its names is first used, so that `import holdfast` takes a few milliseconds.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holdfast.api.attack import attack as attack
    from holdfast.api.auditing.backdoor import AuditBackdoor as AuditBackdoor
    from holdfast.api.auditing.generator import AuditGenerator as AuditGenerator
    from holdfast.api.auditing.membership import AuditMembership as AuditMembership
    from holdfast.api.auditing.poison import AuditPoison as AuditPoison
    from holdfast.api.auditing.privacy import AuditPrivacy as AuditPrivacy
    from holdfast.api.explain import explain as explain
    from holdfast.api.guards import Guard as Guard
    from holdfast.api.placing import Ray as Ray
    from holdfast.api.poisoning import poison as poison
    from holdfast.api.references import open_data as open_data
    from holdfast.api.references import open_model as open_model
    from holdfast.api.serve import serve as serve
    from holdfast.api.starting import init as init
    from holdfast.api.starting import validate as validate
    from holdfast.api.stored import compare as compare
    from holdfast.api.stored import report as report
    from holdfast.api.stored import verify as verify
    from holdfast.api.verb_settings import Adapt as Adapt
    from holdfast.api.verb_settings import Assess as Assess
    from holdfast.api.verb_settings import Calibrate as Calibrate
    from holdfast.api.verb_settings import Certify as Certify
    from holdfast.api.verb_settings import Doctor as Doctor
    from holdfast.api.verb_settings import Explain as Explain
    from holdfast.api.verb_settings import Harden as Harden
    from holdfast.api.verb_settings import Monitor as Monitor
    from holdfast.api.verb_settings import Serve as Serve
    from holdfast.api.verbs import adapt as adapt
    from holdfast.api.verbs import assess as assess
    from holdfast.api.verbs import certify as certify
    from holdfast.api.verbs import demo as demo
    from holdfast.api.verbs import doctor as doctor
    from holdfast.api.verbs import harden as harden
    from holdfast.api.verbs import monitor as monitor
    from holdfast.certifiers.smoothing.smoothing import Smoothed as Smoothed
    from holdfast.core.batch import Batch as Batch
    from holdfast.core.constraints import L0 as L0
    from holdfast.core.constraints import L1 as L1
    from holdfast.core.constraints import L2 as L2
    from holdfast.core.constraints import Linf as Linf
    from holdfast.core.draws import Draws as Draws
    from holdfast.core.evidence import Evidence as Evidence
    from holdfast.core.gradients import skipped as skipped
    from holdfast.core.gradients import through as through
    from holdfast.core.guard import with_detector as with_detector
    from holdfast.core.model import Bounds as Bounds
    from holdfast.core.model import Classifier as Classifier
    from holdfast.core.threat import ThreatModel as ThreatModel
    from holdfast.server.middleware import GuardMiddleware as GuardMiddleware
    from holdfast.threats.patches import Patch as Patch
    from holdfast.threats.text_edits import TextEdits as TextEdits
    from holdfast.threats.transformations import Colour as Colour
    from holdfast.threats.transformations import Corruptions as Corruptions
    from holdfast.threats.transformations import Spatial as Spatial

__version__ = "0.2.0"

_HOMES = {
    "Adapt": "holdfast.api.verb_settings",
    "Assess": "holdfast.api.verb_settings",
    "Calibrate": "holdfast.api.verb_settings",
    "Certify": "holdfast.api.verb_settings",
    "Doctor": "holdfast.api.verb_settings",
    "Explain": "holdfast.api.verb_settings",
    "Harden": "holdfast.api.verb_settings",
    "Monitor": "holdfast.api.verb_settings",
    "Serve": "holdfast.api.verb_settings",
    "Batch": "holdfast.core.batch",
    "Bounds": "holdfast.core.model",
    "Classifier": "holdfast.core.model",
    "Colour": "holdfast.threats.transformations",
    "Corruptions": "holdfast.threats.transformations",
    "Draws": "holdfast.core.draws",
    "Evidence": "holdfast.core.evidence",
    "Guard": "holdfast.api.guards",
    "GuardMiddleware": "holdfast.server.middleware",
    "L0": "holdfast.core.constraints",
    "L1": "holdfast.core.constraints",
    "L2": "holdfast.core.constraints",
    "Linf": "holdfast.core.constraints",
    "Patch": "holdfast.threats.patches",
    "Ray": "holdfast.api.placing",
    "Smoothed": "holdfast.certifiers.smoothing.smoothing",
    "Spatial": "holdfast.threats.transformations",
    "TextEdits": "holdfast.threats.text_edits",
    "ThreatModel": "holdfast.core.threat",
    "assess": "holdfast.api.verbs",
    "attack": "holdfast.api.attack",
    "certify": "holdfast.api.verbs",
    "compare": "holdfast.api.stored",
    "demo": "holdfast.api.verbs",
    "doctor": "holdfast.api.verbs",
    "explain": "holdfast.api.explain",
    "harden": "holdfast.api.verbs",
    "init": "holdfast.api.starting",
    "adapt": "holdfast.api.verbs",
    "monitor": "holdfast.api.verbs",
    "open_data": "holdfast.api.references",
    "open_model": "holdfast.api.references",
    "poison": "holdfast.api.poisoning",
    "report": "holdfast.api.stored",
    "serve": "holdfast.api.serve",
    "skipped": "holdfast.core.gradients",
    "through": "holdfast.core.gradients",
    "validate": "holdfast.api.starting",
    "verify": "holdfast.api.stored",
    "with_detector": "holdfast.core.guard",
}

_MODULES = {
    "attacks": "holdfast.attacks",
    "audit": "holdfast.api.audits",
    "recipes": "holdfast.recipes",
    "rotate": "holdfast.api.rotate",
    "rotation": "holdfast.rotation",
}
"""Modules that are imported when they are first used, as in `holdfast.attacks.PGD(steps=100)`."""


def _homes() -> dict[str, str]:
    """Return the module of each exported name: those of `_HOMES`, and the settings of audits."""
    from holdfast.core.catalogue import AUDITS

    audits = (audit for audit in AUDITS.values() if audit.settings)
    return {**_HOMES, **{audit.settings: f"holdfast.api.auditing.{audit.name}" for audit in audits}}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _MODULES:
        return import_module(_MODULES[name])
    if name == "__all__":
        return __dir__()
    home = _HOMES.get(name) or _homes().get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__dir__())}")
    value = globals()[name] = getattr(import_module(home), name)
    return value


def __dir__() -> list[str]:
    return sorted(("__version__", *_homes()))
