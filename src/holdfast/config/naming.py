"""The names of attacks, recipes and other choices in settings. The module does not import torch, so that a misspelt
name is reported immediately.
"""

from collections.abc import Mapping, Sequence
from typing import Final

from holdfast.config.grammar import Norm, ThreatSpec, did_you_mean
from holdfast.core.catalogue import ATTACKS
from holdfast.core.errors import UsageError
from holdfast.core.names import slug
from holdfast.metrics.names import CORRUPTIONS

GROUP: Final = "holdfast.attacks"
"""Entry-point group in which other packages register attacks."""

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

PUBLISHED: Final = (
    "MI-FGSM",
    "NI-FGSM",
    "DI-FGSM",
    "TI-FGSM",
    "SI-NI-FGSM",
    "VMI-FGSM",
)
"""Names from papers for certain settings of the attack Transfer; docs/reference/attacks.md lists the settings."""

VARIANTS: Final = {
    "ALMA-2": "ALMA",
    "APGD-CE": "APGD",
    "APGD-DLR": "APGD",
    "APGD-T": "APGD",
    "FAB-T": "FAB",
    "FAB-T-2": "FAB",
    "PGD-CE": "PGD",
    "Relay-2": "Relay",
    "Sprint": "Relay",
    **dict.fromkeys(PUBLISHED, "Transfer"),
    **dict.fromkeys(CORRUPTIONS, "Corruption"),
}
"""Names of attacks with certain settings in suites and tables, with the names of these attacks."""

_TRANSFER = ("Transfer", *PUBLISHED)
_BLACK_BOX = ("Square",)
_LAST = ("Square", "APGD-T")
_LIMITED: Final[Mapping[Norm, tuple[str, ...]]] = {
    "patch": ("PatchAttack", "PGD"),
    "spatial": ("TransformPGD", "GridSearch"),
    "colour": ("TransformPGD", "GridSearch"),
}
_STANDARD = ("APGD-CE", "APGD-T", "FAB-T", "Square")
MEMBERS: Final[Mapping[str, Mapping[Norm, tuple[str, ...]]]] = {
    "quick": {
        **dict.fromkeys(("linf", "l2", "l1"), ("Sprint",)),
        "l0": ("PGD",),
        "patch": ("PatchAttack",),
        "spatial": ("TransformPGD",),
        "colour": ("TransformPGD",),
    },
    "fast": {
        "linf": ("Sprint", "FMN", "Relay", "Relay-2", *_LAST),
        "l2": ("Sprint", "ALMA", "FAB-T", "ALMA-2", "PDPGD", "FAB-T-2", "Relay", *_LAST),
        "l1": ("Sprint", "PDPGD", "FAB-T", "ALMA-2", "Relay", *_LAST),
        "l0": ("PGD", "SparseRS"),
        "corruptions": CORRUPTIONS,
        **_LIMITED,
    },
    "standard": {
        "linf": _STANDARD,
        "l2": _STANDARD,
        "l1": _STANDARD,
        "l0": ("PGD", "PGD-CE", "PDPGD", "SigmaZero", "SparseRS"),
        "corruptions": CORRUPTIONS,
        **_LIMITED,
    },
    "rand": dict.fromkeys(("linf", "l2", "l1", "l0"), ("APGD-CE", "APGD-DLR")),
    "black-box": {
        "linf": _BLACK_BOX,
        "l2": _BLACK_BOX,
        "l1": _BLACK_BOX,
        "l0": ("SparseRS",),
        "spatial": ("GridSearch",),
        "colour": ("GridSearch",),
    },
    "minimum-norm": {
        "linf": ("DeepFool", "FMN"),
        "l2": ("DeepFool", "ALMA", "PDPGD"),
        "l1": ("ALMA", "PDPGD"),
        "l0": ("PDPGD", "SigmaZero"),
    },
    "corruptions": {"corruptions": CORRUPTIONS},
    "transfer": dict.fromkeys(("linf", "l2", "l1", "l0", "patch"), _TRANSFER),
}
"""Names of the attacks of each suite under each norm. A test compares them with `holdfast.suites`."""

FLOW: Final = dict.fromkeys(("quick", "fast", "standard"), ("Flow",))
"""Names of the attacks of each suite for images that are warped by a flow, as under `spatial:flow=1.5`."""

LABELS_ONLY: Final[Mapping[Norm, tuple[str, ...]]] = {"linf": ("RayS",), "l2": ("HopSkipJump", "SurFree")}
"""Names of the attacks of the suite `black-box` with access to labels only, under each norm."""


def members(suite: str, threat: ThreatSpec) -> tuple[str, ...]:
    """Return the names of the attacks that a suite contains under a threat model, or an empty tuple if it contains
    none.
    """
    if "flow" in threat.limits:
        return FLOW.get(suite, ())
    by_norm = LABELS_ONLY if suite == "black-box" and threat.access == "labels" else MEMBERS[suite]
    return by_norm.get(threat.norm, ())


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
