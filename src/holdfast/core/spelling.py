"""Suggestions for misspelt names. The module does not import torch, so that messages appear fast."""

import difflib
from collections.abc import Iterable, Mapping
from itertools import islice

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
