"""Holdfast: assess, certify, harden, audit and rotate machine-learning models against attacks.

A module is imported when one of its names is first used, so that `import holdfast` takes a few milliseconds.
"""

from typing import TYPE_CHECKING, Any

from holdfast import moved_modules

if TYPE_CHECKING:
    from holdfast.certifiers.module_bounds import bounds as bounds
    from holdfast.certifiers.smoothing import Smoothed as Smoothed
    from holdfast.core.batch import Batch as Batch
    from holdfast.core.constraints import L0 as L0
    from holdfast.core.constraints import L1 as L1
    from holdfast.core.constraints import L2 as L2
    from holdfast.core.constraints import Linf as Linf
    from holdfast.core.draws import Draws as Draws
    from holdfast.core.evidence import Evidence as Evidence
    from holdfast.core.gradients import skipped as skipped
    from holdfast.core.gradients import through as through
    from holdfast.core.model import Bounds as Bounds
    from holdfast.core.model import Classifier as Classifier
    from holdfast.core.outputs import with_detector as with_detector
    from holdfast.core.threat import ThreatModel as ThreatModel
    from holdfast.io.data.scenes import write_scenes as write_scenes
    from holdfast.server.middleware import GuardMiddleware as GuardMiddleware
    from holdfast.threats.text_edits import TextEdits as TextEdits
    from holdfast.threats.transformations import Colour as Colour
    from holdfast.threats.transformations import Corruptions as Corruptions
    from holdfast.threats.transformations import Patch as Patch
    from holdfast.threats.transformations import Spatial as Spatial
    from holdfast.verbs.attack import attack as attack
    from holdfast.verbs.audit.attributes import AuditAttributes as AuditAttributes
    from holdfast.verbs.audit.backdoor import AuditBackdoor as AuditBackdoor
    from holdfast.verbs.audit.extraction import AuditExtraction as AuditExtraction
    from holdfast.verbs.audit.generator import AuditGenerator as AuditGenerator
    from holdfast.verbs.audit.membership import AuditMembership as AuditMembership
    from holdfast.verbs.audit.poison import AuditPoison as AuditPoison
    from holdfast.verbs.audit.privacy import AuditPrivacy as AuditPrivacy
    from holdfast.verbs.audit.reconstruct import AuditReconstruct as AuditReconstruct
    from holdfast.verbs.calibrate import Guard as Guard
    from holdfast.verbs.configuration import init as init
    from holdfast.verbs.configuration import validate as validate
    from holdfast.verbs.explain import explain as explain
    from holdfast.verbs.functions import adapt as adapt
    from holdfast.verbs.functions import assess as assess
    from holdfast.verbs.functions import certify as certify
    from holdfast.verbs.functions import demo as demo
    from holdfast.verbs.functions import doctor as doctor
    from holdfast.verbs.functions import harden as harden
    from holdfast.verbs.functions import monitor as monitor
    from holdfast.verbs.opening.arguments import open_data as open_data
    from holdfast.verbs.opening.arguments import open_model as open_model
    from holdfast.verbs.placement import Ray as Ray
    from holdfast.verbs.poison import poison as poison
    from holdfast.verbs.reports import compare as compare
    from holdfast.verbs.reports import report as report
    from holdfast.verbs.reports import verify as verify
    from holdfast.verbs.serve import serve as serve
    from holdfast.verbs.settings import Adapt as Adapt
    from holdfast.verbs.settings import Assess as Assess
    from holdfast.verbs.settings import Calibrate as Calibrate
    from holdfast.verbs.settings import Certify as Certify
    from holdfast.verbs.settings import Doctor as Doctor
    from holdfast.verbs.settings import Explain as Explain
    from holdfast.verbs.settings import Harden as Harden
    from holdfast.verbs.settings import Monitor as Monitor
    from holdfast.verbs.settings import Serve as Serve

__version__ = "0.2.0"

moved_modules.register()

_HOMES = {
    "Adapt": "holdfast.verbs.settings",
    "Assess": "holdfast.verbs.settings",
    "Calibrate": "holdfast.verbs.settings",
    "Certify": "holdfast.verbs.settings",
    "Doctor": "holdfast.verbs.settings",
    "Explain": "holdfast.verbs.settings",
    "Harden": "holdfast.verbs.settings",
    "Monitor": "holdfast.verbs.settings",
    "Serve": "holdfast.verbs.settings",
    "Batch": "holdfast.core.batch",
    "Bounds": "holdfast.core.model",
    "Classifier": "holdfast.core.model",
    "Colour": "holdfast.threats.transformations",
    "Corruptions": "holdfast.threats.transformations",
    "Draws": "holdfast.core.draws",
    "Evidence": "holdfast.core.evidence",
    "Guard": "holdfast.verbs.calibrate",
    "GuardMiddleware": "holdfast.server.middleware",
    "L0": "holdfast.core.constraints",
    "L1": "holdfast.core.constraints",
    "L2": "holdfast.core.constraints",
    "Linf": "holdfast.core.constraints",
    "Patch": "holdfast.threats.transformations",
    "Ray": "holdfast.verbs.placement",
    "Smoothed": "holdfast.certifiers.smoothing",
    "Spatial": "holdfast.threats.transformations",
    "TextEdits": "holdfast.threats.text_edits",
    "ThreatModel": "holdfast.core.threat",
    "assess": "holdfast.verbs.functions",
    "bounds": "holdfast.certifiers.module_bounds",
    "attack": "holdfast.verbs.attack",
    "certify": "holdfast.verbs.functions",
    "compare": "holdfast.verbs.reports",
    "demo": "holdfast.verbs.functions",
    "doctor": "holdfast.verbs.functions",
    "explain": "holdfast.verbs.explain",
    "harden": "holdfast.verbs.functions",
    "init": "holdfast.verbs.configuration",
    "adapt": "holdfast.verbs.functions",
    "monitor": "holdfast.verbs.functions",
    "open_data": "holdfast.verbs.opening.arguments",
    "open_model": "holdfast.verbs.opening.arguments",
    "poison": "holdfast.verbs.poison",
    "report": "holdfast.verbs.reports",
    "serve": "holdfast.verbs.serve",
    "skipped": "holdfast.core.gradients",
    "through": "holdfast.core.gradients",
    "validate": "holdfast.verbs.configuration",
    "verify": "holdfast.verbs.reports",
    "with_detector": "holdfast.core.outputs",
    "write_scenes": "holdfast.io.data.scenes",
}

_MODULES = {
    "attacks": "holdfast.attacks",
    "audit": "holdfast.verbs.audit.functions",
    "recipes": "holdfast.recipes",
    "rotate": "holdfast.verbs.rotate",
    "rotation": "holdfast.rotation",
}
"""Modules that are imported when they are first used, as in `holdfast.attacks.PGD(steps=100)`."""


def _homes() -> dict[str, str]:
    """Return the module of each exported name: those of `_HOMES`, and the settings of audits."""
    from holdfast.core.catalogue import AUDITS

    audits = (audit for audit in AUDITS.values() if audit.settings)
    return {**_HOMES, **{audit.settings: f"holdfast.verbs.audit.{audit.name}" for audit in audits}}


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
