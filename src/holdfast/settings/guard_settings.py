"""The settings of a guard, which are the keys of a guard.yaml. The module imports pydantic, but not torch."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_type_hints

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import BaseModel, BeforeValidator, Field, Strict, ValidationError, create_model

from holdfast.core import catalogue
from holdfast.core.errors import UsageError
from holdfast.core.names import did_you_mean, parse_number
from holdfast.settings.grammar import seconds
from holdfast.settings.groups import Flag, SettingGroup
from holdfast.settings.texts import complaint, load, place
from holdfast.settings.values import (
    Given,
    InputKind,
    Numbers,
    Positive,
    Probability,
    Whole,
    whole,
    written_fields,
)

if TYPE_CHECKING:
    from holdfast.guard.detectors.outputs import Detector

ModeName = Literal["observe", "shadow", "enforce"]
ActionName = Literal["allow", "flag", "label_only", "abstain", "delay", "block"]
DataType = Literal["float32", "float64", "float16", "bfloat16", "uint8", "int8", "int16", "int32", "int64"]

SQLITE, ENVIRONMENT = "sqlite:", "env:"
"""beginnings of the address of a state: of a file, and of an environment variable with an address"""

GUARD_KEYS = ("rules", "inputs")
"""keys that a guard.yaml contains and a holdfast.yaml does not"""


def _defaults(value: object) -> object:
    """Take a key without a value, as in `energy:`, for one with default settings."""
    return {} if value is None else value


def _eps(value: object) -> object:
    return parse_number(value, "eps") if isinstance(value, str) else value


def _numbers(value: object) -> object:
    return (value,) if isinstance(value, int | float) and not isinstance(value, bool) else value


Ends = Annotated[Numbers, BeforeValidator(_numbers), MinLen(1)]
Bits = Annotated[Whole, Le(16)]
Window = Annotated[Whole, Le(15)]
Size = Annotated[int, Ge(1)]


class RuleSettings(SettingGroup):
    """Settings that all rules have."""

    mode: ModeName | None = Field(default=None, description="Mode of the rule; that of the file by default.")
    action: ActionName = Field(
        default="flag", description="What is done with an input on which the rule fires."
    )


class CheckSettings(RuleSettings):
    """Settings of the rules that refuse invalid requests: `schema` and `range`."""

    action: ActionName = Field(default="block", description=RuleSettings.model_fields["action"].description)


class ScoredSettings(RuleSettings):
    """Settings of a rule whose threshold is calibrated."""

    threshold: float | None = Field(
        default=None,
        description="Score above which the rule fires; set by the calibration if it is left out, before which the rule "
        "only reports.",
    )


class QueriesSettings(ScoredSettings):
    """Settings of the rule `queries`, the stateful query detector."""

    threshold: Annotated[float, Gt(0)] | None = Field(
        default=None,
        description="Weighted number of near duplicates from which queries are suspicious; default 10.",
    )
    eps: Annotated[float, Gt(0), BeforeValidator(_eps)] = Field(
        default=8 / 255,
        description="Largest change of a value, with inputs scaled to [0, 1], that attacks are expected to make; the "
        "calibrated radius covers no larger changes (default: 8/255). Of files and texts, the share of all runs of "
        "three bytes or characters that a change replaces.",
    )
    radius: Annotated[float, Gt(0)] | None = Field(
        default=None,
        description="Distance up to which inputs, scaled to [0, 1], are near duplicates; set by the calibration if it "
        "is left out, before which the rule only reports. Files and texts have distances from 0 to 1.4, see eps.",
    )
    cameras: bool = Field(
        default=False,
        description="Whether any number of nearly equal images is accepted, as from a camera that does not move or in "
        "several encodings. Attacks with changes that are as small are then not detected (default: false).",
    )
    action: ActionName = Field(default="block", description=RuleSettings.model_fields["action"].description)


class RulesSettings(SettingGroup):
    """The rules of a guard. A rule that is not named is not evaluated."""

    schema_: Annotated[CheckSettings | None, BeforeValidator(_defaults)] = Field(
        default=None, alias="schema", description="Refuses inputs of another shape or data type."
    )
    range: Annotated[CheckSettings | None, BeforeValidator(_defaults)] = Field(
        default=None, description="Refuses values outside the range, NaN and infinity."
    )
    queries: Annotated[QueriesSettings | None, BeforeValidator(_defaults)] = Field(
        default=None, description="Detects sequences of similar queries, as attacks send them."
    )

    @property
    def detectors(self) -> dict[str, ScoredSettings]:
        """Settings of the rules of stateless detectors, by name. Each detector of the catalogue has a key."""
        return {name: group for name, group in self if name not in RulesSettings.model_fields and group}


_RESERVED = {info.alias or name for name, info in RulesSettings.model_fields.items()} | {"detectors"}
"""Names of rules that no detector of another package replaces."""


class InputSettings(SettingGroup):
    """The inputs that the model accepts."""

    kind: InputKind = Field(
        default="numbers", description="What a request contains: numbers, files or texts."
    )
    shape: Annotated[tuple[Size | None, ...], MinLen(1)] = Field(
        description="Sizes of one input without the batch; null where any size is accepted. Of files and texts, the "
        "largest number of bytes or characters."
    )
    dtype: DataType = Field(default="float32", description="Data type of the inputs.")
    low: Ends = Field(default=(0.0,), description="Lowest valid value: a number, or one for each channel.")
    high: Ends = Field(default=(1.0,), description="Highest valid value: a number, or one for each channel.")


class DefenceSettings(SettingGroup):
    """Squeezes of the inputs before the model."""

    bits: Bits = Field(default=0, description="Bits of each value; 0 leaves values unchanged.")
    median: Window = Field(default=0, description="Side of the median filter in pixels; 0 leaves it out.")


class StateSettings(SettingGroup):
    """State of the query detector, which all processes of a server share."""

    at: str = Field(
        default="sqlite:guard-state.sqlite",
        description="sqlite:FILE, relative to this file, for the processes of one machine; redis://HOST:6379/0 for "
        "several machines; env:VARIABLE with such an address; or memory, for one process.",
    )
    on_loss: Literal["closed", "open"] = Field(
        default="closed",
        description="What happens to queries while the state cannot be reached: if the rule is in mode enforce with "
        "another action than flag, closed refuses them (status 503); open lets them pass.",
    )
    half_life: str = Field(default="24h", description="Time after which a query counts half.")


class StoreSettings(SettingGroup):
    """Storage of the inputs of clients."""

    inputs: Literal["none", "flagged"] = Field(
        default="none", description="Inputs that are stored, encrypted: none, or those on which a rule fired."
    )
    folder: str = Field(default="guard-inputs", description="Folder of the encrypted inputs.")
    retention_days: Positive = Field(default=30, description="Days after which stored inputs are deleted.")
    max_mb: Positive = Field(
        default=1024, description="Size of the folder above which the oldest are deleted."
    )


class GuardSettings(SettingGroup):
    """All settings of a guard."""

    schema_version: Literal[1] = Field(default=1, description="Version of the format of this file.")
    mode: ModeName = Field(default="observe", description="Mode of all rules that state no other.")
    inputs: InputSettings = Field(description="The inputs that the model accepts.")
    outputs: Literal["logit", "probability"] = Field(
        default="logit", description="What the model returns: logits or probabilities."
    )
    false_positives: Probability = Field(
        default=0.001, description="Share of benign inputs on which a calibrated rule may fire."
    )
    rules: RulesSettings = Field(description="The rules, by name.")
    defence: DefenceSettings = Field(
        default_factory=DefenceSettings, description="Squeezes of the inputs before the model."
    )
    state: StateSettings = Field(
        default_factory=StateSettings, description="State of the query detector, which all processes share."
    )
    delay: str = Field(default="1s", description="Time by which the action delay delays a response.")
    calibration: str | None = Field(
        default=None,
        description="File of the calibration. Default: the name of this file with .calibration.json.",
    )
    store: StoreSettings = Field(
        default_factory=StoreSettings, description="Storage of the inputs of clients."
    )


class CalibrateOptions(SettingGroup):
    """Settings of the command `holdfast calibrate` that no other command has."""

    false_positives: Annotated[Probability | None, Flag("P", common=True)] = Field(
        default=None,
        description="Share of benign inputs on which the rules may fire (default: that of the guard).",
    )
    fit: Annotated[Given | None, Flag("DATA", completion="DATA", common=True)] = Field(
        default=None,
        description="Examples on which detectors are fitted (default: a random fifth of DATA, which then sets no "
        "threshold).",
    )


def read_guard_settings(path: Path) -> GuardSettings:
    """Return the settings in a guard.yaml. Raises `TargetError` if it cannot be read, and `UsageError` with the first
    invalid key.
    """
    return check_guard_settings(load(path), str(path))


def check_guard_settings(content: Mapping[str, Any], where: str) -> GuardSettings:
    """Return the validated settings of a guard. Raises `UsageError`, which begins with `where`, for the first invalid
    key.
    """
    try:
        settings = _with_detectors().model_validate(dict(content))
        detectors = detectors_of(settings)
    except ValidationError as error:
        raise UsageError(f"{where}: {_fault(error)}") from None
    except UsageError as error:  # of a value that a parser or a detector refuses
        raise error.reworded(f"{where}: {error.message}") from None
    _refuse_contradictions(settings, detectors, where)
    return settings


def _with_detectors() -> type[GuardSettings]:
    """The settings of a guard, with the key of a rule for each detector of the catalogue and of other packages."""
    keys: dict[str, Any] = {
        name: (Annotated[_settings_of(name) | None, BeforeValidator(_defaults)], None)
        for name in catalogue.names("detectors")
        if name not in _RESERVED
    }
    rules = create_model("RulesSettings", __base__=RulesSettings, **keys)
    return create_model("GuardSettings", __base__=GuardSettings, rules=(rules, ...))


def _settings_of(detector: str) -> type[ScoredSettings]:
    """The settings of the rule of a detector: those of every scored rule, and the fields of its class."""
    cls = catalogue.load("detectors", detector, type)
    if not is_dataclass(cls):
        raise catalogue.foreign("detectors", detector, f"is {cls!r}; expected a dataclass")
    hints = get_type_hints(cls, include_extras=True)
    keys: dict[str, Any] = {}
    for f in written_fields(cls):
        is_whole = type(f.default) is int  # text, booleans and 2.0 are not integers
        hint = Annotated[hints[f.name], BeforeValidator(whole), Strict()] if is_whole else hints[f.name]
        keys[f.name] = hint, f.default
    return create_model(f"{cls.__name__}Settings", __base__=ScoredSettings, **keys)


def detectors_of(settings: GuardSettings) -> dict[str, "Detector"]:
    """Return the stateless detectors of a guard, before their fit, by the names of their rules.

    Raises `UsageError` if a detector refuses its settings.
    """
    ends = {"low": min(settings.inputs.low), "high": max(settings.inputs.high)}
    detectors = {}
    for name, group in settings.rules.detectors.items():
        cls, chosen = catalogue.load("detectors", name, type), group.model_dump()
        of_inputs = {f.name: ends[f.name] for f in fields(cls) if f.name in ends}
        try:
            detectors[name] = cls(**{f.name: chosen[f.name] for f in written_fields(cls)}, **of_inputs)
        except UsageError as error:
            raise error.reworded(f"rules.{name}: {error.message}") from None
    return detectors


def is_state(at: str) -> bool:
    """Return whether a text is the address of a state of the query detector."""
    return at == "memory" or (at.startswith((SQLITE, "redis://", "rediss://")) and at != SQLITE)


def is_guard(content: Mapping[str, Any]) -> bool:
    """Return whether the content of a YAML file is that of a guard.yaml, and not of a holdfast.yaml."""
    return any(key in content for key in GUARD_KEYS)


def _fault(error: ValidationError) -> str:
    kind, *_ = (details["type"] for details in error.errors())
    where = place(error)
    if kind == "missing":
        example = {"inputs": "inputs: {shape: [3, 32, 32]}", "rules": "rules: {energy: {}}"}
        return f"{where} is missing; give it, as in {example.get(where, 'shape: [3, 32, 32]')}"
    if kind == "extra_forbidden":
        parent, _, key = where.rpartition(".")
        prefix = f"{parent}: " if parent else ""
        return f"{prefix}unknown key {key!r}{did_you_mean(key, _keys(parent))}"
    return f"{where} {complaint(error)}"


def _keys(path: str) -> list[str]:
    """The keys of the group of settings at a dotted path."""
    group: type[BaseModel] = _with_detectors()
    for key in path.split(".") if path else ():
        field = next(info for name, info in group.model_fields.items() if key in (name, info.alias))
        kinds = [
            field.annotation,
            *(inner for arg in get_args(field.annotation) for inner in (arg, *get_args(arg))),
        ]
        group = next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))
    return [info.alias or name for name, info in group.model_fields.items()]


def _refuse_contradictions(settings: GuardSettings, detectors: Mapping[str, "Detector"], where: str) -> None:
    """Raise `UsageError` if settings of a guard contradict each other."""
    inputs, rules = settings.inputs, settings.rules
    seconds(settings.delay, f"{where}: delay")
    seconds(settings.state.half_life, f"{where}: state.half_life")
    at = settings.state.at
    if not is_state(at) and not (at.startswith(ENVIRONMENT) and at.removeprefix(ENVIRONMENT).isidentifier()):
        raise UsageError(
            f"{where}: state.at is {at!r}; expected sqlite:FILE, redis://HOST:6379/0, env:VARIABLE or memory"
        )
    if len(inputs.low) != len(inputs.high) and 1 not in (len(inputs.low), len(inputs.high)):
        raise UsageError(
            f"{where}: inputs.low has {len(inputs.low)} numbers and inputs.high {len(inputs.high)}; give one, or one "
            "for each channel"
        )
    low, high = (
        (end * n)[:n]
        for end, n in ((e, max(len(inputs.low), len(inputs.high))) for e in (inputs.low, inputs.high))
    )
    if not all(a < b for a, b in zip(low, high, strict=True)):
        raise UsageError(
            f"{where}: inputs.low is {inputs.low} and inputs.high {inputs.high}; low must be below high"
        )
    if inputs.kind != "numbers":
        _refuse_numeric(settings, detectors, where)
    if not inputs.dtype.startswith(("float", "bfloat")):
        changing = [f"rules.{name}" for name, detector in detectors.items() if "network" in detector.needs]
        for name in (*(["defence"] if any(settings.defence.model_dump().values()) else []), *changing):
            raise UsageError(
                f"{where}: {name} changes values of the inputs, and inputs.dtype is {inputs.dtype}; remove it, "
                "or let the guard see the inputs after their conversion to float32"
            )
    for name, group in (
        ("defence", settings.defence),
        *((f"rules.{name}", group) for name, group in rules.detectors.items()),
    ):
        median = group.model_dump().get("median")
        if median and len(inputs.shape) != 3:
            raise UsageError(
                f"{where}: {name}.median is {median}, and inputs of shape {list(inputs.shape)} are not images; "
                "set it to 0"
            )
    if not rules.model_fields_set:
        raise UsageError(f"{where}: rules is empty; name at least one, as in rules: {{energy: {{}}}}")


def _refuse_numeric(settings: GuardSettings, detectors: Mapping[str, "Detector"], where: str) -> None:
    """Raise `UsageError` for the first setting of a guard of files or of texts that needs inputs of numbers."""
    inputs, rules, kind = settings.inputs, settings.rules, settings.inputs.kind
    if len(inputs.shape) != 1:
        unit = "bytes of a file" if kind == "files" else "characters of a text"
        raise UsageError(
            f"{where}: inputs.shape is {list(inputs.shape)}, and inputs.kind is {kind}; give the largest number of "
            f"{unit}, as in shape: [65536]"
        )
    of_numbers = [f"inputs.{name}" for name in ("dtype", "low", "high") if name in inputs.model_fields_set]
    of_numbers += ["rules.range"] if rules.range is not None else []
    of_numbers += ["rules.queries.cameras"] if rules.queries is not None and rules.queries.cameras else []
    of_numbers += ["defence"] if settings.defence.bits or settings.defence.median else []
    of_numbers += [
        f"rules.{name}"
        for name, detector in detectors.items()
        if "network" in detector.needs or rules.detectors[name].model_dump().get("on") == "inputs"
    ]
    if of_numbers:
        raise UsageError(
            f"{where}: {of_numbers[0]} needs inputs of numbers, and inputs.kind is {kind}; remove it. Rules for {kind} "
            "are schema (length), queries (similar requests), energy, and mahalanobis with on: logits"
        )
