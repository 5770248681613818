"""Parsers for the values of command-line flags, such as `linf:8/255`. The module does not import torch, so that
mistakes are reported immediately.

Numbers may be fractions (`8/255`); durations are `60s`, `10min`, `24h`; a threat model is `linf:8/255`,
`corruptions:3`, `patch:5x5,at=centre`, `spatial:rotate=30,shift=3`, `spatial:flow=1.5`,
`colour:hue=18,saturation=0.3`, `table:rules.yaml`, `text:edits=2,words=3`, `trigger:drill.trigger.npz` or
`training-set:20`, followed by any of `goal=targeted:K`, `access=none|labels|scores|gradients` and `queries=N`,
separated by commas or spaces. `unit=range`, `unit=std` and `unit=@FILE` state the unit of the eps of a norm for each
feature.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from types import MappingProxyType
from typing import Any, Final, Literal, get_args

from holdfast.core.errors import UsageError
from holdfast.core.names import MOST_SCALED, limits_text, refuse_mixed, refuse_text_limits, threat_text
from holdfast.core.remedies import Remedy
from holdfast.core.spelling import suggestion

Sees = Literal["none", "labels", "scores", "gradients"]
Argument = float | str
LogKind = Literal["csv", "tensorboard", "mlflow", "wandb"]

_MOVED = {"rotate": 180.0, "shift": math.inf, "scale": MOST_SCALED}  # a rotation by up to 180 degrees is any
_SPATIAL: Final[Mapping[str, float]] = {**_MOVED, "flow": math.inf}
_COLOUR: Final[Mapping[str, float]] = {"hue": 180.0, "saturation": 1.0, "brightness": 1.0, "contrast": 1.0}
"""Largest value of each image transformation that a threat model may allow."""

SEEN: Final[Mapping[str, float]] = {
    **_MOVED,
    "perspective": 0.5,
    **_COLOUR,
    "blur": 10.0,
    "noise": 1.0,
}
"""Random transformations that may be applied to the inputs of a model, with the largest value of each."""

_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}
_SIZE = re.compile(
    r"\s*(norm=)?(?P<norm>linf|l2|l1|l0)?[=:,(\s]*(eps(ilon)?\s*[=:]\s*)?"
    r"(?P<size>\d*\.?\d+(e-?\d+)?(\s*/\s*\d+)?(px)?)\s*\)?(?P<rest>([,\s].*)?)",
    re.IGNORECASE,
)
"""pattern of an eps without a norm, or with another sign than a colon after the norm"""
_PARTS = re.compile(r"""(?:"[^"]*"|'[^']*'|[^,\s])+""")
"""pattern of the parts of a threat, which commas and spaces separate, except between quotes"""


@dataclass(frozen=True)
class Form:
    """A form of threat models in text: `NAME:VALUE,ARGUMENT=VALUE`."""

    constraint: str
    """module and name of the class of its constraint, which is not imported before it is needed"""
    value: Callable[[str, str], Mapping[str, Argument]] | None = None
    """function that reads the text after the colon; its second argument is the whole text, for messages. The result
    are arguments of the class. Without it, arguments follow the colon"""
    arguments: Mapping[str, Callable[[str], Argument]] = field(default_factory=lambda: MappingProxyType({}))
    """functions that read the values of further arguments, by name"""
    written: Callable[[Any], str] = str
    """function that returns the text after the colon for a constraint; empty for none"""
    example: str = ""
    """text of a threat, for messages"""
    units: bool = False
    """whether the size may be in a unit of each feature"""
    aimed: bool = True
    """whether the attacker may have a target class"""
    goal: Callable[[Any], int | None] = lambda _: None
    """function that returns the target class that a constraint states itself; None for none"""

    @property
    def cls(self) -> Callable[..., Any]:
        """Class of the constraint."""
        module, _, name = self.constraint.partition(":")
        found: Callable[..., Any] = getattr(import_module(module), name)
        return found


