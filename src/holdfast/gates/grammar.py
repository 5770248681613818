"""Parses gates such as `robust_accuracy >= 0.40`. The module does not import torch, so that an invalid gate is refused
early.

>>> claim = parse("robust_accuracy@8/255 >= 0.4")
>>> claim.metric, claim.relation, claim.bound, round(claim.eps, 4)
('robust_accuracy', '>=', 0.4, 0.0314)
"""

import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Final, Literal

from holdfast.core.errors import Placeholder, Remedy, UsageError
from holdfast.core.names import fraction_of, suggestion
from holdfast.metrics.names import (
    AT_EPS,
    DIFFERENCES,
    IMPROVEMENT,
    METRICS,
    OF_STATIC,
    PAIRED,
    ROTATION,
    SHARES,
)

Relation = Literal[">=", "<="]
Versus = Literal["baseline", "static", "before"]

VERDICTS: Final = {"improved": IMPROVEMENT}
"""Verdicts that a gate requires by their bare name, each with the difference between the model after a training and the
given one that must be above zero."""

FORM = 'write METRIC >= NUMBER or METRIC <= NUMBER, as in "robust_accuracy >= 0.40"'
"""Advice in the error message for a gate that cannot be parsed."""

VERSUS = (
    'to compare with a baseline, write METRIC <= NUMBER vs baseline, as in "regression <= 0.01 vs baseline"'
)
"""Advice in the error message for a gate that compares two runs."""

STATIC = (
    "to compare with a model that never changes, write METRIC <= NUMBER of static, "
    'as in "transfer_success <= 0.5 of static"'
)
"""Advice in the error message for a gate of `rotate admit`."""

_PARTS = re.compile(
    r"\s*(?P<metric>[A-Za-z][\w-]*)\s*(?:@\s*(?P<eps>[^\s<>=]+))?\s*(?P<relation>[<>=!]+)\s*(?P<bound>\S+)\s*(?P<rest>.*?)\s*"
)


@dataclass(frozen=True)
class Claim:
    """A parsed gate: its metric, its comparison operator and its threshold."""

    metric: str
    relation: Relation
    bound: float
    eps: float | None = None
    """eps of the metric, in units of the inputs, if it is not that of the run"""
    decibels: bool = False
    """whether the text states eps in decibels relative to each input, so that a larger number is a smaller eps"""
    versus: Versus | None = None
    """reference of the bound; with `static`, the bound is a fraction of the value of the metric for a static model, and
    with `before`, the gate requires a verdict on a training, by which the model is compared with the given one"""
    text: str = ""
    """the gate as the user wrote it"""


GATED = frozenset({*METRICS, *ROTATION})
"""names of the metrics of classifiers on which gates can be set"""


SEQUENTIAL = frozenset(
    {
        "certified_accuracy",
        "clean_accuracy",
        "clean_error_rate",
        "rejection_rate",
        "robust_accuracy",
        "robust_error_rate",
        "suite_robust_accuracy",
    }
)
"""names of the metrics that are shares of all examples, on which a condition can be judged after each block of them"""
_FIRST_LOOK, _GROWTH = 32, 1.5  # a look may repeat some waves of attacks, so that their number is kept small


def look_sizes(n: int) -> tuple[int, ...]:
    """Return the numbers of examples after which a condition on `n` examples is judged, in ascending order.

    >>> look_sizes(1000)
    (32, 48, 72, 108, 162, 243, 364, 546, 819, 1000)
    """
    sizes = [min(_FIRST_LOOK, n)]
    while sizes[-1] < n:
        sizes.append(min(n, int(_GROWTH * sizes[-1])))
    return tuple(sizes)


def parse_until(text: str) -> Claim:
    """Return the condition until whose decision a run measures. Raises `UsageError` if the text is no gate, or its
    metric is not a share of all examples.
    """
    parts = _PARTS.fullmatch(text)
    if parts is not None and parts["metric"] in GATED - SEQUENTIAL:
        raise UsageError(
            f"until is {text!r}, and {parts['metric']} is not decided by the first examples; expected a condition on a "
            f"share of all examples: {_list(SEQUENTIAL)}"
        )
    return parse(text, offered=SEQUENTIAL)


def parse(text: str, metrics: Collection[str] = GATED, *, offered: Collection[str] | None = None) -> Claim:
    """Return the gate in a text such as `robust_accuracy >= 0.40`, or in the name of a verdict such as `improved`.
    `metrics` are the names of the metrics that the command has. Raises `UsageError` with the mistake and the correct
    form if the text is invalid; for an unknown metric, it offers `metrics`, or only those of them in `offered`.
    """
    name = text.strip()
    if name in VERDICTS:
        return Claim(VERDICTS[name], ">=", 0.0, versus="before", text=name)
    parts = _PARTS.fullmatch(text)
    if parts is None:
        words = text.split()
        form = VERSUS if "baseline" in words else STATIC if "static" in words else FORM
        similar = suggestion(name, VERDICTS) if len(words) == 1 else ""
        raise UsageError(f"gate {text!r} cannot be read; {f'{similar} Or ' if similar else ''}{form}")
    metric = _metric(parts["metric"], text, metrics, metrics if offered is None else offered)
    decibels = parts["eps"] is not None and parts["eps"].lower().endswith("db")
    eps = None if parts["eps"] is None else _number(parts["eps"][: -2 if decibels else None], text)
    eps = fraction_of(eps) if eps is not None and decibels else eps
    if eps is not None and metric not in AT_EPS:
        raise UsageError(
            f"gate {text!r}: {metric} has no value at another eps; those that have are {_list(AT_EPS)}"
        )
    if eps is not None and eps < 0:
        raise UsageError(f"gate {text!r}: eps is {eps:g}; it must be 0 or more, as in {metric}@8/255")
    relation = _relation(parts["relation"], _percentage(parts["bound"], parts["rest"]), text)
    bound = _bound(metric, _number(parts["bound"], text, parts["rest"]), text)
    versus = _versus(metric, parts["rest"], text)
    return Claim(metric, relation, bound, eps, decibels, versus, text.strip())


