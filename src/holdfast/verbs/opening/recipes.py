"""Creates attacks and recipes from names and settings, and recipes from the card of a hardened model. For example,
`{use: trades, beta: 6}` becomes a TRADES recipe.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import nn

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
from holdfast.core.catalogue import PARTITIONS, RECIPES, load, names
from holdfast.core.constraints import L1, L2, Constraint, Linf
from holdfast.core.errors import Placeholder, Remedy, TargetError, UsageError
from holdfast.core.names import did_you_mean, parse_number
from holdfast.core.threat import ThreatModel
from holdfast.io.files import text_of_file
from holdfast.io.models.factories import function_from_file, function_name, names_code
from holdfast.io.models.models import BUNDLED_FOLDER, CARD
from holdfast.recipes.training.fit import Training
from holdfast.recipes.training.optimisation import started
from holdfast.recipes.training.recipe import Recipe
from holdfast.runs.harden.candidates import Candidate
from holdfast.settings.grammar import AUTO, attack_class_called
from holdfast.settings.grammar import CARD as CARD_RECIPE
from holdfast.settings.texts import complaint, place
from holdfast.settings.values import written_fields
from holdfast.threats.parsing import parse_threat

_INDENT = "    "  # indent of the settings in a bundled card


def trained_by(address: str) -> dict[str, Any] | None:
    """Return the recipe with which a model was trained, from its model card, as a dictionary of settings. The name of
    the recipe has the key `use`.

    The result is None if the model has no card, or if its card contains no recipe.
    """
    bundled, beside = BUNDLED_FOLDER / f"{address}.md", Path(address).with_name(CARD)
    if "/" not in address and bundled.is_file():
        lines = bundled.read_text(encoding="utf-8").splitlines()
        return _recipe(json.loads("\n".join(line for line in lines if line.startswith(_INDENT)) or "{}"))
    if not (Path(address).is_file() and beside.exists()):
        return None
    text = text_of_file(beside, "card")
    try:
        card = json.loads(text)
        name, settings = card["recipe"], card["settings"]
        if not isinstance(name, str) or not isinstance(settings.get("training", {}), dict):
            raise TypeError("recipe is not a text, or settings.training is not an object")
        return _recipe({**settings, "recipe": name})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TargetError(
            f"{str(beside)!r} is not the card of a hardened model: {error!r}; restore it",
            Remedy("recipe", "pgd"),
        ) from error


def _recipe(card: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the name and settings of the recipe, without the other entries of a bundled card."""
    if "recipe" not in card:
        return None
    return {
        "use": card["recipe"],
        **{key: card[key] for key in card if key not in ("recipe", "threat", "seed")},
    }


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


Built = TypeVar("Built")
_OF_OPTIMIZER = ("lr", "momentum", "weight_decay")
"""Settings of a named optimiser."""
_SHORT_LR = 0.01  # learning rate of `auto` for adamw in a training of few updates


_ON_CLIPS = ("pgd", "trades", "n-fgsm", "fgsm-rs", "mart", "standard", AUTO)
_RECIPES_OF: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("snr", "peak"), _ON_CLIPS),
    "patch": ("masked-patches", "standard"),
    "table": ("pgd", "trades", "standard"),
    "text": ("masked-words", "standard"),
    "training-set": (PARTITIONS,),
    "trigger": ("repair", "ft-sam"),
}
"""Recipes for each threat that other recipes cannot train against."""
_TRIGGER = Placeholder("trigger:FILE", "'trigger:FILE'")
_THREAT_OF: Mapping[str, str | Placeholder] = {
    "masked-patches": "patch:4x4",
    "masked-words": "text:edits=1,words=2",
    PARTITIONS: "training-set:20",
    "repair": _TRIGGER,
    "ft-sam": _TRIGGER,
}
"""A threat for each recipe that trains for one kind of threat alone."""


