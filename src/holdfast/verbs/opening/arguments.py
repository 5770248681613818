"""Arguments of the Python functions: their decorator, the refusal of misspelt ones, and the models and data that they
accept, of which `open_model` and `open_data` state how they are opened.
"""

import copy
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass, replace
from functools import wraps
from inspect import Parameter, Signature, cleandoc, signature
from pathlib import Path
from types import FunctionType
from typing import Any, ParamSpec, TypeVar, get_type_hints

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from holdfast.core.catalogue import RECIPES
from holdfast.core.errors import Placeholder, Remedy, UsageError
from holdfast.core.names import did_you_mean, is_size, size_text, threat_text
from holdfast.core.threat import ThreatModel
from holdfast.gates.grammar import with_equality
from holdfast.io.data.tables import is_frame
from holdfast.io.models.adapting import refuse_no_model
from holdfast.io.models.estimators import Predictor
from holdfast.settings.grammar import AUTO, folded
from holdfast.settings.groups import (
    DataSource,
    InferenceSource,
    Members,
    ModelSource,
    ServerLimits,
    SettingGroup,
)
from holdfast.settings.values import address_of
from holdfast.threats.parsing import threat_of
from holdfast.verbs.checked_settings import Checked, DataReference, ModelReference, VerbSettings, composed
from holdfast.verbs.configuration import given
from holdfast.verbs.placement import OF_CLUSTERS, CertifyCluster, Placement


@contextmanager
def gradients() -> Iterator[None]:
    """Context manager that enables gradients, even under `no_grad` or `inference_mode`; also used as a decorator."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def differentiable(net: nn.Module) -> nn.Module:
    """Return the network, or a copy of it if it was created under `torch.inference_mode` and so cannot be used in a
    backward pass.
    """
    tensors = (*net.parameters(), *net.buffers())
    is_inference = any(not is_lazy(tensor) and tensor.is_inference() for tensor in tensors)
    return copy.deepcopy(net) if is_inference else net


P = ParamSpec("P")
R = TypeVar("R")


def _keys(*groups: type[SettingGroup]) -> list[str]:
    return [name for group in groups for name in group.model_fields if name not in ("model", "data")]


PLACES = {
    **dict.fromkeys(_keys(ModelSource, Members, InferenceSource, ServerLimits), "open_model"),
    **dict.fromkeys(_keys(DataSource), "open_data"),
}
"""Name of the function that has the argument, for each setting that states how a model is opened or data are read."""

_ELSEWHERE = {
    *PLACES,
    *("schema_version", "output", "attacks"),  # of a file, `Result.write`, and suite=[PGD(…)]
    *OF_CLUSTERS,
}
_LAST = ("run", "resume", "notify", "progress")


def verb_with(kind: type[Checked], *only: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator for a function of the Python interface whose last parameter, `**settings`, stands for the
    settings of a command. It then runs with gradients enabled, and refuses arguments that have another name, or are
    arguments of `open_model` and `open_data`.

    The signature and the docstring of the function list each setting that is not a parameter of the function, with the
    default and the description of its field; with `only`, these settings alone. A last parameter `**others` remains.
    """

    def decorated(function: Callable[P, R]) -> Callable[P, R]:
        written = signature(function)
        *own, rest = written.parameters.values()
        elsewhere = {*(_ELSEWHERE if issubclass(kind, VerbSettings) else ()), *(p.name for p in own)}
        if issubclass(kind, Placement):
            elsewhere.add(kind.waiting_key)  # of `holdfast.Ray`
        types = get_type_hints(kind)
        fields = {
            key: field
            for key, field in kind.model_fields.items()
            if (key in only if only else key not in elsewhere)
        }
        added = [
            Parameter(
                key,
                Parameter.KEYWORD_ONLY,
                default=field.get_default(call_default_factory=True),
                annotation=types[key],
            )
            for key, field in fields.items()
        ]
        first = [parameter for parameter in own if parameter.name not in _LAST]
        last = [parameter for parameter in (*own, rest) if parameter.name in (*_LAST, "others")]
        call = _checked(function, written.replace(parameters=[*first, *added, *last]))
        listed = "\n".join(
            f"    {key}: {in_python(field.description or '')}" for key, field in fields.items()
        )
        call.__doc__ = f"{cleandoc(function.__doc__ or '')}\n\nFurther arguments:\n{listed}\n"
        return call

    return decorated


