"""Error messages for arguments of version 0.1, such as `arch` of `holdfast.assess`, which are now arguments of
`open_model` and `open_data`.
"""

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import ParamSpec, TypeVar

from holdfast.config.grad_mode import gradients
from holdfast.config.groups import DataSource, InferenceSource, ModelSource, ServerLimits, SettingGroup
from holdfast.config.misspelt import refuse_misspelt
from holdfast.core.errors import UsageError

P = ParamSpec("P")
R = TypeVar("R")


def _keys(*groups: type[SettingGroup]) -> list[str]:
    return [name for group in groups for name in group.model_fields if name not in ("model", "data")]


PLACES = {
    **dict.fromkeys(_keys(ModelSource, InferenceSource, ServerLimits), "open_model"),
    **dict.fromkeys(_keys(DataSource), "open_data"),
}
"""Name of the function that has the argument now, for each argument that the verbs had in version 0.1."""


def verb(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function of the Python interface, such as `assess`, so that it runs with gradients enabled and refuses
    arguments that were moved or have another name.

    If the function is called with an argument that was moved, it raises `UsageError` with the function that has the
    argument now.
    """
    parameters = signature(function).parameters
    names = [*parameters, ""]

    @wraps(function)
    def call(*args: P.args, **arguments: P.kwargs) -> R:
        refuse_misspelt(function.__name__, parameters, args, arguments, PLACES)
        for key in arguments:
            place = PLACES.get(key, "")
            argument = names[0] if place == "open_model" else names[1]
            if place and key not in parameters and names[0] == "model":
                raise UsageError(
                    f"{key} is an argument of holdfast.{place}: give holdfast.{place}({argument}, {key}=...) as "
                    f"{argument}"
                )
        with gradients():
            return function(*args, **arguments)

    return call
