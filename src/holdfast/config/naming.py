"""The names of attacks, known without torch, so that a misspelt one is answered at once."""

import difflib
from importlib.metadata import entry_points
from typing import Final

from holdfast.config.grammar import nearest
from holdfast.core.errors import UsageError

GROUP: Final = "holdfast.attacks"
"""Entry-point group under which other packages add attacks."""

ATTACKS: Final = (
    "APGD",
    "BIM",
    "DDN",
    "FAB",
    "FGSM",
    "FMN",
    "PGD",
    "CarliniWagner",
    "DeepFool",
    "MomentumPGD",
    "Square",
)
"""What `holdfast.attacks` exports; a test keeps the two in step."""

VARIANTS: Final = {"APGD-CE": "APGD", "APGD-DLR": "APGD", "APGD-T": "APGD", "FAB-T": "FAB", "PGD-CE": "PGD"}
"""Names that suites and their tables give to an attack with settings of its own, and that attack."""


def attack_named(name: str) -> str:
    """The same name, if an attack has it; raises `UsageError` with the nearest one."""
    known = _known()
    if name in known:
        return name
    variant = _folded(VARIANTS).get(name.casefold())
    if variant is not None:
        of = VARIANTS[variant]
        raise UsageError(
            f"{variant} is the name that suites give to {of} with settings of its own; "
            f"name {of} (see holdfast attacks {of})"
        )
    folded = _folded(known)
    close = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.5)
    raise UsageError(f"there is no attack {name!r}{nearest(folded[close[0]] if close else name, known)}")


def attack_meant(name: str) -> str:
    """The attack that a person means: in any case of letters, or by the name that a suite's table shows."""
    found = {**_folded(VARIANTS), **_folded(_known())}.get(name.casefold(), name)
    return attack_named(VARIANTS.get(found, found))


def _known() -> list[str]:
    return [*ATTACKS, *(entry.name for entry in entry_points(group=GROUP))]


def _folded(names: list[str] | dict[str, str]) -> dict[str, str]:
    return {name.casefold(): name for name in names}