def refuse_unheld(threat: ThreatModel, recipe: str = "") -> None:
    """Raise `UsageError` for a threat model that the recipe cannot train against."""
    constraint = threat.constraint
    possible = _RECIPES_OF.get(threat.name, ())
    if recipe in possible:
        return
    if possible and recipe:
        raise UsageError(
            f"the threat is {constraint}, and the recipe is {recipe}; against such a threat, models are trained by "
            f"{' and '.join(possible)}",
            Remedy("recipe", possible[0]),
        )
    if recipe in _THREAT_OF:
        raise UsageError(
            f"the recipe {recipe} is for threats such as {_THREAT_OF[recipe]}, and the threat is {constraint}",
            Remedy("threat", _THREAT_OF[recipe]),
            Remedy("recipe", "pgd"),
        )
    if not constraint.in_input_units:
        raise UsageError(
            f"recipes train for the threats linf, l2 and l1, and the threat is {threat.name}",
            Remedy("threat", replace(threat, goal=None).with_change("linf:8/255")),
        )
    if threat.goal is not None:
        raise UsageError(
            f"recipes train against attacks without a target class, and the goal is class {threat.goal}; leave goal= "
            f"out, and assess the new model with it"
        )


def candidates(spec: Mapping[str, Any], model: nn.Module, shape: tuple[int, ...]) -> tuple[Candidate, ...]:
    """Return the recipes, with their settings, from which a run of `holdfast harden` may choose. A recipe that is given
    by name is the only one.

    For the name `auto`, returns all candidates for inputs of the shape `shape`, ordered from the fastest to the
    strongest.
    """
    if spec["use"] == CARD_RECIPE:
        raise UsageError(
            "recipe card is for rotate, which trains as the model was trained; name a recipe, or auto"
        )
    if spec["use"] != AUTO:
        return (_candidate(spec),)
    given_settings = {key: value for key, value in spec.items() if key != "use"}
    other_keys = [key for key in given_settings if key != "training"]
    if other_keys:
        raise UsageError(
            f"recipe auto selects one of several recipes, so it has no setting {other_keys[0]!r}; name the recipe "
            "that has it, or give a setting that all have, such as recipe.training.batch"
        )
    given = given_settings.get("training", {})
    return tuple(
        replace(
            _candidate({"use": name, **more, "training": {**training, **given}}, least),
            short_lr=None if {"lr", "optimizer"} & {*training, *given} else _SHORT_LR,
        )
        for name, least, more, training in _ladder(shape, model, given)
    )


def _ladder(
    shape: tuple[int, ...], model: nn.Module, training: Mapping[str, Any]
) -> tuple[tuple[str, int, dict[str, Any], dict[str, Any]], ...]:
    """Return name, least number of epochs, settings and training settings of each recipe of `auto`.

    With fewer epochs, a weaker recipe gives better results.
    """
    photographs = len(shape) == 3 and shape[0] == 3
    has_batch_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    sgd = has_batch_norm and training.get("optimizer", "sgd") == "sgd"
    how: dict[str, Any] = {"optimizer": "sgd", "lr": 0.1} if sgd else {}
    if len(shape) == 3 and not photographs:
        # atta stores a perturbation of each example, which it shifts with the image
        named = training.get("augment", "none") in ("none", "shift", "crop-flip")
        atta_possible = not training.get("cutmix", 0) and named and started() == 1
        # from two epochs on it is at least as robust as quicker recipes
        middle = ("atta", 2) if atta_possible else ("pgd", 10)
        return ("fgsm-rs", 1, {}, how), (*middle, {}, how), ("trades", 60, {}, how)
    if photographs:
        how["augment"] = "shift"  # a mirrored traffic sign may have another meaning
    return ("n-fgsm", 1, {}, how), ("pgd", 10, {}, how), ("trades", 30, {}, {**how, "awp": 0.005})


def _candidate(spec: Mapping[str, Any], least: int = 1) -> Candidate:
    recipe = build_recipe(spec)
    return Candidate(str(spec["use"]), recipe, settings_of(recipe), least)


def build_recipe(spec: Mapping[str, Any]) -> Recipe:
    """Return the recipe that a mapping such as `{use: trades, beta: 6}` describes. Each setting is validated against
    its type and range.
    """
    name = str(spec["use"])
    if name not in names("recipes"):  # the name is from a card; other settings were validated before
        raise UsageError(
            f"the card names the recipe {name!r}, which does not exist{did_you_mean(name, names('recipes'))}",
            Remedy("recipe", "pgd"),
        )
    usual = RECIPES[name].settings if name in RECIPES else {}
    settings = {**usual, **{key: value for key, value in spec.items() if key != "use"}}
    recipe: Recipe = built(load("recipes", name, type), settings, f"recipe {name}", "recipe")
    if "optimizer" in functions_in(spec):
        for key in _OF_OPTIMIZER:
            if key in spec["training"]:
                raise UsageError(
                    f"recipe.training.{key} is {spec['training'][key]}, and the optimiser is a function, which "
                    "determines it; set it in the function"
                )
    return recipe


