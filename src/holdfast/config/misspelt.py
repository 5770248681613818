"""Refuses arguments of the Python functions that have another name or place, with the right spelling in the message."""

from collections.abc import Mapping, Sequence, Sized
from dataclasses import fields, is_dataclass
from inspect import Parameter
from types import FunctionType
from typing import Any

from holdfast.config.spellings import folded
from holdfast.core.catalogue import RECIPES
from holdfast.core.constraints import Constraint
from holdfast.core.errors import UsageError
from holdfast.core.remedies import Placeholder, Remedy

_EPS = ("eps", "epsilon")
_ATTACKS = ("attack", "attacks")
_LABELS = ("x", "y")


def refuse_misspelt(
    function: str, parameters: Mapping[str, Parameter], args: Sequence[Any], arguments: Mapping[str, Any]
) -> None:
    """Raise `UsageError` with the right spelling for an argument that the function does not have under this name.

    `args` and `arguments` are those of the call, by position and by name. Other names are not
    refused here.
    """
    names = list(parameters)
    given = {**dict(zip(names, args, strict=False)), **arguments}
    _refuse_labels(function, names, args, arguments)
    takes_any = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values())
    for key, value in arguments.items():
        if key in parameters:
            continue
        if key in _EPS and "threat" in parameters:
            raise _misspelt(function, key, Remedy("threat", with_eps(given.get("threat"), value)))
        if key == "gate" and "gates" in parameters:
            gates = (value,) if isinstance(value, str) else tuple(value)
            raise _misspelt(function, key, Remedy("gates", gates, "--gate", repeated=True))
        if key == "suite" and "attack" in parameters:
            named = value if isinstance(value, str) else Placeholder("ATTACK", _text_of(value))
            raise _misspelt(function, key, Remedy("attack", named))
        if key in _ATTACKS:
            raise _misspelt(function, key, *_of_attack(parameters, key, value))
        if key == "steps" and not takes_any:
            raise _misspelt(function, key, *_of_steps(parameters, key, value, given.get("suite")))


def with_eps(threat: object, eps: object) -> str:
    """Return the text of a threat with another eps, as in `linf:8/255`."""
    norm, comma, rest = threat.partition(",") if isinstance(threat, str) else ("", "", "")
    if isinstance(threat, Constraint):
        norm = threat.name
    return f"{norm.partition(':')[0] or 'linf'}:{_written(eps)}{comma}{rest}"


def _written(eps: object) -> str:
    """Return the text of a number, as a multiple of 1/255 if it is one."""
    if not isinstance(eps, int | float):
        return str(eps)
    levels = round(eps * 255)
    return f"{levels}/255" if 0 < levels < 255 and eps == levels / 255 else repr(eps)


def _misspelt(function: str, key: str, *remedies: Remedy) -> UsageError:
    return UsageError(f"{function} has no argument {key!r}", *remedies)


def _of_attack(parameters: Mapping[str, Parameter], key: str, attack: Any) -> tuple[Remedy, ...]:
    """Return the arguments of a function that select attacks, or a training with an attack."""
    value = attack if isinstance(attack, str) else Placeholder("ATTACK", _text_of(attack))
    trained = isinstance(attack, str) and folded(attack) in map(folded, RECIPES)
    if "recipe" not in parameters:
        return (Remedy("suite", value),) if "suite" in parameters else (Remedy(key),)
    recipe = (Remedy("recipe", value, reason="to train with it"),) if trained else ()
    return (*recipe, Remedy("suite", value, reason="to measure with it"))


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
    if not is_dataclass(value):
        return "ATTACK"
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