def in_python(description: str) -> str:
    """Return the description of a setting with arguments in place of command-line options.

    >>> in_python("Deviation of the noise of --method smoothing. Ray needs --batch-size.")
    "Deviation of the noise of method='smoothing'. Ray needs batch_size."
    """
    description = re.sub(r"--method (\w+)", r"method='\1'", description)
    return re.sub(r"--([a-z][a-z-]*)", lambda match: match[1].replace("-", "_"), description)


def _checked(function: Callable[P, R], shown: Signature) -> Callable[P, R]:
    parameters = shown.parameters
    names = [*parameters, ""]

    @wraps(function)
    def call(*args: P.args, **arguments: P.kwargs) -> R:
        refuse_misspelt(function.__name__, parameters, args, arguments, PLACES)
        _refuse_moved(parameters, names, arguments)
        with gradients():
            return function(*args, **arguments)

    vars(call)["__signature__"] = shown
    return call


def _refuse_moved(
    parameters: Mapping[str, Parameter], names: list[str], arguments: Mapping[str, Any]
) -> None:
    """Raise `UsageError` for an argument of `open_model` or `open_data`."""
    for key in arguments:
        place = PLACES.get(key, "")
        argument = names[0] if place == "open_model" else names[1]
        if place and key not in parameters and names[0] == "model":
            raise UsageError(
                f"{key} is an argument of holdfast.{place}: give holdfast.{place}({argument}, {key}=...) as {argument}"
            )


_EPS = ("eps", "epsilon")
_ATTACKS = ("attack", "attacks")
_LABELS = ("x", "y")
_TIMES = ("time", "time_limit", "timeout", "max_time")
_BUDGETS = ("budget", "time_budget")
_NORMS = {"linf": 8 / 255, "l2": 0.5, "l1": 10, "l0": 10}
"""norms with a usual eps of each for images"""


def refuse_misspelt(
    function: str,
    parameters: Mapping[str, Parameter],
    args: Sequence[Any],
    arguments: Mapping[str, Any],
    moved: Container[str] = (),
) -> None:
    """Raise `UsageError` with the right spelling for an argument that the function does not have under this name.

    `args` and `arguments` are those of the call, by position and by name. Names in `moved` are not refused here.
    """
    names = list(parameters)
    given = {**dict(zip(names, args, strict=False)), **arguments}
    _refuse_labels(function, names, args, arguments)
    takes_any = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values())
    for key, value in arguments.items():
        if key in parameters:
            continue
        if key in (*_EPS, "norm") and "threat" in parameters:
            raise _misspelt(function, key, *_of_threat(key, value, given))
        if key == "gate" and "gates" in parameters:
            raise _misspelt(function, key, *_of_gate(value))
        if key in _ATTACKS or (key == "suite" and "attack" in parameters):
            raise _misspelt(function, key, *_of_attack(parameters, key, value))
        if key == "steps" and not takes_any:
            raise _misspelt(function, key, *_of_steps(parameters, key, value, given.get("suite")))
        if key in _TIMES and (argument := next((name for name in _BUDGETS if name in parameters), None)):
            text = f"{value}s" if is_size(value) else value
            raise _misspelt(function, key, *([Remedy(argument, text)] if isinstance(text, str) else []))
        if key == "epochs" and "recipe" in parameters:
            raise _misspelt(function, key, *_of_epochs(value, given.get("recipe")))
        if key in (*OF_CLUSTERS, CertifyCluster.waiting_key) and "on" in parameters:
            raise UsageError(
                f"{function} has no argument {key!r}: it is one of holdfast.Ray, as in "
                f"on=holdfast.Ray({key.removeprefix('cluster_')}=...)"
            )
        if key == "output":
            raise UsageError(
                f"{function} has no argument {key!r}: write a report of the result, as in result.write('report.html')"
            )
        if not takes_any and key not in moved:
            raise UsageError(f"{function} has no argument {key!r}{did_you_mean(key, parameters)}")


def _of_gate(value: object) -> tuple[Remedy, ...]:
    """Return the argument with the gates of a call."""
    gates = [value] if isinstance(value, str) else value
    if not isinstance(gates, list | tuple) or not all(isinstance(gate, str) for gate in gates):
        return ()
    return (Remedy("gates", tuple(map(with_equality, gates)), "--gate", repeated=True),)