@dataclass(frozen=True)
class ThreatSpec:
    """A threat model parsed from text."""

    norm: str
    """name of its form"""
    arguments: Mapping[str, Argument] = field(default_factory=lambda: MappingProxyType({}))
    """arguments of the class of its constraint"""
    goal: int | None = None
    goal_name: str = ""
    """name of the target class, if its number is known from the data only"""
    access: Sees = "gradients"
    queries: int | None = None
    unit: str = ""
    """unit of eps: `range`, `std` or `@FILE`; empty for the unit of the inputs"""

    @property
    def eps(self) -> float:
        """Size of the change. It is infinite if the attacks search for the smallest change that breaks an example."""
        return float(self.arguments.get("eps", self.arguments.get("changes", 1.0)))

    def with_change(self, change: str) -> str:
        """Return the text of this threat model with another change, such as `l2:0.5`, in the unit of the inputs."""
        return threat_text(change, self.goal, self.access, self.queries)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of an error message for an unknown word: the most similar known word, or all known words if none
    is similar.
    """
    names = sorted(known)
    return f"; {suggestion(name, names) or 'expected one of ' + ', '.join(names)}"


def parse_number(text: str, what: str) -> float:
    """Return the number in a text, which is a decimal number or a fraction. `what` is its name in error messages."""
    matched = re.fullmatch(r"\s*([^/\s]+)\s*(?:/\s*([^/\s]+))?\s*", text)
    try:
        if matched is None:
            raise ValueError
        value = float(matched[1]) / (float(matched[2]) if matched[2] else 1.0)
    except (ValueError, ZeroDivisionError):
        raise UsageError(
            f"{what} is {text!r}; expected a number or a fraction, such as 0.3 or 8/255"
        ) from None
    if math.isnan(value):  # `float` accepts the text "nan"
        raise UsageError(f"{what} is {text!r}; expected a number or a fraction, such as 0.3 or 8/255")
    return value


def numbers(text: str, what: str) -> tuple[float, ...]:
    """Return the numbers in a text such as `0.5,8/255`, which are separated by commas. `what` is the name of the text
    in error messages.
    """
    return tuple(parse_number(part, what) for part in text.split(","))


def seconds(text: str, what: str) -> float:
    """Return the number of seconds of a duration such as `60s`, `10min` or `24h`. `what` is its name in
    error messages.
    """
    matched = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|min|h)\s*", text)
    if matched is None or float(matched[1]) <= 0:
        raise UsageError(f"{what} is {text!r}; expected a duration above 0, such as 60s, 10min or 24h")
    return float(matched[1]) * _UNITS[matched[2]]


def per_second(text: str, what: str = "http_rate") -> float:
    """Return the number per second of a rate such as `4/s`, `100/min` or `2000/h`. `what` is its name in messages."""
    matched = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*/\s*(s|min|h)\s*", text)
    if matched is None or not 0 < float(matched[1]) < math.inf:
        raise UsageError(f"{what} is {text!r}; expected a number in a time, such as 4/s, 100/min or 2000/h")
    return float(matched[1]) / _UNITS[matched[2]]


_REMOTE_STORES = ("databricks", "databricks-uc", "uc")
"""Addresses of MLflow without a scheme that are servers."""


def parse_log(text: str) -> tuple[LogKind, str]:
    """Return the kind and the place of a log of a training, such as the file in `csv:curve.csv`."""
    kind, _, place = text.partition(":")
    for known in get_args(LogKind):
        if kind == known and place:
            _refuse_password(kind, place)
            return known, place
    raise UsageError(
        f"log is {text!r}; expected csv:FILE, tensorboard:DIR, mlflow:URI or wandb:PROJECT, as in csv:curve.csv"
    )


def _refuse_password(kind: str, place: str) -> None:
    """Raise `UsageError` for the address of a log with a password, or a user name of a web server, because the address
    is stored with the run.
    """
    scheme, separator, rest = place.partition("://")
    user, at, host = rest.rpartition("@")
    of_server = scheme.lower() in ("http", "https")
    if not separator or not at or not (of_server or ":" in user):
        return
    if kind == "mlflow" and of_server:
        remedy = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment"
    else:
        remedy = "give it in the environment, as in PGPASSWORD for PostgreSQL"
    raise UsageError(
        f"the address of the log {kind}:{scheme}://…@{host} contains a user name or a password, and would be stored "
        f"with the run; give {kind}:{scheme}://{host if of_server else f'USER@{host}'} and {remedy}"
    )


def is_remote_log(text: str) -> bool:
    """Return whether a log of a training is sent over the network, and not written to a file of this machine."""
    kind, place = parse_log(text)
    if kind == "mlflow":
        scheme, separator, rest = place.partition(":")
        local = scheme in ("file", "sqlite") and (not rest.startswith("//") or rest.startswith("///"))
        return not local and (bool(separator) or place in _REMOTE_STORES)
    return kind == "wandb" or (kind == "tensorboard" and "://" in place)


def parse_every(text: str) -> tuple[Literal["answers", "seconds"], float]:
    """Return the kind and the threshold of a trigger that swaps the serving parameter set, parsed from a text such as
    `24h`.

    `50q/principal` swaps after 50 answers to one principal, and `24h` after that time.
    """
    count = re.fullmatch(r"\s*(\d+)\s*q/principal\s*", text)
    if count is not None and int(count[1]) > 0:
        return "answers", int(count[1])
    try:
        return "seconds", seconds(text, "every")
    except UsageError:
        raise UsageError(
            f"every is {text!r}; expected answers to one principal or a duration, as in 50q/principal or 24h"
        ) from None


def parse_scores(text: str) -> None:
    """Check what clients receive of scores: `all`, `labels`, or a number of decimal digits."""
    if text not in ("all", "labels") and not re.fullmatch(r"\d|1[0-5]", text):
        raise UsageError(
            f"scores is {text!r}; expected all, labels, or a number of decimal digits up to 15, as in 2"
        )


def parse_threat(text: str) -> ThreatSpec:
    """Return the threat model in a text such as `linf:8/255,access=scores,queries=5000`. Raises `UsageError`, with the
    right spelling if the text contains an eps without a norm or without the colon.
    """
    try:
        return _threat(text)
    except UsageError:
        spelling = _with_colon(text)
        if not spelling:
            raise
        raise UsageError(
            f"the threat is {text!r}; a norm, a colon and a size were expected", Remedy("threat", spelling)
        ) from None


def _with_colon(text: str) -> str:
    """Return a text such as `linf=0.1`, `l2,eps=0.5` or `8/255` as a threat, with the norm linf if it contains none, or
    an empty string for any other text.
    """
    matched = _SIZE.fullmatch(text)
    if matched is None:
        return ""
    spelling = f"{(matched['norm'] or 'linf').lower()}:{''.join(matched['size'].split())}{matched['rest']}"
    try:
        _threat(spelling)
    except UsageError:
        return ""
    return spelling


def _threat(text: str) -> ThreatSpec:
    parts = _PARTS.findall(text)
    if not parts:
        raise UsageError("the threat is empty; expected a norm and a size, such as linf:8/255")
    first, *others = parts
    name, _, value = first.partition(":")
    name = name.lower()
    if name not in FORMS:
        raise UsageError(f"the threat {first!r} has no known norm{did_you_mean(name, FORMS)}")
    form = FORMS[name]
    spec = ThreatSpec(name, {}) if form.value is None else ThreatSpec(name, form.value(value, first))
    for part in others if form.value else (value, *others):
        key, equals, content = part.partition("=")
        if key in form.arguments and (equals or part is not value):
            spec = replace(spec, arguments={**spec.arguments, key: form.arguments[key](content)})
        elif form.value is None and part is value:
            given = f"the limit {part!r}" if part else "no limits"
            raise UsageError(
                f"the threat {name} has {given}; expected any of {', '.join(form.arguments)}, as in {form.example}"
            )
        else:
            spec = _condition(spec, part)
    refuse_mixed(spec.arguments)
    if name == "text":
        refuse_text_limits(spec.arguments)
    return spec


def _eps(text: str, threat: str) -> Mapping[str, Argument]:
    """Read the eps of a norm; without one it is infinite."""
    if ":" not in threat:
        return {"eps": math.inf}
    eps = parse_number(text, f"eps in {threat!r}")
    if eps < 0:
        raise UsageError(f"eps is {eps:g} in {threat!r}; it must be 0 (clean accuracy) or more")
    return {"eps": eps}


def _count(text: str, threat: str) -> Mapping[str, Argument]:
    """Read the number of values or pixels that may change."""
    per_pixel = text.endswith("px")
    eps = float(_eps(text.removesuffix("px"), threat)["eps"])
    if (per_pixel and math.isinf(eps)) or (eps % 1 and not math.isinf(eps)):
        raise UsageError(
            f"eps is {eps:g} in {threat!r}; l0 counts values, so it must be whole, as in l0:10 or l0:10px"
        )
    return {"eps": eps, "per": "pixel" if per_pixel else "value"}


def _severity(text: str, threat: str) -> Mapping[str, Argument]:
    if text not in ("1", "2", "3", "4", "5"):
        raise UsageError(f"the threat {threat!r} has no severity of 1 to 5; write one, as in corruptions:3")
    return {"severity": int(text)}


def _patch(size: str, threat: str) -> Mapping[str, Argument]:
    matched = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", size)
    if matched is None:
        raise UsageError(
            f"the threat {threat!r} has no size in pixels; write height and width, as in patch:5x5 or "
            f"patch:8x8,at=centre"
        )
    return {"height": int(matched[1]), "width": int(matched[2])}


def _changes(text: str, threat: str) -> Mapping[str, Argument]:
    if not re.fullmatch(r"[1-9][0-9]{0,8}", text):
        raise UsageError(
            f"the threat {threat!r} has no number of changes; write how many training examples may be added or "
            "removed, as in training-set:20"
        )
    return {"changes": int(text)}


def file_argument(name: str) -> Callable[[str, str], Mapping[str, Argument]]:
    """Return the function that reads the path of a file as the argument `name`. A path with commas or spaces is
    quoted.
    """

    def read(text: str, threat: str) -> Mapping[str, Argument]:
        path = text[1:-1] if text[:1] in ("'", '"') and text[-1:] == text[:1] else text
        if not path:
            raise UsageError(f"the threat {threat!r} has no file; write its path after the colon")
        return {name: path}

    return read


def _budget(text: str) -> Argument:
    eps = parse_number(text, "eps")
    if not 0 < eps < math.inf:
        raise UsageError(f"eps is {eps:g}; the budget of a table must be above 0")
    return eps


def _file(text: str) -> Argument:
    return file_argument("file")(text, f"file={text}")["file"]


def path_text(path: str) -> str:
    """Return the path of a file as text of a threat, quoted if it has commas or spaces."""
    return path if _PARTS.fullmatch(path) else f'"{path}"'


def _matching(
    name: str, pattern: str, expected: str, kind: type[Argument] = str
) -> Callable[[str], Argument]:
    """Return the function that reads an argument whose text matches a pattern."""

    def read(text: str) -> Argument:
        if not re.fullmatch(pattern, text):
            raise UsageError(f"{name} is {text!r}; expected {expected}")
        return kind(text)

    return read


def _limits(largest: Mapping[str, float], example: str) -> Mapping[str, Callable[[str], Argument]]:
    return {key: partial(_limit, key, most=most, example=example) for key, most in largest.items()}


def parse_transform(text: str) -> Mapping[str, float]:
    """Return the limits of random input transformations by name, from a text such as
    `rotate=15,scale=0.1,brightness=0.2`.
    """
    limits: dict[str, float] = {}
    example = "rotate=15,scale=0.1,brightness=0.2"
    for part in re.split(r"[,\s]+", text.strip()):
        key, equals, value = part.partition("=")
        if not equals or key not in SEEN:
            raise UsageError(f"transform has {part!r}; expected any of {', '.join(SEEN)}, as in {example}")
        limits[key] = _limit(key, value, SEEN[key], example)
    return limits


def _limit(key: str, value: str, most: float, example: str) -> float:
    """Return the value of one limit. Raises `UsageError` if it is out of range."""
    limit = parse_number(value, key)
    if not 0 < limit <= most or math.isinf(limit):
        bound = "" if math.isinf(most) else f" and at most {most:g}"
        raise UsageError(f"{key} is {value}; it must be more than 0{bound}, as in {example}")
    return limit


def _condition(spec: ThreatSpec, text: str) -> ThreatSpec:
    key, equals, value = text.partition("=")
    if not equals or key not in ("goal", "access", "queries", "unit"):
        raise UsageError(f"the threat has {text!r}{did_you_mean(key, ('goal', 'access', 'queries', 'unit'))}")
    if key == "unit":
        if not FORMS[spec.norm].units:
            raise UsageError(
                f"{text} is the unit of an eps, and the size of {spec.norm} has none; leave it out"
            )
        if value not in ("range", "std") and not re.fullmatch(r"@.+", value):
            raise UsageError(
                f"unit is {value!r}; expected range (of the bounds of each feature), std (of its values), or @FILE "
                "with a JSON object from feature to unit"
            )
        return replace(spec, unit=value)
    if key == "access":
        if value not in get_args(Sees):
            raise UsageError(f"access is {value!r}{did_you_mean(value, get_args(Sees))}")
        return replace(spec, access=value)  # type: ignore[arg-type]
    if key == "queries":
        # 18 digits fit into 64 bits
        if not re.fullmatch(r"[0-9]{1,18}", value) or int(value) < 1:
            raise UsageError(
                f"queries is {value if value.isascii() and value.isdigit() else repr(value)}; expected a whole number "
                "of at least 1, as in queries=1000"
            )
        return replace(spec, queries=int(value))
    aimed = re.fullmatch(r"targeted:(?:([0-9]{1,18})|(.*[^\d\s].*))", value)
    if value == "untargeted":
        return replace(spec, goal=None, goal_name="")
    if not FORMS[spec.norm].aimed:
        raise UsageError(f"{_AIMLESS[spec.norm]} have no target class; leave {text!r} out")
    if aimed is None:
        raise UsageError(
            f"the goal is {value!r}; expected untargeted or targeted:K with the number or the name K of a class"
        )
    return replace(spec, goal=int(aimed[1]) if aimed[1] else None, goal_name=aimed[2] or "")


def _size_written(constraint: Any) -> str:
    """Return the eps of a norm in full precision."""
    if math.isinf(constraint.eps):
        return ""
    return repr(float(constraint.eps)).removesuffix(".0") + (
        "px" if getattr(constraint, "per", "") == "pixel" else ""
    )


def _limits_written(constraint: Any) -> str:
    """Return the limits of a constraint in full precision."""
    exact = {key: v if isinstance(v, str) else repr(v) for key, v in constraint.limits.items()}
    return limits_text(constraint.name, exact).partition(":")[2]


_AIMLESS = {"corruptions": "common corruptions", "training-set": "changes of a training set"}
_NORM = Form("", _eps, written=_size_written, units=True)
_SPATIAL_EXAMPLE = "spatial:rotate=30,shift=3"
_COLOUR_EXAMPLE = "colour:hue=18,saturation=0.3,brightness=0.2"
_TEXT_EXAMPLES = {
    **dict.fromkeys(("edits", "words"), "text:edits=2,words=3"),
    "synonyms": "text:synonyms=2,file=FILE.json",
    "inserts": "text:inserts=5,file=FILE.json",
}
FORMS: Final[dict[str, Form]] = {
    "linf": replace(_NORM, constraint="holdfast.core.constraints:Linf"),
    "l2": replace(_NORM, constraint="holdfast.core.constraints:L2"),
    "l1": replace(_NORM, constraint="holdfast.core.constraints:L1"),
    "l0": Form("holdfast.core.constraints:L0", _count, written=_size_written),
    "corruptions": Form(
        "holdfast.core.corruptions:Corruptions",
        _severity,
        written=lambda corruptions: str(corruptions.severity),
        aimed=False,
    ),
    "patch": Form(
        "holdfast.core.patches:Patch",
        _patch,
        {
            "at": _matching(
                "at",
                "anywhere|centre|[0-9]{1,5}:[0-9]{1,5}",
                "anywhere, centre, or ROW:COLUMN of the upper left corner, as in at=3:4",
            ),
            "jitter": _matching("jitter", "[0-9]{1,4}", "a number of pixels, as in jitter=3", int),
            "within": _matching(
                "within",
                "[0-9]{1,5}:[0-9]{1,5}-[0-9]{1,5}:[0-9]{1,5}",
                "ROW:COLUMN-ROW:COLUMN, the first and the last pixel that the patch may cover, as in within=4:4-23:23",
            ),
        },
        written=_limits_written,
    ),
    "spatial": Form(
        "holdfast.core.transformations:Spatial",
        arguments=_limits(_SPATIAL, _SPATIAL_EXAMPLE),
        written=_limits_written,
        example=_SPATIAL_EXAMPLE,
    ),
    "training-set": Form(
        "holdfast.core.training_set:TrainingSet",
        _changes,
        written=lambda training_set: str(training_set.changes),
        aimed=False,
    ),
    "table": Form(
        "holdfast.settings.table_rules:table_threat",
        file_argument("file"),
        {"eps": _budget},
        written=lambda table: f"{path_text(table.file)},eps={_size_written(table)}",
    ),
    "text": Form(
        "holdfast.io.text_lists:text_edits",
        arguments={
            **{
                name: _matching(
                    name, "[1-9][0-9]{0,3}", f"a whole number from 1 to 9999, as in {example}", int
                )
                for name, example in _TEXT_EXAMPLES.items()
            },
            "file": _file,
            "similarity": _matching(
                "similarity",
                r"(0?\.\d{1,6}|1(\.0{1,6})?)",
                "a number above 0 and at most 1, as in similarity=0.7",
                float,
            ),
        },
        written=_limits_written,
        example=_TEXT_EXAMPLES["edits"],
    ),
    "trigger": Form(
        "holdfast.io.data.trigger_files:trigger_threat",
        file_argument("file"),
        written=lambda stamped: path_text(stamped.file),
        goal=lambda stamped: stamped.trigger.target,
    ),
    "colour": Form(
        "holdfast.core.transformations:Colour",
        arguments=_limits(_COLOUR, _COLOUR_EXAMPLE),
        written=_limits_written,
        example=_COLOUR_EXAMPLE,
    ),
}
"""Forms of threat models by name. A new form is one entry; one with a file is read by `file_argument`."""


def parse_surrogate(text: str, role: str = "surrogate") -> dict[str, object]:
    """Return the settings of a surrogate from text such as `weights.pt,arch=net.py:build,mean=0.5,std=0.25`.

    Unknown keys are arguments of the factory. `role` is the name of such a model in errors, as in `teacher`.
    """
    # only at commas before a key, since values such as mean=0.5,0.4 contain commas
    address, *conditions = re.split(r",(?=[A-Za-z_]\w*=)", text.strip())
    if not address:
        raise UsageError(
            f"the {role} {text!r} has no address; expected one as for a model, as in mnist-cnn or net.py:build"
        )
    settings: dict[str, object] = {"model": address}
    arguments: dict[str, str] = {}
    for condition in conditions:
        key, _, value = condition.partition("=")
        into = settings if key in ("arch", "mean", "std", "skip", "decay") else arguments
        if key in into:
            raise UsageError(f"the {role} {text!r} contains {key} twice; keep one")
        into[key] = value
    return {**settings, "model_args": arguments} if arguments else settings


def parse_pairs(items: Iterable[str], flag: str) -> dict[str, str]:
    """Return strings of the form `NAME=VALUE` as a dictionary."""
    values: dict[str, str] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise UsageError(f"{flag} got {item!r}; expected NAME=VALUE")
        values[key.strip()] = value
    return values


def is_folder(output: str) -> bool:
    """Return whether the path of a report ends with a slash, which means that a folder is to be written."""
    return output.endswith(("/", "\\"))
