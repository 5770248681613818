"""Parsers for the values of command-line flags, such as `60s`. The module does not import torch, so that mistakes are
reported immediately.

Numbers may be fractions (`8/255`); durations are `60s`, `10min`, `24h`. Threat models are parsed by
`holdfast.threats.parsing`.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Final, Literal, get_args

from holdfast.core.errors import UsageError
from holdfast.core.names import parse_number
from holdfast.threats.parsing import MOVED, RECOLOURED, limit_of

LogKind = Literal["csv", "tensorboard", "mlflow", "wandb"]

SEEN: Final[Mapping[str, float]] = {
    **MOVED,
    "perspective": 0.5,
    **RECOLOURED,
    "blur": 10.0,
    "noise": 1.0,
}
"""Random transformations that may be applied to the inputs of a model, with the largest value of each."""

_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}


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
        limits[key] = limit_of(key, value, SEEN[key], example)
    return limits


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
