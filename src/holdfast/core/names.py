"""Text forms of attack names, threat models and untrusted strings, and suggestions for misspelt names. The module does
not import torch, so that messages appear fast.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Final, Literal, TypeGuard

from holdfast.core.errors import UsageError

_CI_COMMAND = re.compile(r"::(?=[A-Za-z][A-Za-z-]*(\s.*?)?::)")
_CI_MARK = re.compile(r"##(?=[A-Za-z]*\[)")

PARTS = re.compile(r"""(?:"[^"]*"|'[^']*'|[^,\s])+""")
"""pattern of the parts of a threat, which commas and spaces separate, except between quotes"""

TaskName = Literal["classes", "segmentation", "detection", "regression", "multilabel"]
"""what a model returns: one class of each example, a class of each pixel, boxes of objects, numbers, or several labels
"""

Objective = Literal["vanish", "fabricate", "mislabel"]
"""what an attack on a detector is to achieve: objects are not found, are found where none are, or get another label"""

MAP: Final = "map:"
"""beginning of the goal that all pixels of an image get a class, as in `map:3`"""

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


def enumerated(names: Sequence[str]) -> str:
    """Return the names as one string, joined with commas and "and", such as `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def slug(name: str) -> str:
    """Return a name in lower-case letters, digits and hyphens: `APGD-CE (large eps)` becomes `apgd-ce-large-eps`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def suite_name(suite: str) -> str:
    """Return the name of a suite without its version: `rand` for `rand@1`, and for `rand@1 without APGD-CE`."""
    return suite.partition("@")[0]


def threat_text(
    change: str, goal: int | None, access: str, queries: int | None, unit: str = "", objective: str = ""
) -> str:
    """Return a threat model as a command line argument. `change` is its constraint, such as `linf:0.1`, `objective`
    that of an attack on a detector, and default values are omitted.
    """
    unit_text = f",unit={unit}" if unit else ""
    goal_text = f",goal={objective}" if objective else "" if goal is None else f",goal=targeted:{goal}"
    access_text = "" if access == "gradients" else f",access={access}"
    queries_text = "" if queries is None else f",queries={queries}"
    return f"{change}{unit_text}{goal_text}{access_text}{queries_text}"


def limits_text(kind: str, limits: Mapping[str, float | str]) -> str:
    """Return a constraint with its limits as text for a threat string, such as `spatial:rotate=30,shift=3` or
    `patch:8x8,at=centre,jitter=3`. The limit `content`, which is the content of a file, is left out.
    """
    parts = [
        f"{name}={path_text(limit) if isinstance(limit, str) else exact(limit)}"
        for name, limit in limits.items()
        if name != "content"
    ]
    if kind in ("table", "trigger"):
        parts[0] = path_text(str(limits["file"]))
    if kind == "patch":
        parts[:2] = [f"{limits['height']}x{limits['width']}"]
        parts = [part for part in parts if part not in ("at=anywhere", "jitter=0")]
    return f"{kind}:{','.join(parts)}"


def path_text(path: str) -> str:
    """Return the path of a file as text of a threat, quoted if it has commas or spaces."""
    return path if PARTS.fullmatch(path) else f'"{path}"'


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


def exact(value: float) -> str:
    """Return a number as text that is read as the same number, such as `0.0123456` or `1000`."""
    return repr(float(value)).removesuffix(".0")


def in_255ths(eps: float) -> bool:
    """Return whether a radius between 0 and 1 is a multiple of 1/255 without a short decimal form."""
    if not 0 < eps < 1 or math.isclose(eps, round(eps, 3), rel_tol=1e-9):
        return False
    return math.isclose(eps * 255, round(eps * 255), rel_tol=1e-6)


def exact_size(eps: float) -> str:
    """Return a perturbation radius as text that is read as the same number, such as `0.0123456`, `1000` or `8/255`."""
    levels = round(eps * 255) if in_255ths(eps) else 0
    return f"{levels}/255" if levels and levels / 255 == eps else exact(eps)


def fraction_of(decibels: float) -> float:
    """Return the ratio of two amplitudes, as 0.01 for 40 dB below the reference."""
    return float(10 ** (-decibels / 20))


def decibels_text(eps: float) -> str:
    """Return a ratio of amplitudes as the text in decibels that is read as the same ratio.

    >>> decibels_text(0.01), decibels_text(0.0)
    ('40dB', 'infdB')
    """
    if not 0 < eps < math.inf:
        return f"{math.inf if eps == 0 else -math.inf}dB"
    number = -20 * math.log10(eps)
    digits = next((n for n in range(16) if fraction_of(round(number, n)) == eps), 16)
    return f"{round(number, digits) + 0.0:.{digits}f}dB"


