"""Messages of validation errors, which state the invalid value and the expected one."""

from pydantic import ValidationError

from holdfast.core.spelling import did_you_mean

_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "tuple": "a list",
    "dict": "names with values, as in {name: value}",
}
_LIMITS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("more than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}
_LENGTHS = {"too_short": ("at least", "min_length"), "too_long": ("at most", "max_length")}


_SHOWN = 200
"""number of characters of a value that a message shows"""


def place(error: ValidationError) -> str:
    """Return the path of the first invalid setting in a validation error, such as `attacks.0.steps`."""
    return ".".join(str(part) for part in error.errors()[0]["loc"])


def complaint(error: ValidationError) -> str:
    """Return a description of the first invalid setting in a validation error, such as `is 0; expected at least 1`."""
    details = error.errors()[0]
    text = repr(details["input"])
    return f"is {text if len(text) <= _SHOWN else f'{text[:_SHOWN]} …'}{_expected(error)}"


def _expected(error: ValidationError) -> str:
    details = error.errors()[0]
    kind, limits = details["type"], details.get("ctx", {})
    if kind in _LIMITS:
        phrase, key = _LIMITS[kind]
        return f"; expected {phrase} {limits[key]:g}"
    if kind in _LENGTHS:
        phrase, key = _LENGTHS[kind]
        return f"; expected {phrase} {limits[key]} {'entry' if limits[key] == 1 else 'entries'}"
    if kind == "literal_error":
        allowed = str(limits["expected"]).replace(" or ", ", ").replace("'", "").split(", ")
        return (
            f"; expected {allowed[0]}" if len(allowed) == 1 else did_you_mean(str(details["input"]), allowed)
        )
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return "; there is no such key"
    name = kind.partition("_")[0]
    if name in _KINDS:
        return f"; expected {_KINDS[name]}{_as_list(details['input']) if _KINDS[name] == 'a list' else ''}"
    return f"; {details['msg'][0].lower()}{details['msg'][1:]}"


def _as_list(value: object) -> str:
    """Numbers that were given without brackets, as a list."""
    parts = str(value).split(",")
    try:
        for part in parts:
            float(part)
    except ValueError:
        return ""
    return f", as in [{', '.join(part.strip() for part in parts)}]"
