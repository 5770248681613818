"""What a misspelt name was meant to be. Torch-free, so that a slip of the pen is answered at once."""

import difflib
from collections.abc import Iterable

_SIMILAR = 0.5  # difflib's ratio, below its usual 0.6: names here are short, and one slip weighs more in them


def suggestion(word: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?` for the most similar known name, or nothing where none is near.

    Upper and lower case are the same here, and so are `-` and `_`.

    >>> suggestion("pgdd", ("APGD", "FAB", "PGD"))
    "did you mean 'PGD'?"
    >>> suggestion("pdg", ("PDPGD", "PGD"))
    "did you mean 'PGD'?"
    >>> suggestion("corruptions", ("linf", "l2"))
    ''
    """
    names, typed = {_folded(name): name for name in known}, _folded(word)
    close = difflib.get_close_matches(typed, names, n=1, cutoff=_SIMILAR)
    swapped = [name for name in names if _swapped(typed, name)]
    return f"did you mean {names[[*swapped, *close][0]]!r}?" if swapped or close else ""


def _swapped(word: str, name: str) -> bool:
    """Whether two letters that stand side by side have changed places, the slip that difflib weighs most."""
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
