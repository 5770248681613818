"""Types of settings, which parse and validate values from files and from the command line."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from math import isfinite
from operator import index
from pathlib import Path
from typing import Annotated, Any, Literal, SupportsIndex, cast

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetPydanticSchema,
    StrictInt,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
)
from pydantic_core import PydanticCustomError, PydanticKnownError
from pydantic_core.core_schema import no_info_plain_validator_function, to_string_ser_schema

from holdfast.core.catalogue import AUDITS, DRIFT_TESTS, GENERATOR_RECIPES, POLICY_RECIPES, names
from holdfast.core.errors import Placeholder, Remedy, TargetError, UsageError
from holdfast.core.names import did_you_mean, kind_of, parse_number
from holdfast.core.threat import ThreatModel
from holdfast.gates.grammar import GATED, parse_until, with_equality
from holdfast.gates.grammar import parse as parse_gate
from holdfast.io.files import text_of_file
from holdfast.io.remote.remote import header_variable
from holdfast.settings.grammar import (
    AUTO,
    CARD,
    SOURCES,
    numbers,
    parse_every,
    parse_log,
    parse_scores,
    parse_surrogate,
    parse_transform,
    per_second,
    seconds,
    suite_or_attacks,
)
from holdfast.threats.domains import CONTROL
from holdfast.threats.parsing import threat_of

InputKind = Literal["numbers", "files", "texts"]
"""kind of the inputs of a served model: arrays of numbers, contents of files, or texts"""
POOL_STAYS = (
    "a pool of parameter sets is not sent to a Ray cluster: its keys and its sets would lie unencrypted in the object "
    "store, where every process of the cluster can read them"
)
"""Reason why a pool does not run on a cluster."""


def address_of(given: object) -> str | None:
    """Return the path, URL or bundled name of a model or data; None for a Python object."""
    return given if isinstance(given, str) else None


def _is_plain(value: object) -> bool:
    """Return whether a file could contain the value."""
    if isinstance(value, Mapping | list):
        return all(map(_is_plain, value.values() if isinstance(value, Mapping) else value))
    return value is None or isinstance(value, str | int | float)


_NOT_GIVEN = PydanticCustomError("given", "expected an address, or in Python an object")
_NO_PATH = PydanticCustomError("path", "expected no character U+0000, which no path or address contains")


def _path_text(value: object) -> object:
    """Return the text of a path, and other values unchanged."""
    text = str(value) if isinstance(value, Path) else value
    if isinstance(text, str) and "\0" in text:
        raise _NO_PATH
    return text


def _given(value: object) -> object:
    """Return the text of an address, and a Python object unchanged. Other values that a file can contain are
    refused.
    """
    text = _path_text(value)
    if _is_plain(text) and not isinstance(text, str):
        raise _NOT_GIVEN
    return text


def _data_sets(value: object) -> object:
    """Refuse further data sets that are not in a list, such as a pair of inputs and labels."""
    if value != () and not isinstance(value, list):
        if _is_plain(value):
            raise PydanticCustomError("given", "expected a list of data sets, as in ['mnist-mini']")
        raise UsageError(f"across is {kind_of(value)}; give a list of data sets, as in across=['mnist-mini']")
    return value


def _models(name: str) -> BeforeValidator:
    """Return a validator of the setting `name` that refuses models that are not in a list."""

    def read(value: object) -> object:
        if not isinstance(value, list | tuple):
            if _is_plain(value):
                raise PydanticCustomError("given", "expected a list of models, as in ['mnist-cnn-hardened']")
            raise UsageError(f"{name} is {kind_of(value)}; give a list of models, as in {name}=[net]")
        return value

    return BeforeValidator(read)


def _threat(value: object) -> ThreatModel:
    """Return the threat model that a user gives, parsed."""
    if _is_plain(value) and not isinstance(value, str) and not _is_number(value):
        raise PydanticKnownError("string_type")
    return threat_of(str(value) if _is_number(value) else value)


def _fractions(value: object) -> object:
    """Parse numbers, from a list or from text such as `0.1,8/255`."""
    if isinstance(value, str):
        return numbers(value, "a list of numbers")
    if isinstance(value, (list, tuple)):
        return [parse_number(v, "a list of numbers") if isinstance(v, str) else v for v in value]
    return value


def numbers_by_feature(path: str, what: str) -> dict[str, Any]:
    """Return the JSON object in a file, from the name or the position of a feature to numbers. `what` is its name in
    error messages.
    """
    text = text_of_file(Path(path), f"file of {what}")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TargetError(
            f"{what} is '@{path}', and {path!r} cannot be read as JSON: {error}; give a file such as "
            '{"age": [0, 120], "hours": [0, 100]}'
        ) from error
    if not isinstance(content, dict) or not content:
        raise TargetError(
            f"{what} is '@{path}', which holds no JSON object; give one from feature to numbers"
        )
    return content


def _bounds(value: object) -> object:
    """Parse bounds: two numbers, two arrays, or a mapping from feature to two numbers, which may be in a file."""
    if isinstance(value, str) and value.startswith("@"):
        value = numbers_by_feature(value[1:], "bounds")
    if isinstance(value, Mapping):
        return {str(feature): _ordered(sides, f"the bounds of {feature}") for feature, sides in value.items()}
    if isinstance(value, str):
        if value.endswith(".json") or Path(value).is_file():
            raise UsageError(
                f"bounds are {value!r}, which is no pair of numbers; the name of a file begins with @",
                Remedy("bounds", f"@{value}"),
            )
        return numbers(value, "bounds")
    if not isinstance(value, Sequence) or len(value) != 2:
        raise UsageError(f"bounds are {value!r}; give two numbers, the lower first, as in 0,1")
    sides = [side if isinstance(side, str | int | float) else _array(side) for side in value]
    if not any(isinstance(side, tuple) for side in sides):
        return _fractions(sides)
    size = max(len(side) for side in sides if isinstance(side, tuple))
    low, high = (side if isinstance(side, tuple) else (float(side),) * size for side in sides)
    if len(low) != len(high):
        raise UsageError(
            f"bounds have {len(low)} lowest and {len(high)} highest values; give one of each per feature"
        )
    for feature, ends in enumerate(zip(low, high, strict=True)):
        _ordered(ends, f"the bounds of feature {feature}")
    return low, high


def _array(side: Any) -> tuple[float, ...]:
    """Return the numbers of an array, a tensor or a sequence with one axis."""
    numbers = side.tolist() if hasattr(side, "tolist") else side
    try:
        return tuple(map(float, numbers if isinstance(numbers, list | tuple) else [numbers]))
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"bounds hold {kind_of(side)} that is no list of numbers; give one number per feature of a table"
        ) from error


def _ordered(sides: object, what: str) -> tuple[float, float]:
    """Return the lowest and the highest value of a feature. They may be equal if the feature does not change."""
    pair = list(sides) if isinstance(sides, list | tuple) else []
    if len(pair) != 2 or not all(isinstance(side, int | float) and isfinite(side) for side in pair):
        raise UsageError(f"{what} are {sides!r}; give two numbers, the lower first, as in [0, 1]")
    if pair[0] > pair[1]:
        raise UsageError(f"{what} are {pair}; give the lower one first")
    return float(pair[0]), float(pair[1])


def _normalised(value: object) -> object:
    """Parse mean and standard deviation, from `0.49,0.48/0.25,0.24` or a pair of numbers or lists of numbers."""
    expected = (
        "expected MEAN/STD, one number per channel, with a positive STD, as in 0.49,0.48,0.45/0.25,0.24,0.26 "
        "(in Python (mean, std))"
    )
    if isinstance(value, str):
        sides: list[object] = list(value.split("/"))
    else:
        sides = list(value) if isinstance(value, Sequence) else []
    if len(sides) != 2:
        raise UsageError(f"data_normalised is {value!r}; {expected}")
    try:
        mean, std = (
            numbers(side, "data_normalised")
            if isinstance(side, str)
            else tuple(map(float, side if isinstance(side, Iterable) else [side]))
            for side in sides
        )
    except (TypeError, ValueError) as error:
        raise UsageError(f"data_normalised is {value!r}; {expected}") from error
    if not (mean and std) or not all(map(isfinite, (*mean, *std))) or not all(number > 0 for number in std):
        raise UsageError(f"data_normalised is {value!r}; {expected}")
    if len({len(mean), len(std)} - {1}) > 1:
        raise UsageError(f"data_normalised has {len(mean)} means and {len(std)} deviations; {expected}")
    return mean, std


def _separator(value: object) -> object:
    """Parse the separator of a table: one character, or `tab`."""
    character = (
        {"tab": "\t", "\\t": "\t", "space": " "}.get(value, value) if isinstance(value, str) else value
    )
    if not isinstance(character, str) or len(character) != 1 or character in '"\r\n':
        raise UsageError(f"separator is {value!r}; expected one character, as in ';', or tab")
    return character


def _input_shape(value: object) -> object:
    """Parse sizes, from a list or from text such as `3,32,32`."""
    sides = value.split(",") if isinstance(value, str) else value
    try:
        shape = tuple(int(side) if isinstance(side, str) else index(side) for side in sides)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        shape = ()
    if not shape or min(shape) < 1:
        raise UsageError(
            f"input_shape is {value!r}; expected the sizes of one example without the batch, as in 3,32,32"
        )
    return shape


def _counts(value: object) -> object:
    """Parse whole numbers, from a number, a list or text such as `1,4,8`, and sort them."""
    parts = value.split(",") if isinstance(value, str) else [value] if isinstance(value, int) else value
    try:
        counts = sorted({int(part) if isinstance(part, str) else index(part) for part in parts})  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        counts = []
    if not counts or counts[0] < 1:
        raise UsageError(f"{value!r} was given; expected whole numbers from 1 on, as in 1,4,8")
    return tuple(counts)


def _unique(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names. Raises `UsageError` for an empty name or one that occurs twice."""
    earlier: set[str] = set()
    for place, name in enumerate(names):
        if not name.strip():
            raise UsageError(f"class name {place} is empty; give one name per class, as in cat,dog")
        if name in earlier:
            raise UsageError(f"the class name {name!r} occurs twice; give one name per class, as in cat,dog")
        earlier.add(name)
    return tuple(names)


