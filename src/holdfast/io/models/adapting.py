"""Wraps models that are neither torch networks nor functions as torch modules: estimators, boosters and Keras models.

A library is searched for only among the imported modules, because importing one takes seconds. If an object of the
library exists, the library is already imported.
"""

import inspect
import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

from holdfast.core.catalogue import GENERATOR_RECIPES
from holdfast.core.errors import UsageError
from holdfast.core.names import kind_of
from holdfast.io.models.estimators import Adapted, Estimator, Predictor, adapted_estimator
from holdfast.io.models.keras_models import KerasNet, adapted_keras
from holdfast.io.models.object_digest import digest_of_object
from holdfast.io.models.trees import adapted_booster, adapted_lightgbm


def accepted(model: object) -> bool:
    """Return whether the object is a model of a supported kind: a network, a function or an estimator."""
    if isinstance(model, nn.Module) and _forward(type(model)) is _forward(nn.Module):
        return False  # a generator, or a container of modules
    return callable(model) or isinstance(model, Predictor)


def _forward(kind: type) -> object:
    """The method `forward` of a class, without the descriptor that TorchScript puts in its place."""
    return inspect.getattr_static(kind, "forward")


def refuse_generator(model: object, what: str) -> None:
    """Raise `UsageError` for a generator, which is no classifier. `what` begins the message, as in "model is"."""
    if callable(getattr(model, "sample", None)) and not accepted(model):
        raise no_classifier(f"{what} a generator ({type(model).__name__})")


def no_classifier(what: str) -> UsageError:
    """Return the error for a generator in the place of a classifier. `what` begins the message."""
    return UsageError(
        f"{what}, and a classifier was expected; holdfast audit generator audits generators, and holdfast harden "
        f"trains them with the recipes {' and '.join(GENERATOR_RECIPES)}"
    )


def refuse_no_model(model: object, argument: str = "model") -> None:
    """Raise `UsageError` for an object that is not a model, such as a state dict, a class, or a function that builds a
    network. `argument` is the name of the argument in the message.
    """
    if isinstance(model, type):
        raise UsageError(
            f"{argument} is the class {model.__qualname__}; give an object of it, as in {model.__qualname__}()"
        )
    if isinstance(model, Mapping):
        raise UsageError(
            f"{argument} is {kind_of(model)}, as a state dict is, which contains weights and not the network; build "
            "the network, load the weights, as in net.load_state_dict(weights), and give net"
        )
    if takes_no_input(model):
        raise UsageError(
            f"{argument} is a function that accepts no inputs; a network, or a function from inputs to logits, was "
            "expected. If it builds the network, give the network that it returns, as in net = make()"
        )
    refuse_generator(model, f"{argument} is")
    if not accepted(model):
        raise UsageError(
            f"{argument} is {kind_of(model)}; expected a network, a function from inputs to logits, an estimator, or "
            "an address"
        )


def takes_no_input(model: object) -> bool:
    """Return whether the object is a function that cannot be called with inputs, such as one that builds a network."""
    if isinstance(model, nn.Module) or not callable(model):
        return False
    try:
        inspect.signature(model).bind(None)
    except TypeError:
        return True
    except ValueError:  # no signature is known, as of some built-in functions
        return False
    return False


def adapted(model: object) -> Adapted | None:
    """Return a model of another library, such as scikit-learn, wrapped as a torch module. Return None if the model is a
    torch network or a function.

    Raises `TargetError` for an object that is not a classifier, is not fitted, or runs on another back end than torch,
    and `UsageError` for an object that is not a model.
    """
    refuse_no_model(model)
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
