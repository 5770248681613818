"""Holdfast: assess, certify, harden and rotate machine-learning models against adversarial attacks.

A module is imported when one of its names is first used, so that `import holdfast` takes a few milliseconds.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holdfast.api import assess, certify, demo, doctor, harden
    from holdfast.attacking import attack
    from holdfast.certifiers.smoothed import Smoothed
    from holdfast.config.placing import Ray
    from holdfast.config.references import open_data, open_model
    from holdfast.config.starting import init, validate
    from holdfast.config.verb_settings import Assess, Certify, Doctor, Harden
    from holdfast.core.batch import Batch
    from holdfast.core.constraints import L0, L1, L2, Linf
    from holdfast.core.corruptions import Corruptions
    from holdfast.core.draws import Draws
    from holdfast.core.evidence import Evidence
    from holdfast.core.guard import with_detector
    from holdfast.core.model import Bounds, Classifier
    from holdfast.core.patches import Patch
    from holdfast.core.skipped import skipped
    from holdfast.core.threat import ThreatModel
    from holdfast.core.through import through
    from holdfast.core.transformations import Colour, Spatial
    from holdfast.deploying import serve
    from holdfast.guarding import Guard
    from holdfast.serving.middleware import GuardMiddleware
    from holdfast.stored import compare, report, verify

__version__ = "0.2.0"

__all__ = [
    "L0",
    "L1",
    "L2",
    "Assess",
    "Batch",
    "Bounds",
    "Certify",
    "Classifier",
    "Colour",
    "Corruptions",
    "Doctor",
    "Draws",
    "Evidence",
    "Guard",
    "GuardMiddleware",
    "Harden",
    "Linf",
    "Patch",
    "Ray",
    "Smoothed",
    "Spatial",
    "ThreatModel",
    "__version__",
    "assess",
    "attack",
    "certify",
    "compare",
    "demo",
    "doctor",
    "harden",
    "init",
    "open_data",
    "open_model",
    "report",
    "serve",
    "skipped",
    "through",
    "validate",
    "verify",
    "with_detector",
]

_HOMES = {
    **dict.fromkeys(("Assess", "Certify", "Doctor", "Harden"), "holdfast.config.verb_settings"),
    "Batch": "holdfast.core.batch",
    "Bounds": "holdfast.core.model",
    "Classifier": "holdfast.core.model",
    "Colour": "holdfast.core.transformations",
    "Corruptions": "holdfast.core.corruptions",
    "Draws": "holdfast.core.draws",
    "Evidence": "holdfast.core.evidence",
    "Guard": "holdfast.guarding",
    "GuardMiddleware": "holdfast.serving.middleware",
    "L0": "holdfast.core.constraints",
    "L1": "holdfast.core.constraints",
    "L2": "holdfast.core.constraints",
    "Linf": "holdfast.core.constraints",
    "Patch": "holdfast.core.patches",
    "Ray": "holdfast.config.placing",
    "Smoothed": "holdfast.certifiers.smoothed",
    "Spatial": "holdfast.core.transformations",
    "ThreatModel": "holdfast.core.threat",
    "assess": "holdfast.api",
    "attack": "holdfast.attacking",
    "certify": "holdfast.api",
    "compare": "holdfast.stored",
    "demo": "holdfast.api",
    "doctor": "holdfast.api",
    "harden": "holdfast.api",
    "init": "holdfast.config.starting",
    "open_data": "holdfast.config.references",
    "open_model": "holdfast.config.references",
    "report": "holdfast.stored",
    "serve": "holdfast.deploying",
    "skipped": "holdfast.core.skipped",
    "through": "holdfast.core.through",
    "validate": "holdfast.config.starting",
    "verify": "holdfast.stored",
    "with_detector": "holdfast.core.guard",
}


_MODULES = {
    "attacks": "holdfast.attacks",
    "recipes": "holdfast.recipes",
    "rotate": "holdfast.rotating",
    "rotation": "holdfast.rotation",
}
"""Modules that are imported when they are first used, as in `holdfast.attacks.PGD(steps=100)`."""


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _MODULES:
        return import_module(_MODULES[name])
    if name not in _HOMES:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}; it has {', '.join(sorted(__all__))}"
        )
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
