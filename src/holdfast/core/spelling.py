"""What a misspelt name was meant to be. Torch-free, so that a slip of the pen is answered at once."""

import difflib
from collections.abc import Iterable

_SIMILAR = 0.5  # difflib's ratio, below its usual 0.6: names here are short, and one slip weighs more in them


def suggestion(word: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?` for the most similar known name, or nothing where none is near.

    Upper and lower case are the same here, and so are `-` and `_`.

    >>> suggestion("pgdd", ("APGD", "FAB", "PGD"))
    "did you mean 'PGD'?"
    >>> suggestion("corruptions", ("linf", "l2"))
    ''
    """
    names = {_folded(name): name for name in known}
    close = difflib.get_close_matches(_folded(word), names, n=1, cutoff=_SIMILAR)
    return f"did you mean {names[close[0]]!r}?" if close else ""


def _folded(name: str) -> str:
    return name.casefold().replace("-", "_")