def line(text: str) -> str:
    """Return a text on one line, without control characters, which could affect a terminal and are invalid in XML, and
    without text that a CI system would execute as a command. Each text of a document is shown in this form.

    GitHub interprets `::error::...` at the start of a line as a command, and `##[...]` anywhere, as Azure does.
    """
    spaced = re.sub(r"\s+", " ", text)
    printable = "".join(letter if letter.isprintable() else "\ufffd" for letter in spaced)
    return _CI_MARK.sub(r"#\\#", _CI_COMMAND.sub(r":\\:", printable))


_SIMILAR = 0.5  # cutoff of difflib's ratio (default 0.6): in short names one typing error weighs more
_MOST = 10_000
"""Largest number of known names that are compared; a file may have millions of names, each of which takes 10 µs."""


_SHOWN = 3
"""number of names in a note"""


def by_stripped(words: Iterable[str], known: Iterable[str] = ()) -> dict[str, str]:
    """Return for each word the known name that is equal up to spaces at its ends, or the word without such spaces if
    there is none. A word that is a known name stays as it is.

    >>> by_stripped([" Private", "State-gov", "Other "], ["Private", " State-gov"])
    {' Private': 'Private', 'State-gov': ' State-gov', 'Other ': 'Other'}
    """
    names = {*(listed := [*known])}
    similar = {name.strip(): name for name in reversed(listed)}
    return {word: word if word in names else similar.get(word.strip(), word.strip()) for word in words}


def note_on_spaces(what: str, read_as: Mapping[str, str]) -> tuple[str, ...]:
    """Return a note on the names that `by_stripped` read in another form; `what` contains them."""
    changed = [f"{word!r} as {name!r}" for word, name in read_as.items() if word != name]
    if not changed:
        return ()
    more = " …" if len(changed) > _SHOWN else ""
    return (
        f"{what} has names that differ by spaces at their ends; read are {', '.join(changed[:_SHOWN])}{more}",
    )


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return the text `did you mean 'x'?` with the known name that is most similar to a misspelt word, or an empty
    string if no name is similar.

    Upper and lower case are treated as equal, and so are `-` and `_`.

    >>> suggestion("pgdd", ("APGD", "FAB", "PGD"))
    "did you mean 'PGD'?"
    >>> suggestion("pdg", ("PDPGD", "PGD"))
    "did you mean 'PGD'?"
    >>> suggestion("bnb", ("crown", "branch-and-bound"))
    "did you mean 'branch-and-bound'?"
    >>> suggestion("corruptions", ("linf", "l2"))
    ''
    """
    name = most_similar(word, known)
    return "" if name is None else f"did you mean {name!r}?"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of an error message for an unknown word: the most similar known word, or all known words if none
    is similar.
    """
    names = sorted(known)
    return f"; {suggestion(name, names) or 'expected one of ' + ', '.join(names)}"


def most_similar(word: str, known: Iterable[str]) -> str | None:
    """Return the known name that is most similar to a misspelt word, or None if no name is similar."""
    import difflib  # not needed for help texts

    listed, typed = [*islice(known, _MOST)], _folded(word)
    names = {_initials(name): name for name in listed} | {_folded(name): name for name in listed}
    close = difflib.get_close_matches(typed, names, n=1, cutoff=_SIMILAR)
    swapped = [name for name in names if _swapped(typed, name)]
    return names[[*swapped, *close][0]] if swapped or close else None


def _swapped(word: str, name: str) -> bool:
    """Whether the words differ by one swap of neighbouring letters, a typing error that difflib rates too low."""
    differing = [
        k for k, (letter, known_letter) in enumerate(zip(word, name, strict=False)) if letter != known_letter
    ]
    return (
        len(word) == len(name)
        and len(differing) == 2
        and differing[1] == differing[0] + 1
        and word[differing[0]] == name[differing[1]]
        and word[differing[1]] == name[differing[0]]
    )


def _initials(name: str) -> str:
    """Return the abbreviation of a name of three words or more, as `bab` of `branch-and-bound`; else the name."""
    words = _folded(name).split("_")
    return "".join(word[:1] for word in words) if len(words) > 2 else _folded(name)


def _folded(name: str) -> str:
    return name.casefold().replace("-", "_")
