"""The names of attacks, recipes and other choices in settings. The module does not import torch, so that a misspelt
name is reported immediately.
"""

from collections.abc import Sequence
from typing import Final

from holdfast.attacks.suites import VARIANTS
from holdfast.core.catalogue import ATTACKS
from holdfast.core.errors import UsageError
from holdfast.core.names import slug
from holdfast.core.spelling import did_you_mean

AUTO: Final = "auto"
"""Value of `--recipe` that selects a recipe automatically."""

CARD: Final = "card"
"""Value of `--recipe` for `rotate`: the recipe in the card of the model, or `standard` for a model without a card."""

SOURCES: Final = {
    "basins": "Basins",
    "low-rank": "LowRank",
    "seeds": "Seeds",
    "subset": "Subset",
}
"""Names of the sources of parameter sets for `rotate collect`, with the names of their classes in
`holdfast.rotation`."""

ENSEMBLE, MIXED = "ensemble:", "mixed:"
"""Addresses of a model that consists of the models in the setting `members`."""
COMBINATIONS: Final = ("logits", "mean", "votes")
"""Ways of combining the members of an ensemble, which follow the address `ensemble:`; the first is the default."""


def chosen(names: Sequence[str], only: Sequence[str], skip: Sequence[str]) -> set[str]:
    """Return the attacks of a suite, as normalised names, that remain after the options `only` and `skip` are applied.

    Raises `UsageError` for unknown names, or if no attack remains.
    """
    available = dict.fromkeys(slug(name) for name in names)
    for option in (*only, *skip):
        if slug(option) not in available:
            others = map(slug, (*ATTACKS, *VARIANTS))
            hint = (
                f"; expected one of {', '.join(available)}"
                if slug(option) in others
                else did_you_mean(slug(option), available)
            )
            raise UsageError(f"this suite has no attack {option!r}{hint}")
    remaining = ({slug(name) for name in only} or set(available)) - {slug(name) for name in skip}
    if not remaining:
        raise UsageError(f"no attack is left; this suite has {', '.join(available)}")
    return remaining
