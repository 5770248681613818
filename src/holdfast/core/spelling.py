"""Suggestions for misspelt names. The module does not import torch, so that messages appear fast."""

import difflib
from collections.abc import Iterable
from itertools import islice

_SIMILAR = 0.5  # cutoff of difflib's ratio (default 0.6): in short names one typing error weighs more
_MOST = 10_000
"""Largest number of known names that are compared; a file may have millions of names, each of which takes 10 µs."""


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return the text `did you mean 'x'?` with the known name that is most similar to a misspelt word, or an empty
    string if no name is similar.

    Upper and lower case are treated as equal, and so are `-` and `_`.

    >>> suggestion("pgdd", ("APGD", "FAB", "PGD"))
    "did you mean 'PGD'?"
    >>> suggestion("pdg", ("PDPGD", "PGD"))
    "did you mean 'PGD'?"
    >>> suggestion("corruptions", ("linf", "l2"))
    ''
    """
    names, typed = {_folded(name): name for name in islice(known, _MOST)}, _folded(word)
    close = difflib.get_close_matches(typed, names, n=1, cutoff=_SIMILAR)
    swapped = [name for name in names if _swapped(typed, name)]
    return f"did you mean {names[[*swapped, *close][0]]!r}?" if swapped or close else ""


def _swapped(word: str, name: str) -> bool:
    """Whether the words differ by one swap of neighbouring letters, a typing error that difflib rates too low."""
    apart = [k for k, (one, other) in enumerate(zip(word, name, strict=False)) if one != other]
    return (
        len(word) == len(name)
        and len(apart) == 2
        and apart[1] == apart[0] + 1
        and word[apart[0]] == name[apart[1]]
        and word[apart[1]] == name[apart[0]]
    )


def _folded(name: str) -> str:
    return name.casefold().replace("-", "_")
