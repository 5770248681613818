"""Decorators for the functions of the Python interface, whose arguments are the settings of a command."""

import re
from collections.abc import Callable, Mapping
from functools import wraps
from inspect import Parameter, Signature, cleandoc, signature
from typing import Any, ParamSpec, TypeVar, get_type_hints

from holdfast.api.checked_settings import Checked, VerbSettings
from holdfast.api.grad_mode import gradients
from holdfast.api.misspelt import refuse_misspelt
from holdfast.api.placing import OF_CLUSTERS, Placement
from holdfast.core.errors import UsageError
from holdfast.settings.groups import (
    DataSource,
    InferenceSource,
    Members,
    ModelSource,
    ServerLimits,
    SettingGroup,
)

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