class UnreachedVerdict(UsageError):
    """Error for a gate on a verdict that the command does not reach."""


def refused_verdict(text: str, prefix: str = "") -> UnreachedVerdict:
    """Return the error for a gate on a verdict that the command does not reach. `prefix` begins its message."""
    return UnreachedVerdict(
        f"{prefix}gate {text!r} is a verdict on a training, and nothing is trained here; give it to holdfast harden, "
        f"or {FORM}"
    )


def with_equality(text: str) -> str:
    """Return a gate with `>=` or `<=` in place of `>` or `<`.

    >>> with_equality("robust_accuracy > 0.4"), with_equality("regression <= 0.01")
    ('robust_accuracy >= 0.4', 'regression <= 0.01')
    """
    return re.sub("[<>](?!=)", r"\g<0>=", text)


def _metric(name: str, text: str, metrics: Collection[str], offered: Collection[str]) -> str:
    if name in metrics:
        return name
    advice = suggestion(name, offered) or f"expected one of {_list(offered)}"
    raise UsageError(f"gate {text!r}: there is no metric {name!r}; {advice}")


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _relation(sign: str, percentage: str | None, text: str) -> Relation:
    if sign == ">=":
        return ">="
    if sign == "<=":
        return "<="
    if sign in {">", "<"}:
        addition = "" if percentage is None else f"; it also {percentage}"
        raise UsageError(
            f"gate {text!r} compares with {sign!r}, which an interval cannot distinguish from {sign}=; write "
            f"{sign}={addition}"
        )
    raise UsageError(f"gate {text!r} compares with {sign!r}; {FORM}")


def _percentage(written: str, rest: str = "") -> str | None:
    """Explanation for a number followed by `%`, with or without a space. None for other numbers."""
    if not written.endswith("%") and rest.split()[:1] != ["%"]:
        return None
    number = written.removesuffix("%")
    as_share = _fraction(number)
    way_out = "write it as a share" if as_share is None else f"write the share {as_share / 100:g}"
    return f"gives '{number}%', but metrics are not percentages; {way_out}"


def _bound(metric: str, bound: float, text: str) -> float:
    """Return the bound. Raises `UsageError` if it is outside the range of the metric."""
    lowest = 0 if metric in SHARES else -1 if metric in DIFFERENCES else -math.inf
    if lowest == -math.inf or lowest <= bound <= 1:
        return bound
    kind = "share" if metric in SHARES else "difference of shares"
    advice = f"did you mean {_share(bound)}?" if 2 <= bound <= 100 else f"{metric} is from {lowest} to 1"
    raise UsageError(f"gate {text!r}: {bound:g} is not a {kind}; {advice}")


def _share(percents: float) -> str:
    """The share for a percentage, with at least two decimals."""
    share = f"{percents / 100:g}"
    return share if len(share) > 3 else f"{percents / 100:.2f}"


def _number(written: str, text: str, rest: str = "") -> float:
    percentage = _percentage(written, rest)
    if percentage is not None:
        raise UsageError(f"gate {text!r} {percentage}")
    number = _fraction(written)
    if number is None or not math.isfinite(number):
        raise UsageError(f"gate {text!r}: {written!r} is not a number; write one such as 0.4 or 8/255")
    return number


def _fraction(written: str) -> float | None:
    """A number or a fraction as a float; None for other text."""
    numerator, slash, denominator = written.partition("/")
    try:
        return float(numerator) / float(denominator) if slash else float(numerator)
    except (ValueError, ZeroDivisionError):
        return None


def _versus(metric: str, rest: str, text: str) -> Versus | None:
    words = rest.split()
    if words == ["vs", "baseline"]:
        if metric not in PAIRED:
            raise UsageError(
                f"gate {text!r}: {metric} is measured on one run; {VERSUS}, with one of {_list(PAIRED)}"
            )
        return "baseline"
    if words == ["of", "static"]:
        if metric not in OF_STATIC:
            raise UsageError(
                f"gate {text!r}: {metric} has no value for a model that never changes; {STATIC}, with one of "
                f"{_list(OF_STATIC)}"
            )
        return "static"
    if words:
        raise UsageError(
            f"gate {text!r} ends in {rest!r}, which is unknown; it may end in 'vs baseline' or 'of static'"
        )
    if metric in PAIRED:
        raise UsageError(
            f"gate {text!r}: {metric} compares two runs, and is written '{text.strip()} vs baseline'",
            Remedy("baseline", Placeholder("RUN")),
        )
    return None