def with_eps(threat: object, eps: object) -> str:
    """Return the text of a threat with another eps, as in `linf:8/255`."""
    size, model = size_text(eps) if isinstance(eps, int | float) else str(eps), ThreatModel()
    with suppress(UsageError):
        model = threat_of(threat)
    norm = model.name if model.name in _NORMS else "linf"
    return threat_text(f"{norm}:{size}", model.goal, model.access, model.queries, model.unit)


def _misspelt(function: str, key: str, *remedies: Remedy) -> UsageError:
    return UsageError(f"{function} has no argument {key!r}", *remedies)


def _of_attack(parameters: Mapping[str, Parameter], key: str, attack: Any) -> tuple[Remedy, ...]:
    """Return the arguments of a function that select attacks, or a training with an attack."""
    if isinstance(attack, list | tuple) and all(isinstance(each, str) for each in attack):
        attack = ",".join(attack)
    value = attack if isinstance(attack, str) else Placeholder("ATTACK", _text_of(attack))
    if "attack" in parameters:
        return (Remedy("attack", value),)
    trained = isinstance(attack, str) and folded(attack) in map(folded, RECIPES)
    if "recipe" not in parameters:
        return (Remedy("suite", value),) if "suite" in parameters else (Remedy(key),)
    recipe = (Remedy("recipe", value, reason="to train with it"),) if trained else ()
    return (*recipe, Remedy("suite", value, reason="to measure with it"))


def _of_threat(key: str, value: object, given: Mapping[str, Any]) -> tuple[Remedy, ...]:
    """Return the threat of a call whose arguments are a norm, an eps, or both."""
    if key != "norm" and not is_size(value):
        return ()
    if "norm" not in given:
        return (Remedy("threat", with_eps(given.get("threat"), value)),)
    name = f"l{re.sub('[^a-z0-9]', '', str(given['norm']).lower()).removeprefix('l')}"
    if name not in _NORMS:
        return ()
    threat = given.get("threat")
    if key == "norm" and isinstance(threat, str) and threat.startswith(f"{name}:"):
        return (Remedy("norm"),)
    eps = next((given[each] for each in _EPS if each in given), _NORMS[name])
    return (Remedy("threat", with_eps(name, eps)),)


def _of_epochs(epochs: object, recipe: object) -> tuple[Remedy, ...]:
    """Return the recipe of the call with a number of epochs."""
    if not isinstance(recipe, str | None) or recipe == AUTO or not is_size(epochs):
        return ()  # an object or a mapping states its own epochs, and `auto` has a budget
    name = recipe or "pgd"
    settings = f"{{'use': {name!r}, 'training': {{'epochs': {epochs!r}}}}}"
    return (Remedy("recipe", Placeholder(f"{{use: {name}, training: {{epochs: {epochs}}}}}", settings)),)


def _of_steps(
    parameters: Mapping[str, Parameter], key: str, steps: object, suite: object
) -> tuple[Remedy, ...]:
    """Return the argument of a function that contains the settings of an attack."""
    place = next((name for name in ("recipe", "suite") if name in parameters), None)
    if place is None:
        return (Remedy(key),)
    name = suite if isinstance(suite, str) else "pgd"
    settings = f"{{'use': {name!r}, 'steps': {steps!r}}}"
    return (Remedy(place, Placeholder(f"{{use: {name}, steps: {steps}}}", settings)),)


def _text_of(value: object) -> str:
    """Return the text of an attack, which is a dataclass, as code."""
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text_of, value))}]"
    if not is_dataclass(value):
        return repr(value) if isinstance(value, str | Mapping) else "ATTACK"
    changed = [f for f in fields(value) if getattr(value, f.name) != f.default]
    settings = ", ".join(f"{f.name}={_of_setting(getattr(value, f.name))}" for f in changed)
    return f"{type(value).__name__}({settings})"


def _of_setting(value: object) -> str:
    return value.__name__ if isinstance(value, FunctionType) else repr(value)


def _refuse_labels(
    function: str, names: Sequence[str], args: Sequence[Any], arguments: Mapping[str, Any]
) -> None:
    """Raise `UsageError` for labels that are given as an argument of their own, or as a part of the inputs."""
    if names[:2] == ["model", "data"]:
        third = (
            args[2] if len(args) > 2 else next((arguments[key] for key in _LABELS if key in arguments), None)
        )
        if isinstance(third, Sized) and not isinstance(third, str):
            raise UsageError(
                f"{function} has no argument for labels; give inputs and labels as one argument, as in "
                f"holdfast.{function}(model, (x, y))"
            )
    if names[1:3] == ["x", "y"] and len(args) > 2 and isinstance(args[1], tuple) and isinstance(args[2], str):
        raise UsageError(
            f"the labels of {function} are {args[2]!r}; give inputs and labels as two arguments, as in "
            f"holdfast.{function}(model, x, y, {args[2]!r})"
        )