def _class_names(value: object) -> object:
    """Parse class names: separated by commas, in a file after @, or in a list."""
    if isinstance(value, str) and value.startswith("@"):
        names = text_of_file(Path(value[1:]), "file of class names").splitlines()
        return _unique([name.strip() for name in names if name.strip()])
    if isinstance(value, str):
        return _unique([name.strip() for name in value.split(",")])
    if isinstance(value, Sequence) and all(type(name) in (str, int) for name in value):
        return _unique([str(name) for name in value])
    return value


def _share(value: object) -> object:
    """Parse a number such as `0.5` or `1/2`."""
    return parse_number(value, "decay") if isinstance(value, str) else value


def _read_by(parse: Callable[[str], object]) -> BeforeValidator:
    """Return a validator that checks text by a parser and keeps it unchanged. A number is checked as its text, and
    other values are left to the type.
    """

    def checked(value: object) -> object:
        if isinstance(value, str) or _is_number(value):
            parse(str(value))
        return value

    return BeforeValidator(checked)


def _waiting_time(value: object, field: ValidationInfo) -> object:
    """Check a duration and keep its text. An error contains the name of the setting."""
    if isinstance(value, str) or _is_number(value):
        seconds(str(value), field.field_name or "time")
    return value


def _delay(value: object, field: ValidationInfo) -> object:
    """Check a duration that may be 0s, and keep its text."""
    try:
        return value if value == "0s" else _waiting_time(value, field)
    except UsageError as error:
        raise UsageError(f"{field.field_name} is {value!r}; expected a duration such as 5s, or 0s") from error


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def parse_tolerance(text: str) -> tuple[float, bool]:
    """Return a tolerance, and whether it is a share of each target, from text such as `10%` or `0.5`. Raises
    `UsageError` for other text.
    """
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise UsageError(
            f"tolerance is {text!r}; give a number above 0 in the units of the targets, as in 0.5, or a share of each "
            "target, as in 10%"
        )
    return (number / 100, True) if text.endswith("%") else (number, False)