def built(cls: type[Built], given: Mapping[str, Any], where: str, key: str) -> Built:
    """Return an instance of a dataclass of settings, with each value validated. `key` is the path of these settings in
    a configuration file.
    """
    checked = _checked(cls, given, where, key)
    for field in written_fields(cls):
        if field.default is field.default_factory is MISSING and field.name not in checked:
            raise UsageError(
                f"{where} needs {field.name}, and none was given",
                Remedy(f"{key}.{field.name}", Placeholder("VALUE")),
            )
    return cls(**checked)


def part_of(field: Field[Any], hint: Any) -> type[Any] | None:
    """Return the dataclass of the nested settings in a field, or None if the field contains a plain value such as a
    number.

    If the type of the field is not a dataclass, that of its default is used.
    """
    kinds = (kind for kind in (hint, field.default_factory) if isinstance(kind, type) and is_dataclass(kind))
    return next(kinds, None)


def _checked(cls: type[Any], given: Mapping[str, Any], where: str, path: str) -> dict[str, Any]:
    """Return the given settings, each validated by the type of its field.

    Parts keep the recipe's values for other settings.
    """
    hints = get_type_hints(cls, include_extras=True)
    written = {f.name: f for f in written_fields(cls)}
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in written:
            raise UsageError(f"{where} has no setting {key!r}{did_you_mean(str(key), written)}")
        hint = hints[key]
        part_class = part_of(written[key], hint)
        if part_class is not None:
            if not isinstance(value, Mapping):
                raise UsageError(
                    f"{where}: {key} is {value!r}; it has parts, which are set one by one",
                    Remedy(f"{path}.{key}.{written_fields(part_class)[0].name}", Placeholder("VALUE")),
                )
            part = written[key].default_factory
            assert part is not MISSING
            values[key] = replace(part(), **_checked(part_class, value, f"{where}: {key}", f"{path}.{key}"))
        elif is_function_or_name(hint) and not (isinstance(value, str) and value in named_alternatives(hint)):
            values[key] = _function(hint, value, f"{where}: {key}")
        else:
            values[key] = setting(hint, value, f"{where}: {key}")
    return values


def _function(hint: Any, value: Any, where: str) -> Callable[..., Any]:
    """Return a function of the user, which is given as an address `file.py:name` or in Python as itself."""
    if isinstance(value, str) and names_code(value):
        return function_from_file(value)
    if callable(value):
        function: Callable[..., Any] = value
        return function
    refused: Callable[..., Any] = setting(hint, value, where)  # raises the error
    return refused


def functions_in(spec: Mapping[str, Any]) -> dict[str, object]:
    """Return the settings of the training in a recipe that are functions or addresses of functions in files."""
    training = spec.get("training")
    return {
        str(key): value
        for key, value in (training if isinstance(training, Mapping) else {}).items()
        if callable(value) or (isinstance(value, str) and names_code(value))
    }


def without_functions(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a recipe without those that are functions, so that no code of the user is run."""
    functions = functions_in(spec)
    if not functions:
        return dict(spec)
    return {
        **spec,
        "training": {key: spec["training"][key] for key in spec["training"] if key not in functions},
    }


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """Return all settings of a recipe as plain values, such as numbers and strings, with nested settings as
    dictionaries. Settings that a function of the user determines, such as the learning rate, are left out.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, (Linf, L2, L1)):
            return f"{type(value).__name__.lower()}:{value.eps!r}"
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        if isinstance(value, Training):
            own: dict[str, Any] = {name: function_name(each) for name, each in value.functions.items()}
            decided = _OF_OPTIMIZER if "optimizer" in own else ()
            listed = [f.name for f in written_fields(Training) if f.name not in decided]
            return {name: own.get(name, plain(getattr(value, name))) for name in listed}
        if is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in written_fields(type(value))}
        return getattr(value, "__name__", value) if callable(value) else value

    values: dict[str, Any] = plain(recipe)
    return values