ModelLike = nn.Module | Callable[[Tensor], Tensor] | Predictor | str | Path | ModelReference
"""A network, a function from inputs to logits, an estimator, an address, or the result of `holdfast.open_model`."""
DataLike = Any
"""Examples: `(x, y)` as tensors or arrays, a loader or dataset of pairs, a data frame, a `Data`, an address, or the
result of `holdfast.open_data`."""


@verb_with(ModelReference)
def open_model(model: ModelLike, **settings: Any) -> ModelReference:
    """Return a reference to a model with options for opening it, as an argument for `assess`, `harden`, `attack` and
    other functions.

    `model` is an address (`"net.py:make"`, `"model.onnx"`, a URL) or an object. The arguments are checked immediately.
    The model is opened by the function to which the reference is passed, so that requests to a server are counted in
    its run. Raises `UsageError` for an invalid argument.
    """
    if isinstance(model, ModelReference):
        raise UsageError("model is a result of open_model already; give all arguments in one call")
    reference = model_reference(model, **settings)
    if address_of(reference.model) is None:
        outputs = ("model_output", "classes", "class_names", "class_order", "guard")
        refuse_other_settings(reference, "a model given as a Python object", *outputs)
    return reference


@verb_with(DataReference)
def open_data(data: DataLike, **settings: Any) -> DataReference:
    """Return a reference to examples with options for reading them, as an argument for `assess`, `harden`, `attack` and
    other functions.

    `data` is an address or an object. The examples are read by the function to which the reference is passed, because
    some properties depend on the model. Raises `UsageError` for an invalid argument, and for one that selects from a
    file if the data are an object.
    """
    if isinstance(data, DataReference):
        raise UsageError("data is a result of open_data already; give all arguments in one call")
    reference = DataReference(**given(data=data, **settings))
    if address_of(reference.data) is None:
        keys = ("x", "y") if is_frame(reference.data) else ("split", "label", "drop")
        options = _changed(reference, (*keys, "separator", "header", "follow_links"))
        if options:
            raise UsageError(
                f"{_written(options)} is not possible for data given as a Python object: it is for an address, such as "
                "table.csv; select the rows and columns before",
                _removal(options, "open_data"),
            )
    return reference


def refuse_other_settings(reference: ModelReference, what: str, *possible: str) -> None:
    """Raise `UsageError` if a reference to a model has options that are not allowed for its use, for example
    as a surrogate.

    Limits of servers are excluded, because they are checked when the model is opened.
    """
    excluded = {"model", *possible, *ServerLimits.model_fields}
    options = _changed(reference, (key for key in ModelReference.model_fields if key not in excluded))
    if options:
        raise UsageError(f"{_written(options)} is not possible for {what}", _removal(options, "open_model"))


def _changed(reference: ModelReference | DataReference, keys: Iterable[str]) -> dict[str, Any]:
    """Return those options of a reference that differ from the defaults."""
    usual = type(reference).model_construct()
    return {key: value for key in keys if (value := getattr(reference, key)) != getattr(usual, key)}


def _written(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in options.items())


def _removal(options: Iterable[str], function: str) -> Remedy:
    """Return the removal of arguments of a function."""
    first, *others = (Remedy(key, function=function) for key in options)
    return replace(first, also=tuple(others))


def model_reference(model: ModelLike, **settings: Any) -> ModelReference:
    """Return the reference to a model that is given as an object, an address or a reference. Raises `UsageError` for
    any other object.
    """
    if isinstance(model, ModelReference):
        return model
    if not isinstance(model, str | Path):
        refuse_no_model(model)
    return ModelReference(**given(model=model, **settings))


def beside(settings: DataSource, data: DataLike) -> DataSource:
    """Return the reference to additional data of a run, by default read with the same options as the main data,
    except the split.
    """
    if isinstance(data, DataReference):
        return data
    unnamed = {"x": None, "y": None} if isinstance(data, tuple) else {}  # a pair has no named entries
    return composed(DataSource, settings).model_copy(update={"data": data, "split": None, **unnamed})