def _duration(function: str = "") -> BeforeValidator:
    """Return a validator for a duration, which keeps the text. A number without a unit is refused with the unit of
    seconds. The error contains the name of the setting, which is an argument of `function` if it is given.
    """

    def checked(value: object, field: ValidationInfo) -> object:
        argument = field.field_name or "time"
        try:
            return _waiting_time(value, field)
        except UsageError as error:
            text = str(value).strip()
            with suppress(UsageError):
                seconds(f"{text}s", argument)
                error = UsageError(error.message, Remedy(argument, f"{text}s", function=function))
            raise error from None

    return BeforeValidator(checked)


def _different_files(logs: list[str]) -> list[str]:
    """Refuse logs that are written to the same CSV file."""
    files: dict[Path, str] = {}
    for log in logs:
        kind, place = parse_log(log)
        if kind == "csv" and (other := files.setdefault(Path(place).resolve(), log)) is not log:
            raise UsageError(f"log contains {other} and {log}, which are the same file; give one of them")
    return logs


def _gates(value: object) -> object:
    """Refuse a gate that is not in a list, or that is not valid."""
    if isinstance(value, str):
        gate = with_equality(value)
        parse_gate(gate)
        raise UsageError(
            f"gates is {value!r}; a list was expected", Remedy("gates", (gate,), "--gate", repeated=True)
        )
    return value


