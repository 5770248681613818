"""Parsers for the values of command-line flags, such as `linf:8/255`. The module does not import torch, so that
mistakes are reported immediately.

Numbers may be fractions (`8/255`); durations are `60s`, `10min`, `24h`; a threat model is `linf:8/255`,
`corruptions:3`, `patch:5x5,at=centre`, `spatial:rotate=30,shift=3`, `spatial:flow=1.5` or
`colour:hue=18,saturation=0.3`, followed by any of `goal=targeted:K`, `access=none|labels|scores|gradients` and
`queries=N`, separated by commas or spaces. `unit=range`, `unit=std` and `unit=@FILE` state the unit of the eps of a
norm for each feature.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final, Literal, get_args

from holdfast.core.errors import UsageError
from holdfast.core.names import MOST_SCALED, limits_text, refuse_mixed, threat_text
from holdfast.core.remedies import Remedy
from holdfast.core.spelling import suggestion

Norm = Literal["linf", "l2", "l1", "l0", "corruptions", "patch", "spatial", "colour"]
Sees = Literal["none", "labels", "scores", "gradients"]

_MOVED = {"rotate": 180.0, "shift": math.inf, "scale": MOST_SCALED}  # a rotation by up to 180 degrees is any
LIMITS: Final[Mapping[str, Mapping[str, float]]] = {
    "spatial": {**_MOVED, "flow": math.inf},
    "colour": {"hue": 180.0, "saturation": 1.0, "brightness": 1.0, "contrast": 1.0},
}
"""Image transformations that a threat model may allow, with the largest value of each."""

SEEN: Final[Mapping[str, float]] = {
    **_MOVED,
    "perspective": 0.5,
    **LIMITS["colour"],
    "blur": 10.0,
    "noise": 1.0,
}
"""Random transformations that may be applied to the inputs of a model, with the largest value of each."""

_AS_IN = {"spatial": "spatial:rotate=30,shift=3", "colour": "colour:hue=18,saturation=0.3,brightness=0.2"}
_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}
_SIZE = re.compile(
    r"\s*(norm=)?(?P<norm>linf|l2|l1|l0)?[=:,(\s]*(eps(ilon)?\s*[=:]\s*)?"
    r"(?P<size>\d*\.?\d+(e-?\d+)?(\s*/\s*\d+)?(px)?)\s*\)?(?P<rest>([,\s].*)?)",
    re.IGNORECASE,
)
"""pattern of an eps without a norm, or with another sign than a colon after the norm"""


@dataclass(frozen=True)
class ThreatSpec:
    """A threat model parsed from text. Its `eps` is infinite if the attacks search for the smallest change that breaks
    an example.
    """

    norm: Norm
    eps: float = math.inf
    pixels: bool = False
    limits: Mapping[str, float | str] = field(default_factory=lambda: MappingProxyType({}))
    """arguments of the constraint, if it is not a norm ball"""
    goal: int | None = None
    access: Sees = "gradients"
    queries: int | None = None
    unit: str = ""
    """unit of eps: `range`, `std` or `@FILE`; empty for the unit of the inputs"""

    def __str__(self) -> str:
        if self.limits:
            return threat_text(limits_text(self.norm, self.limits), self.goal, self.access, self.queries)
        size = "" if math.isinf(self.eps) else f":{self.eps:.6g}" + ("px" if self.pixels else "")
        return threat_text(self.norm + size, self.goal, self.access, self.queries, self.unit)


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
    parts = [part for part in re.split(r"[,\s]+", text.strip()) if part]
    if not parts:
        raise UsageError("the threat is empty; expected a norm and a size, such as linf:8/255")
    spec = _constraint(parts[0])
    for part in parts[1:]:
        key = part.partition("=")[0]
        is_limit = key in LIMITS.get(spec.norm, ()) or (
            spec.norm == "patch" and key in ("at", "jitter", "within")
        )
        spec = _limited(spec, part) if is_limit else _condition(spec, part)
    refuse_mixed(spec.limits)
    return spec


def _constraint(text: str) -> ThreatSpec:
    name, colon, size = text.partition(":")
    kind = name.lower()
    if kind not in get_args(Norm):
        raise UsageError(f"the threat {text!r} has no known norm{did_you_mean(kind, get_args(Norm))}")
    norm: Norm = kind  # type: ignore[assignment]
    if norm in LIMITS:
        return _limited(ThreatSpec(norm, 1.0), size)
    if norm == "patch":
        return ThreatSpec(norm, 1.0, limits=_patch(size, text))
    if not colon and norm != "corruptions":
        return ThreatSpec(norm)
    if norm == "corruptions":
        return ThreatSpec(norm, _severity(size, text))
    pixels = norm == "l0" and size.endswith("px")
    eps = parse_number(size.removesuffix("px") if pixels else size, f"eps in {text!r}")
    if eps < 0:
        raise UsageError(f"eps is {eps:g} in {text!r}; it must be 0 (clean accuracy) or more")
    if (pixels and math.isinf(eps)) or (norm == "l0" and eps % 1 and not math.isinf(eps)):
        raise UsageError(
            f"eps is {eps:g} in {text!r}; l0 counts values, so it must be whole, as in l0:10 or l0:10px"
        )
    return ThreatSpec(norm, eps, pixels)


def _limited(spec: ThreatSpec, text: str) -> ThreatSpec:
    """Add one limit, such as `rotate=30`, to a threat."""
    key, equals, value = text.partition("=")
    if spec.norm == "patch":
        return replace(spec, limits={**spec.limits, key: _placed(key, value)})
    most = LIMITS[spec.norm]
    if not equals or key not in most:
        given_limits = f"the limit {text!r}" if text else "no limits"
        expected = f"expected any of {', '.join(most)}, as in {_AS_IN[spec.norm]}"
        raise UsageError(f"the threat {spec.norm} has {given_limits}; {expected}")
    limit = _limit(key, value, most[key], _AS_IN[spec.norm])
    return replace(spec, limits={**spec.limits, key: limit})


def parse_transform(text: str) -> Mapping[str, float]:
    """Return the limits of random input transformations by name, from a text such as
    `rotate=15,scale=0.1,brightness=0.2`.
    """
    limits: dict[str, float] = {}
    for part in re.split(r"[,\s]+", text.strip()):
        key, equals, value = part.partition("=")
        if not equals or key not in SEEN:
            expected = f"expected any of {', '.join(SEEN)}, as in rotate=15,scale=0.1,brightness=0.2"
            raise UsageError(f"transform has {part!r}; {expected}")
        limits[key] = _limit(key, value, SEEN[key], "rotate=15,scale=0.1,brightness=0.2")
    return limits


def _limit(key: str, value: str, most: float, example: str) -> float:
    """Return the value of one limit. Raises `UsageError` if it is out of range."""
    limit = parse_number(value, key)
    if not 0 < limit <= most or math.isinf(limit):
        bound = "" if math.isinf(most) else f" and at most {most:g}"
        raise UsageError(f"{key} is {value}; it must be more than 0{bound}, as in {example}")
    return limit


def _patch(size: str, text: str) -> Mapping[str, float | str]:
    matched = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", size)
    if matched is None:
        raise UsageError(
            f"the threat {text!r} has no size in pixels; write height and width, as in patch:5x5 or "
            f"patch:8x8,at=centre"
        )
    return {"height": int(matched[1]), "width": int(matched[2]), "at": "anywhere", "jitter": 0}


def _placed(key: str, value: str) -> float | str:
    if key == "jitter":
        if not re.fullmatch(r"[0-9]{1,4}", value):
            raise UsageError(f"jitter is {value!r}; expected a number of pixels, as in jitter=3")
        return int(value)
    if key == "within":
        if not re.fullmatch(r"[0-9]{1,5}:[0-9]{1,5}-[0-9]{1,5}:[0-9]{1,5}", value):
            raise UsageError(
                f"within is {value!r}; expected ROW:COLUMN-ROW:COLUMN, the first and the last pixel that the patch "
                f"may cover, as in within=4:4-23:23"
            )
        return value
    if not re.fullmatch(r"anywhere|centre|[0-9]{1,5}:[0-9]{1,5}", value):
        raise UsageError(
            f"at is {value!r}; expected anywhere, centre, or ROW:COLUMN of the upper left corner, as in at=3:4"
        )
    return value


def _severity(text: str, threat: str) -> float:
    if text not in ("1", "2", "3", "4", "5"):
        raise UsageError(f"the threat {threat!r} has no severity of 1 to 5; write one, as in corruptions:3")
    return float(text)


def _condition(spec: ThreatSpec, text: str) -> ThreatSpec:
    key, equals, value = text.partition("=")
    if not equals or key not in ("goal", "access", "queries", "unit"):
        raise UsageError(f"the threat has {text!r}{did_you_mean(key, ('goal', 'access', 'queries', 'unit'))}")
    if key == "unit":
        if spec.norm not in ("linf", "l2", "l1"):
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
    aimed = re.fullmatch(r"targeted:([0-9]{1,18})", value)
    if value == "untargeted":
        return replace(spec, goal=None)
    if spec.norm == "corruptions":
        raise UsageError(f"common corruptions have no target class; leave {text!r} out")
    if aimed is None:
        raise UsageError(f"the goal is {value!r}; expected untargeted or targeted:K with a class number K")
    return replace(spec, goal=int(aimed[1]))


def parse_surrogate(text: str) -> dict[str, object]:
    """Return the settings of a surrogate from text such as `weights.pt,arch=net.py:build,mean=0.5,std=0.25`.

    Unknown keys are arguments of the factory.
    """
    # only at commas before a key, since values such as mean=0.5,0.4 contain commas
    address, *conditions = re.split(r",(?=[A-Za-z_]\w*=)", text.strip())
    if not address:
        raise UsageError(
            f"the surrogate {text!r} has no address; expected one as for a model, as in mnist-cnn or net.py:build"
        )
    settings: dict[str, object] = {"model": address}
    arguments: dict[str, str] = {}
    for condition in conditions:
        key, _, value = condition.partition("=")
        into = settings if key in ("arch", "mean", "std", "skip", "decay") else arguments
        if key in into:
            raise UsageError(f"the surrogate {text!r} contains {key} twice; keep one")
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
