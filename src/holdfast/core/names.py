"""Text forms of attack names, threat models and untrusted strings. The module does not import torch, so that messages
appear fast.
"""

import re
from collections.abc import Mapping
from typing import Literal, TypeGuard

from holdfast.core.errors import UsageError

MOST_SCALED = 0.9
"""largest fraction by which an image may grow or shrink; with 1 it could shrink to nothing"""

_CI_COMMAND = re.compile(r"::(?=[A-Za-z][A-Za-z-]*(\s.*?)?::)")
_CI_MARK = re.compile(r"##(?=[A-Za-z]*\[)")

CorruptionName = Literal[
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
    "speckle_noise",
    "gaussian_blur",
    "spatter",
    "saturate",
]
"""common corruptions of images, as named in their paper; the last four are not part of the suite"""


def slug(name: str) -> str:
    """Return a name in lower-case letters, digits and hyphens: `APGD-CE (large eps)` becomes `apgd-ce-large-eps`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def suite_name(suite: str) -> str:
    """Return the name of a suite without its version: `rand` for `rand@1`, and for `rand@1 without APGD-CE`."""
    return suite.partition("@")[0]


def threat_text(change: str, goal: int | None, access: str, queries: int | None, unit: str = "") -> str:
    """Return a threat model as a command line argument. `change` is its constraint, such as `linf:0.1`, and default
    values are omitted.
    """
    unit_text = f",unit={unit}" if unit else ""
    goal_text = "" if goal is None else f",goal=targeted:{goal}"
    access_text = "" if access == "gradients" else f",access={access}"
    queries_text = "" if queries is None else f",queries={queries}"
    return f"{change}{unit_text}{goal_text}{access_text}{queries_text}"


def with_article(name: str) -> str:
    """Return the name of a type with its indefinite article. Initials are pronounced as letters.

    >>> [with_article(name) for name in ("OrderedDict", "tuple", "ndarray", "XGBRegressor", "UserDict")]
    ['an OrderedDict', 'a tuple', 'an ndarray', 'an XGBRegressor', 'a UserDict']
    """
    has_initials = name[:2].isupper() or name.startswith("nd")
    vowels = "AEFHILMNORSX" if has_initials else "AEIOU"
    is_an = name[:1].upper() in vowels and not name.lower().startswith(("uni", "user"))
    return f"{'an' if is_an else 'a'} {name}"


def kind_of(value: object) -> str:
    """Return the type of a value with its indefinite article, or `None`."""
    return "None" if value is None else with_article(type(value).__name__)


def is_size(value: object) -> TypeGuard[int | float]:
    """Return whether a value is a positive number, such as an eps, a duration or a number of epochs."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def size_text(eps: float, digits: int | None = None) -> str:
    """Return an eps as text for a threat string. It is a fraction if it is a multiple of 1/255, and otherwise rounded
    to `digits` digits if they are given.

    >>> size_text(8 / 255), size_text(25.5 / 255), size_text(2 / 7, digits=3)
    ('8/255', '0.1', '0.286')
    """
    levels = round(eps * 255)
    if 0 < levels < 255 and eps == levels / 255:
        return f"{levels}/255"
    return repr(eps) if digits is None else f"{eps:.{digits}g}"


def limits_text(kind: str, limits: Mapping[str, float | str]) -> str:
    """Return a constraint with its limits as text for a threat string, such as `spatial:rotate=30,shift=3` or
    `patch:8x8,at=centre,jitter=3`. The limit `content`, which is the content of a file, is left out.
    """
    parts = [
        f"{name}={_quoted(limit) if isinstance(limit, str) else f'{limit:.6g}'}"
        for name, limit in limits.items()
        if name != "content"
    ]
    if kind in ("table", "trigger"):
        parts[0] = _quoted(str(limits["file"]))
    if kind == "patch":
        parts[:2] = [f"{limits['height']}x{limits['width']}"]
        parts = [part for part in parts if part not in ("at=anywhere", "jitter=0")]
    return f"{kind}:{','.join(parts)}"


def _quoted(text: str) -> str:
    """Return a value of a threat string, quoted if it has commas or spaces."""
    return f'"{text}"' if re.search(r"[,\s]", text) else text


def refuse_mixed(limits: Mapping[str, float | str]) -> None:
    """Raise `UsageError` if a spatial threat combines `flow` (displacements of single pixels) with other
    transformations, because no attack supports that.
    """
    if "flow" in limits and len(limits) > 1:
        raise UsageError(
            f"{limits_text('spatial', limits)} combines a flow with other transformations, which no attack "
            f"supports; use each alone, as in {limits_text('spatial', {'flow': limits['flow']})}"
        )


def threat_kind(norm: str) -> str:
    """Return the name in threat strings of the class of a constraint, such as `linf` for Linf, `text` for TextEdits,
    `training-set` for TrainingSet or `trigger` for Stamped.
    """
    if norm == "Stamped":
        return "trigger"
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", norm.removesuffix("Edits")).lower()


def refuse_text_limits(limits: Mapping[str, float | str]) -> None:
    """Raise `UsageError` unless a threat on texts has one kind of change, with the limits and the file it needs."""
    kinds = [name for name in ("edits", "synonyms", "inserts") if limits.get(name)]
    if len(kinds) != 1:
        given = limits_text("text", limits)
        raise UsageError(
            f"{given} {'combines ' + ' and '.join(kinds) if kinds else 'allows no change'}; give one of "
            "text:edits=2,words=3, text:synonyms=2,file=FILE.json and text:inserts=5,file=FILE.json"
        )
    if bool(limits.get("words")) != (kinds[0] == "edits"):
        missing = kinds[0] == "edits"
        raise UsageError(
            f"{limits_text('text', limits)} {'has no number of words that change' if missing else 'has words'}; words "
            "is the largest number of words with edits, as in text:edits=2,words=3"
        )
    if kinds[0] != "edits" and not limits.get("file"):
        raise UsageError(
            f"{limits_text('text', limits)} has no file; give file=FILE.json with a JSON object such as "
            f"{_TEXT_FILES[kinds[0]]}{_OR_FOLDER if kinds[0] == 'synonyms' else ''}"
        )


_OR_FOLDER = ", or file=FOLDER with a model of transformers, whose embeddings give the synonyms"
_TEXT_FILES = {
    "synonyms": '{"synonyms": {"good": ["great", "fine"]}}',
    "inserts": '{"insert": ["hello", "thanks"]}',
}
"""Examples of the file of a threat on texts."""


def line(text: str) -> str:
    """Return a text on one line, without control characters, which could affect a terminal and are invalid in XML, and
    without text that a CI system would execute as a command. Each text of a document is shown in this form.

    GitHub interprets `::error::...` at the start of a line as a command, and `##[...]` anywhere, as Azure does.
    """
    spaced = re.sub(r"\s+", " ", text)
    printable = "".join(letter if letter.isprintable() else "\ufffd" for letter in spaced)
    return _CI_MARK.sub(r"#\\#", _CI_COMMAND.sub(r":\\:", printable))