def whole(value: object) -> object:
    """Convert any integer type to int, for a validator of strict integers. Text, booleans and 2.0 are not integers."""
    return index(value) if isinstance(value, SupportsIndex) and not isinstance(value, bool) else value


def _place(value: object) -> object:
    """Check the form of a place where shards run; the address is checked when it is connected to."""
    if isinstance(value, str) and value not in ("local", "ray") and not value.startswith("ray://"):
        raise UsageError(f"on is {value!r}; expected local, ray, or ray://HOST:PORT, as in ray://head:10001")
    return value


def _here(value: object) -> object:
    """Refuse a cluster for the steps of a pool."""
    if value == "local":
        return value
    raise UsageError(
        f"on is {value!r}, and {POOL_STAYS}. Models that are no pools are hardened and assessed on Ray",
        Remedy("on"),
    )


def _names(value: object) -> object:
    """Parse names. An entry may contain several, separated by commas, as in `pgd,apgd-t`."""
    if isinstance(value, (list, tuple)) and all(isinstance(entry, str) for entry in value):
        return [name.strip() for entry in value for name in entry.split(",") if name.strip()]
    return value


def _drift_tests(value: object) -> object:
    """Check the names of tests of a stream."""
    tests = _names([value] if isinstance(value, str) else value)
    for name in tests if isinstance(tests, list) else ():
        if name not in DRIFT_TESTS:
            raise UsageError(f"there is no test {name!r}{did_you_mean(str(name), DRIFT_TESTS)}")
    return tests


def is_suite(value: object) -> bool:
    """Return whether a value of the setting `suite` has a valid type, that is whether it is a string or a list of
    strings.
    """
    return isinstance(value, str) or (
        isinstance(value, (list, tuple)) and all(isinstance(entry, str) for entry in value)
    )


def _suite(value: object) -> object:
    """Return the canonical name of a suite, or those of attacks from `pgd,square` or a list."""
    if isinstance(value, str):
        return suite_or_attacks([value])
    if isinstance(value, Iterator):
        return tuple(value)
    return suite_or_attacks(cast(Sequence[str], value)) if is_suite(value) else value


def _accepted(value: object) -> object:
    for name, reason in value.items() if isinstance(value, Mapping) else ():
        if name not in names("doubts"):
            raise UsageError(f"there is no doubt {name!r}{did_you_mean(str(name), names('doubts'))}")
        if reason is None or not str(reason).strip():
            raise UsageError(
                f"the doubt {name} is accepted without a reason",
                Remedy(
                    "accept_doubts",
                    Placeholder(f"{name}=REASON", f"{{{str(name)!r}: REASON}}"),
                    "--accept-doubt",
                ),
            )
    return value


