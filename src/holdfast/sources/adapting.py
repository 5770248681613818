"""Models in hand that are neither networks of torch nor functions: estimators, boosters and models of Keras.

A library is looked up only where it is imported already, as it is wherever an object of it exists: importing one takes
seconds.
"""

import sys
from typing import Any

from torch import nn

from holdfast.core.errors import UsageError
from holdfast.sources.adapted import Adapted
from holdfast.sources.estimators import Estimator, Predictor, adapted_estimator
from holdfast.sources.inhand import digest_in_hand
from holdfast.sources.keras_models import KerasNet, adapted_keras
from holdfast.sources.trees import adapted_booster


def accepted(model: object) -> bool:
    """Whether it is a model in hand of any kind: a network, a function, an estimator."""
    return callable(model) or isinstance(model, Predictor)


def adapted(model: object) -> Adapted | None:
    """The model as a module from inputs to outputs; None for a network of torch and a function, which are one.

    Raises `TargetError` for what is no classifier, is not fitted, or runs on another back end than torch.
    """
    if isinstance(model, type):
        raise UsageError(
            f"model is the class {model.__qualname__}; give an object of it, as in {model.__qualname__}()"
        )
    if _is(model, "keras", "Model"):
        return adapted_keras(model)
    if _is(model, "xgboost", "Booster"):
        return adapted_booster(model)
    if isinstance(model, nn.Module) or callable(model) or not isinstance(model, Predictor):
        return None
    return adapted_estimator(model)


def known_in_hand(net: Any) -> tuple[str, list[str], tuple[str, ...]]:
    """The name of a model in hand, what it is known by in the evidence, and what is to be said of that."""
    kind = type(net) if isinstance(net, nn.Module) else net
    name = (
        net.name
        if isinstance(net, Estimator | KerasNet)
        else getattr(kind, "__qualname__", type(net).__name__)
    )
    unseen = "a resumed run cannot see whether"
    notes: tuple[str, ...] = ()
    if not isinstance(net, nn.Module):
        notes = (f"{name} is a bare callable: {unseen} all that it refers to is as it was",)
    elif isinstance(net, Estimator) and not net.digest:
        notes = (f"the {name} cannot be pickled: {unseen} it is as it was",)
    return name, [str(getattr(kind, "__module__", "")), name, digest_in_hand(net)], notes


def _is(model: object, library: str, kind: str) -> bool:
    found = getattr(sys.modules.get(library), kind, None)
    return isinstance(found, type) and isinstance(model, found)
