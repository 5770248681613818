"""Wraps models that are neither torch networks nor functions as torch modules: estimators, boosters and Keras models.

A library is searched for only among the imported modules, because importing one takes seconds. If an object of the
library exists, the library is already imported.
"""

import sys
from typing import Any

from torch import nn

from holdfast.core.errors import UsageError
from holdfast.sources.adapted import Adapted
from holdfast.sources.estimators import Estimator, Predictor, adapted_estimator
from holdfast.sources.keras_models import KerasNet, adapted_keras
from holdfast.sources.lightgbm_models import adapted_lightgbm
from holdfast.sources.object_digest import digest_of_object
from holdfast.sources.trees import adapted_booster


def accepted(model: object) -> bool:
    """Return whether the object is a model of a supported kind: a network, a function or an estimator."""
    return callable(model) or isinstance(model, Predictor)


def adapted(model: object) -> Adapted | None:
    """Return a model of another library, such as scikit-learn, wrapped as a torch module. Return None if the model is a
    torch network or a function.

    Raises `TargetError` for an object that is not a classifier, is not fitted, or runs on another back end than torch,
    and `UsageError` for a class.
    """
    if isinstance(model, type):
        raise UsageError(
            f"model is the class {model.__qualname__}; give an object of it, as in {model.__qualname__}()"
        )
    # Keras models are callable, so they are recognised before functions.
    if _is(model, "keras", "Model"):
        return adapted_keras(model)
    if _is(model, "xgboost", "Booster"):
        return adapted_booster(model)
    if _is(model, "lightgbm", "Booster"):
        return adapted_lightgbm(model)
    if isinstance(model, nn.Module) or callable(model) or not isinstance(model, Predictor):
        return None
    return adapted_estimator(model)


def object_identity(net: Any) -> tuple[str, list[str], tuple[str, ...]]:
    """Return the name of a model given as a Python object, the strings that identify it in the evidence, and notes for
    the report.

    A note states what a resumed run cannot verify about the model.
    """
    kind = type(net) if isinstance(net, nn.Module) else net
    name = (
        net.name
        if isinstance(net, Estimator | KerasNet)
        else getattr(kind, "__qualname__", type(net).__name__)
    )
    unknown = "a resumed run cannot detect whether"
    notes: tuple[str, ...] = ()
    if not isinstance(net, nn.Module):
        notes = (
            f"{name} is a function, not a torch module: {unknown} the objects that it refers to have changed",
        )
    elif isinstance(net, Estimator) and not net.digest:
        notes = (f"the {name} cannot be pickled: {unknown} it has changed",)
    return name, [str(getattr(kind, "__module__", "")), name, digest_of_object(net)], notes


def _is(model: object, library: str, kind: str) -> bool:
    library_class = getattr(sys.modules.get(library), kind, None)
    return isinstance(library_class, type) and isinstance(model, library_class)