def _surrogate(value: object, validated: ValidatorFunctionWrapHandler, role: str = "surrogate") -> object:
    """Return the settings of a surrogate or of a member, and a Python object unchanged."""
    surrogate = parse_surrogate(str(value), role) if isinstance(value, str | Path) else value
    if isinstance(surrogate, int | float | list | None):
        raise _NOT_GIVEN
    of_settings = isinstance(surrogate, Mapping) and isinstance(surrogate.get("model"), str)
    if not of_settings and not _is_plain(surrogate):
        return surrogate
    if (
        isinstance(surrogate, Mapping)
        and surrogate.get("decay") is not None
        and surrogate.get("skip") is None
    ):
        raise UsageError(
            f"the {role} {surrogate.get('model')} has decay={surrogate['decay']} but no residual branches; give "
            "the last module of each, as in skip=layer*.*.bn2, or leave decay out"
        )
    return validated(surrogate)


SuiteSpec = Annotated[Any, BeforeValidator(_suite), WithJsonSchema({"type": "string"})]
Given = Annotated[Any, BeforeValidator(_given), WithJsonSchema({"type": "string"})]
"""Address of a model or data, or a Python object."""
ExampleGroups = Annotated[
    Any,
    BeforeValidator(lambda value: str(value) if isinstance(value, int) else value),
    WithJsonSchema({"type": "string"}),
]
"""Name of a column or of an array, or in Python an array."""
PathText = Annotated[str, BeforeValidator(_path_text)]
Others = Annotated[list[Given], BeforeValidator(_data_sets)]
Numbers = Annotated[tuple[float, ...], BeforeValidator(_fractions)]
Normalised = Annotated[tuple[tuple[float, ...], tuple[float, ...]], BeforeValidator(_normalised)]
Bounds = Annotated[
    tuple[float, float] | tuple[tuple[float, ...], tuple[float, ...]] | dict[str, tuple[float, float]],
    BeforeValidator(_bounds),
]
Counts = Annotated[tuple[int, ...], BeforeValidator(_counts)]
InputShape = Annotated[tuple[int, ...], BeforeValidator(_input_shape)]
Separator = Annotated[str, BeforeValidator(_separator)]
ClassNames = Annotated[tuple[str, ...], MinLen(2), BeforeValidator(_class_names)]
Whole = Annotated[StrictInt, Ge(0), BeforeValidator(whole)]
Positive = Annotated[StrictInt, Ge(1), BeforeValidator(whole)]
Classes = Annotated[StrictInt, Ge(2), BeforeValidator(whole)]
Names = Annotated[list[str], BeforeValidator(_names)]
DriftTests = Annotated[list[str], MinLen(1), BeforeValidator(_drift_tests)]
Threat = Annotated[
    ThreatModel,
    GetPydanticSchema(
        lambda _source, _handler: no_info_plain_validator_function(
            _threat, serialization=to_string_ser_schema(when_used="always")
        )
    ),
    WithJsonSchema({"type": "string"}),
]
Transform = Annotated[str, _read_by(parse_transform)]
GENERATOR_METRICS = AUDITS["hardened-generator"].metrics
"""Metrics of the audits of a generator before and after its training."""
Gates = Annotated[
    list[
        Annotated[
            str,
            _read_by(
                partial(
                    parse_gate, metrics=GATED | {*GENERATOR_METRICS, *CONTROL.metrics, *CONTROL.certified}
                )
            ),
        ]
    ],
    BeforeValidator(_gates),
]
Until = Annotated[str, _read_by(parse_until)]
Duration = Annotated[str, _duration()]
Timeout = Annotated[str, _duration("open_model")]
WaitingTime = Annotated[str, BeforeValidator(_waiting_time)]
Delay = Annotated[str, BeforeValidator(_delay)]
Place = Annotated[str, BeforeValidator(_place)]
Here = Annotated[str, BeforeValidator(_here)]
Amount = Annotated[float, Ge(0), Le(1024)]
Deviation = Annotated[float, Gt(0), Le(1e6)]
Probability = Annotated[float, Gt(0), Lt(1)]
Rate = Annotated[str, _read_by(per_second)]
LogTargets = Annotated[list[Annotated[str, _read_by(parse_log)]], AfterValidator(_different_files)]
ReleasedScores = Annotated[str, _read_by(parse_scores)]
Every = Annotated[str, _read_by(parse_every)]
Tolerance = Annotated[str, _read_by(parse_tolerance)]
Header = Annotated[str, _read_by(header_variable)]
Reasons = Annotated[dict[str, str], BeforeValidator(_accepted)]


