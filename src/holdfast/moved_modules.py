"""Import paths of modules that earlier versions of the documentation show, and where their names are now.

`from holdfast.guard.states.memory import MemoryState` still works, and warns with the new path. A moved module is a
module object that looks a name up in the new module when the name is first used, so that it costs no import before.
"""

import sys
import warnings
from importlib import import_module
from types import ModuleType
from typing import Any, Final

MOVED: Final = {
    "api.attack": "verbs.attack",
    "api.guards": "verbs.calibrate",
    "api.placing": "verbs.placement",
    "api.poisoning": "verbs.poison",
    "api.references": "verbs.opening.arguments",
    "api.rotate": "verbs.rotate",
    "api.verb_settings": "verbs.settings",
    "api.verbs": "verbs.functions",
    "api.verbs.exhibition": "verbs.exhibition",
    "audits.generator.planting": "audits.generator.backdoor",
    "audits.privacy.bounds": "audits.privacy",
    "audits.privacy.canaries": "audits.privacy",
    "certifiers.smoothing.smoothed": "certifiers.smoothing",
    "certifiers.texts.masking": "certifiers.masking",
    "certifiers.trees.monotone": "certifiers.tree_ensembles",
    "core.goal": "core.estimate",
    "core.guard": "core.outputs",
    "core.through": "core.gradients",
    "generators.diffusion": "generators.networks",
    "generators.opening": "generators.networks",
    "generators.vae": "generators.networks",
    "guard.decisions": "guard.rules",
    "guard.states.memory": "guard.state_in_memory",
    "io.models.int8": "io.models.architectures",
    "io.models.lipschitz_layers": "io.models.architectures",
    "io.models.mixtures": "io.models.composed",
    "metrics.gap": "metrics.shares",
    "metrics.paired": "metrics.comparisons",
    "recipes.training.loss_recipe": "recipes.training.recipe",
    "rotation.pool.pool": "rotation.pool",
    "testing.linear": "testing.fakes",
    "testing.relu": "testing.fakes",
}
"""earlier path → present path, both below `holdfast`"""
_PACKAGES = ("api", "certifiers.texts", "certifiers.trees", "guard.states")
"""packages of earlier paths that no longer exist"""


class _Moved(ModuleType):
    def __init__(self, earlier: str, present: str) -> None:
        super().__init__(earlier, f"Moved to `{present}`.")
        self._present = present

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(import_module(self._present), name)
        warnings.warn(
            f"{self.__name__} has moved: import {name} from {self._present}", DeprecationWarning, stacklevel=2
        )
        return value


def register() -> None:
    """Make every earlier path importable."""
    for package in _PACKAGES:
        sys.modules.setdefault(f"holdfast.{package}", ModuleType(f"holdfast.{package}"))
    for earlier, present in MOVED.items():
        sys.modules.setdefault(f"holdfast.{earlier}", _Moved(f"holdfast.{earlier}", f"holdfast.{present}"))
