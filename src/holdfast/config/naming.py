"""The names of attacks, known without torch, so that a misspelt one is answered at once."""

from collections.abc import Mapping, Sequence
from typing import Final

from holdfast.config.grammar import Norm, ThreatSpec, nearest
from holdfast.core.errors import UsageError
from holdfast.core.names import slug
from holdfast.metrics.names import CORRUPTIONS

GROUP: Final = "holdfast.attacks"
"""Entry-point group under which other packages add attacks."""

ATTACKS: Final = (
    "ALMA",
    "APGD",
    "BIM",
    "DDN",
    "EAD",
    "FAB",
    "FGSM",
    "FMN",
    "JSMA",
    "NES",
    "PDPGD",
    "PGD",
    "SPSA",
    "ZOO",
    "AdversarialPatch",
    "Bandits",
    "Boundary",
    "CarliniWagner",
    "Corruption",
    "DeepFool",
    "Flow",
    "GeoDA",
    "GridSearch",
    "HopSkipJump",
    "MomentumPGD",
    "PatchAttack",
    "RayS",
    "Relay",
    "SigmaZero",
    "SignOPT",
    "SimBA",
    "SparseRS",
    "Square",
    "SuperDeepFool",
    "SurFree",
    "Transfer",
    "TransformPGD",
    "Universal",
    "UniversalDeepFool",
)
"""What `holdfast.attacks` exports; a test keeps the two in step."""

AUTO: Final = "auto"
"""What `--recipe` takes where the recipe is to be chosen."""

CARD: Final = "card"
"""What `--recipe` of rotate takes where the recipe is that of the model's card, or `standard` without one."""

SOURCES: Final = {
    "basins": "Basins",
    "low-rank": "LowRank",
    "seeds": "Seeds",
    "subset": "Subset",
    "trajectory": "Trajectory",
}
"""Where `rotate collect` takes parameter sets from, and their classes in `holdfast.rotation`."""

RECIPES: Final = {
    "atta": "ATTA",
    "cure": "CURE",
    "curriculum": "CurriculumTraining",
    "ensemble": "EnsembleTraining",
    "fgsm": "SingleStep",
    "fgsm-rs": "SingleStep",
    "free": "FreeTraining",
    "gradient-regularisation": "GradientRegularisation",
    "hat": "HAT",
    "ikl": "IKL",
    "jacobian": "JacobianRegularisation",
    "lipschitz": "LipschitzConstraint",
    "llr": "LLR",
    "margin": "MarginTraining",
    "mart": "MART",
    "multi-norm": "MultiNormTraining",
    "n-fgsm": "SingleStep",
    "pgd": "PGDTraining",
    "score": "SCORE",
    "standard": "Standard",
    "trades": "TRADES",
    "vat": "VAT",
}
"""What `--recipe` takes, and the class of `holdfast.recipes` that it names; a test keeps the two in step."""

PRESETS: Final[Mapping[str, Mapping[str, float | bool]]] = {
    "fgsm": {"noise": 0.0, "step": 1.0, "clip": True},
    "fgsm-rs": {"noise": 1.0, "step": 1.25, "clip": True},
}
"""Settings that make a recipe what its name says, where the defaults of its class are another's."""

PUBLISHED: Final = (
    "MI-FGSM",
    "NI-FGSM",
    "DI-FGSM",
    "TI-FGSM",
    "SI-NI-FGSM",
    "VMI-FGSM",
)
"""Settings of Transfer that their papers gave names to; docs/reference/attacks.md says which are which."""

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
"""Names that suites and their tables give to an attack with settings of its own, and that attack."""

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
"""What each suite calls its attacks under each norm; a test keeps it in step with `holdfast.suites`."""

FLOW: Final = dict.fromkeys(("quick", "fast", "standard"), ("Flow",))
"""The same for images that are bent, as under `spatial:flow=1.5`."""

LABELS_ONLY: Final[Mapping[Norm, tuple[str, ...]]] = {"linf": ("RayS",), "l2": ("HopSkipJump", "SurFree")}
"""The same for `black-box` where labels alone can be seen."""


def members(suite: str, threat: ThreatSpec) -> tuple[str, ...]:
    """What a suite calls its attacks under a threat; empty where it has none."""
    if "flow" in threat.limits:
        return FLOW.get(suite, ())
    by_norm = LABELS_ONLY if suite == "black-box" and threat.access == "labels" else MEMBERS[suite]
    return by_norm.get(threat.norm, ())


def chosen(names: Sequence[str], only: Sequence[str], skip: Sequence[str]) -> set[str]:
    """Slugs of the attacks that `only` and `skip` leave; `UsageError` for a name that is none, or if none is left."""
    known = dict.fromkeys(slug(name) for name in names)
    for wanted in (*only, *skip):
        if slug(wanted) not in known:
            others = map(slug, (*ATTACKS, *VARIANTS))
            hint = (
                f"; there are {', '.join(known)}" if slug(wanted) in others else nearest(slug(wanted), known)
            )
            raise UsageError(f"this suite has no attack {wanted!r}{hint}")
    left = ({slug(name) for name in only} or set(known)) - {slug(name) for name in skip}
    if not left:
        raise UsageError(f"no attack is left; this suite has {', '.join(known)}")
    return left
