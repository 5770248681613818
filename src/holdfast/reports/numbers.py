"""Formatting of numbers for reports, as JSON and as text."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from holdfast.core.names import in_255ths

_UNSAFE = re.compile(
    r"[\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]|#(?=#[A-Za-z]*\[)"
)
"""Characters that are legal in JSON, but that a terminal interprets, a file cannot contain, or a CI system executes."""
NOT_A_NUMBER_WORDS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
"""Strings for the numbers that strict JSON cannot represent: infinities and NaN."""


def strict(value: Any) -> Any:
    """Convert a nested value to strict JSON: infinities and NaN become the strings "inf", "-inf" and "nan"."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()  # file names may not be UTF-8
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Tensor):
        return strict(value.detach().cpu().tolist())
    if isinstance(value, Mapping):
        return {strict(str(key)): strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [strict(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        settings = {field.name: strict(getattr(value, field.name)) for field in fields(value)}
        return {type(value).__name__: settings}
    return strict(str(getattr(value, "__name__", value)))


def json_text(content: Mapping[str, Any]) -> str:
    """Return the content of a report as strict JSON text, with a newline at the end. Characters that a terminal or a CI
    system would interpret are escaped, so that the text can be printed.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def number(value: float | str) -> float:
    """Return a number from strict JSON, in which infinities and NaN are the strings "inf", "-inf" and "nan"."""
    return NOT_A_NUMBER_WORDS[value] if isinstance(value, str) else float(value)


def percent(value: float | str, digits: int = 1) -> str:
    """Return a fraction in percent as text, with more digits if rounding would give 0 or 100 %."""
    share = number(value)
    if not math.isfinite(share):
        return "not defined"
    for places in range(digits, 5):
        text = f"{100 * share:.{places}f}"
        if share in {0.0, 1.0} or float(text) not in {0.0, 100.0}:
            break
    return f"{text} %"


def plain(value: float | str, digits: int = 3) -> str:
    """Return a number as text with a few significant digits, and in scientific notation only if it is very small or
    very large.
    """
    amount = number(value)
    if math.isnan(amount):
        return "not defined"
    if math.isinf(amount):
        return "∞" if amount > 0 else "−∞"
    if amount == 0:
        return "0"
    if 1e-4 <= abs(amount) < 1e7:
        text = f"{amount:,.{max(0, digits - 1 - math.floor(math.log10(abs(amount))))}f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
    else:
        text = f"{amount:.{digits - 1}e}"
    return text.replace("-", "−")


def feature_value(value: float | str) -> str:
    """Return the value of a feature as text: a category as it is, and a number with six significant digits."""
    return value if isinstance(value, str) and value not in NOT_A_NUMBER_WORDS else plain(value, 6)


def value_text(value: str | float | None) -> str:
    """Return a cell of a table of numbers and words as text: a float with a few digits, and None as an empty text."""
    if value is None:
        return ""
    return plain(value) if isinstance(value, float) else str(value)


def count_text(value: float | str) -> str:
    """Return a number, rounded to an integer, as text with thousands separators. NaN and infinity, which JSON contains
    as text, have the form of `plain`.
    """
    amount = number(value)
    return f"{amount:,.0f}" if math.isfinite(amount) else plain(amount)


def seconds_text(value: float | str) -> str:
    """Return a duration, given in seconds, as text in a suitable unit such as minutes."""
    amount = number(value)
    if not math.isfinite(amount):
        return plain(amount)
    if amount < 1:
        return f"{1000 * amount:.0f} ms"
    if amount < 120:
        return f"{amount:.1f} s"
    minutes = amount / 60
    return f"{minutes:.1f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def size(eps: float | str) -> str:
    """Return a perturbation radius as text, such as `0.3` or `8/255`.

    It is a fraction of 255 if the radius is a multiple of 1/255 without a short decimal form, and otherwise a decimal
    number.
    """
    amount = number(eps)
    return f"{round(amount * 255)}/255" if in_255ths(amount) else plain(amount)
