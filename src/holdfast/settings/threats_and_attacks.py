"""Creates attacks from names and settings. For example, `{use: PGD, steps: 100}` becomes a PGD attack with validated
settings.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from holdfast.attacks.parts.ascent import Schedule, cosine, flat
from holdfast.attacks.parts.losses import (
    Loss,
    cross_entropy,
    dlr,
    margin_loss,
    probability_margin,
    scaled_cross_entropy,
)
from holdfast.attacks.protocol import Attack
from holdfast.core.catalogue import load, names
from holdfast.core.constraints import Constraint
from holdfast.core.errors import UsageError
from holdfast.core.names import parse_number
from holdfast.core.spelling import did_you_mean
from holdfast.core.threat import ThreatModel
from holdfast.settings.spellings import attack_class_called
from holdfast.settings.wording import complaint, place
from holdfast.threats.parsing import parse_threat

_FUNCTIONS: dict[Any, tuple[Callable[..., Any], ...]] = {
    Loss: (cross_entropy, dlr, margin_loss, probability_margin, scaled_cross_entropy),
    Schedule: (cosine, flat),
}


ThreatLike = str | Constraint | ThreatModel
"""A threat model as text, a constraint such as `holdfast.Linf(8/255)`, or a threat model without surrogates."""


def constraints(value: Any, where: str) -> tuple[Constraint, ...]:
    """Return the norm balls that are given as a list of constraints or strings, or as one string such as
    `l2:1.5,l1:10`.
    """
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)) or not all(isinstance(item, (str, Constraint)) for item in items):
        raise UsageError(f"{where} is {value!r}; expected norms and sizes, as in l2:1.5,l1:10")
    return tuple(item if isinstance(item, Constraint) else _ball(item, where) for item in items)


def _ball(text: str, where: str) -> Constraint:
    try:
        constraint = parse_threat(text).constraint
    except UsageError as error:  # its remedy is for the argument `threat`
        raise UsageError(error.message) from None
    if not constraint.is_ball or math.isinf(constraint.eps):
        raise UsageError(f"{where} has {text.strip()!r}; expected a norm and a size, as in l2:1.5")
    return constraint


def attack_names() -> dict[str, type[Any]]:
    """Return a dictionary of all available attacks, from the name of each attack to its class.

    These are the attacks of the catalogue and those of other packages in the entry-point group `holdfast.attacks`.
    """
    return {name: load("attacks", name, type) for name in sorted(names("attacks"))}


def attack_class(name: str) -> type[Any]:
    """Return the class of the attack with the name `name`.

    Raises `UsageError` with the most similar name if there is none.
    """
    return load("attacks", attack_class_called(name), type)


def build_attack(spec: Mapping[str, Any], where: str) -> Attack:
    """Return the attack that a mapping such as `{use: PGD, steps: 100}` describes. Each setting is validated against
    its type and range.
    """
    if "use" not in spec:
        raise UsageError(
            f"{where}: an attack needs a name, as in {{use: PGD, steps: 100}}; got {dict(spec)!r}"
        )
    cls = attack_class(str(spec["use"]))
    names = [f.name for f in fields(cls)]
    hints = get_type_hints(cls, include_extras=True)
    settings: dict[str, Any] = {}
    for key, value in spec.items():
        if key == "use":
            continue
        if key not in names:
            raise UsageError(f"{where}: {spec['use']} has no setting {key!r}{did_you_mean(str(key), names)}")
        settings[key] = setting(hints[key], value, f"{where}: {key}")
    missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in settings]
    if missing:
        raise UsageError(f"{where}: {spec['use']} needs {', '.join(missing)}")
    attack: Attack = cls(**settings)
    return attack


def checked_attack(attack: Attack) -> Attack:
    """Return the attack unchanged if all its settings are valid. Raises `UsageError` for the first invalid setting.

    Objects that are not dataclasses, and settings of other types, are not validated.
    """
    refuse_settings(attack, type(attack).__name__)
    return attack


def refuse_settings(settings: Any, name: str) -> None:
    """Raise `UsageError` for the first invalid setting of an attack or another dataclass of settings, including nested
    dataclasses.
    """
    hints = get_type_hints(type(settings), include_extras=True)
    for f in fields(settings) if is_dataclass(settings) else ():
        value, where, hint = getattr(settings, f.name), f"{name}: {f.name}", hints[f.name]
        if isinstance(value, Attack):
            checked_attack(value)
        elif isinstance(hint, type) and is_dataclass(hint):
            if not isinstance(value, hint):
                raise UsageError(f"{where} is {value!r}; expected a {hint.__name__}, as {hint.__name__}()")
            refuse_settings(value, where)
        elif is_function_or_name(hint):
            if not callable(value):
                setting(hint, value, where)
        elif get_origin(hint) is Callable and not callable(value):
            raise UsageError(
                f"{where} is {value!r}; expected a function, such as one of holdfast.attacks.parts.losses"
            )
        elif get_origin(hint) is Literal or hint is bool or _is_number(hint):
            # scalars of NumPy and torch are accepted as numbers
            _validated(hint, value.item() if hasattr(value, "item") else value, where, strict=True)


def functions(hint: Any) -> dict[str, Callable[..., Any]]:
    """Return, by name, the functions that a setting of the type `hint` accepts, such as the loss functions of an attack
    or its step-size schedules.
    """
    return {function.__name__: function for function in _FUNCTIONS.get(hint, ())}


def is_function_or_name(hint: Any) -> bool:
    """Return whether a setting is a name or a function of the user, such as the optimiser of a training."""
    origins = {get_origin(one) for one in get_args(hint)}
    return get_origin(hint) in (Union, UnionType) and {Callable, Literal} <= origins


def named_alternatives(hint: Any) -> tuple[str, ...]:
    """Return the names that a setting accepts beside functions of the user."""
    return tuple(name for one in get_args(hint) if get_origin(one) is Literal for name in get_args(one))


def setting(hint: Any, value: Any, where: str) -> Any:
    """Return the value of a setting of an attack or recipe, converted from a file or a flag and validated against the
    type of the setting.

    `where` is the name of the setting in error messages.
    """
    if hint is Attack and isinstance(value, Mapping):
        return build_attack(value, where)
    if hint == tuple[Constraint, ...]:
        return constraints(value, where)
    if is_function_or_name(hint):
        names = named_alternatives(hint)
        if value not in names:
            raise UsageError(
                f"{where} is {value!r}; expected one of {', '.join(names)}, or a function: FILE.py:NAME on the command "
                "line and in files, the function itself in Python"
            )
        return value
    if get_origin(hint) is Callable:
        by_name = functions(hint)
        if str(value) not in by_name:
            raise UsageError(f"{where} is {value!r}{did_you_mean(str(value), by_name)}")
        return by_name[str(value)]
    if isinstance(value, str) and _is_number(hint):
        value = parse_number(value, where)
    return _validated(hint, value, where, strict=isinstance(value, bool) and _is_number(hint))


def _validated(hint: Any, value: Any, where: str, *, strict: bool) -> Any:
    try:
        return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(
            value, strict=strict
        )
    except ValidationError as error:
        inside = place(error)
        raise UsageError(f"{where}{'.' if inside else ''}{inside} {complaint(error)}") from None


def _is_number(hint: Any) -> bool:
    schema = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).core_schema
    if schema["type"] == "nullable":
        schema = schema["schema"]
    return schema["type"] in ("float", "int")