class SurrogateSettings(BaseModel):
    """A surrogate model of the attacker, with the same kind of input as the model under test."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), strict=False)

    model: str = Field(description="an address, as for the model under test")
    arch: str | None = Field(default=None, description="architecture of a state dict")
    model_args: dict[str, str] = Field(default_factory=dict, description="arguments of the factory")
    mean: Numbers | None = Field(default=None, description="subtracted from the input inside the surrogate")
    std: Numbers | None = Field(default=None, description="divides the input inside the surrogate")
    skip: str | None = Field(
        default=None, description="skip gradients: the last modules of residual branches, as in layer*.*.bn2"
    )
    decay: Annotated[float, Ge(0), Le(1), BeforeValidator(_share)] | None = Field(
        default=None, description="share of their gradient that is kept (by default 0.5)"
    )


def _method(value: object) -> object:
    """Check the name of a method of certification."""
    name = value.lower().replace("_", "-") if isinstance(value, str) else value
    methods = (AUTO, *names("certifiers"))
    if isinstance(name, str) and name not in methods:
        raise UsageError(f"there is no method {value!r}{did_you_mean(name, methods)}")
    return name


def _named_spec(kind: str, usual: str, every: Callable[[], Sequence[str]]) -> Callable[[object], object]:
    """Return a validator for one of the names that `every` returns, or a mapping with the name in `use:`."""

    def read(value: object) -> object:
        spec = {"use": value} if isinstance(value, str) else value
        if isinstance(spec, Mapping):
            name, known = str(spec.get("use", usual)), every()
            if name.lower() not in known:
                raise UsageError(f"there is no {kind} {name!r}{did_you_mean(name.lower(), known)}")
            return {**spec, "use": name.lower()}
        if _is_plain(spec):
            raise PydanticCustomError("name", "expected a name, or settings with it, as in {use: NAME}")
        return spec

    return read


def written_fields(cls: type[Any]) -> list[dataclasses.Field[Any]]:
    """Return those fields of a dataclass of settings that a configuration file may set."""
    return [f for f in dataclasses.fields(cls) if f.metadata.get("written", True)]


def _refused_for_sets(value: object) -> object:
    """Return a recipe unchanged. Raises `UsageError` for one that trains generators."""
    name = value.get("use") if isinstance(value, Mapping) else value
    if str(name).lower() in GENERATOR_RECIPES:
        raise UsageError(
            f"the recipe {name} trains generators, and only classifiers are rotated; name a recipe for classifiers, or "
            "train the generator with holdfast harden",
            Remedy("recipe", "standard"),
        )
    return value


Method = Annotated[str, BeforeValidator(_method)]
RecipeSpec = Annotated[
    dict[str, Any],
    WrapValidator(lambda value, validated: validated(value) if _is_plain(value) else value),
    BeforeValidator(
        _named_spec(
            "recipe", AUTO, lambda: [*names("recipes"), AUTO, CARD, *GENERATOR_RECIPES, *POLICY_RECIPES]
        )
    ),
]
"""Name or settings of a recipe, or a Python object."""
SetsRecipeSpec = Annotated[
    dict[str, Any],
    BeforeValidator(_named_spec("recipe", CARD, lambda: [*names("recipes"), AUTO, CARD])),
    BeforeValidator(_refused_for_sets),
]
SourceSpec = Annotated[dict[str, Any], BeforeValidator(_named_spec("source", "basins", lambda: [*SOURCES]))]
Surrogates = Annotated[list[Annotated[SurrogateSettings, WrapValidator(_surrogate)]], _models("surrogates")]
Members = Annotated[
    list[
        Annotated[
            SurrogateSettings,
            WrapValidator(lambda value, validated: _surrogate(value, validated, "member")),
        ]
    ],
    _models("members"),
]
