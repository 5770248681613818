"""Suites of attacks, with names and versions. Suites with equal names and versions contain the same attacks with the
same settings.

`fast` is Holdfast's default suite. Its order starts with the attacks that break the most examples for their cost. The
later attacks process the examples in waves, those nearest to being broken first, and stop after a wave in which they
break none (docs/decisions/0007). `quick` consists of its first attack, with other settings.

`standard` is the composition of AutoAttack standard (Croce & Hein, "Reliable evaluation of adversarial robustness with
an ensemble of diverse parameter-free attacks", ICML 2020, arXiv:2003.01690; for L1 "Mind the box", ICML 2021,
arXiv:2103.01208), and `rand` that of its version for randomised models, so that the numbers can be compared with
published ones. There is no AutoAttack for L0; there `standard` consists of projected gradient descent, PDPGD, SigmaZero
and Sparse-RS.

`black-box` uses only what the threat model allows: scores, or labels. `transfer` sends no queries to the target and
computes its examples on surrogates. Under common corruptions, `fast` and `standard` are `corruptions`, the fifteen of
Hendrycks & Dietterich.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from holdfast.attacks import (
    ALMA,
    APGD,
    FAB,
    FMN,
    PDPGD,
    PGD,
    Corruption,
    DeepFool,
    Flow,
    GridSearch,
    HopSkipJump,
    PatchAttack,
    RayS,
    Relay,
    SigmaZero,
    SparseRS,
    Square,
    SurFree,
    Transfer,
    TransformPGD,
)
from holdfast.attacks.corruption import COUNTED
from holdfast.attacks.pgd import margin_pgd
from holdfast.attacks.protocol import Attack
from holdfast.core.constraints import L0, L1, L2, Constraint, Limited, Linf
from holdfast.core.corruptions import Corruptions
from holdfast.core.errors import UsageError
from holdfast.core.remedies import Remedy
from holdfast.core.types import Access
from holdfast.ops.losses import cross_entropy, dlr

Named = tuple[tuple[str, Attack], ...]
"""Pairs of an attack and its name in a suite."""


@dataclass(frozen=True)
class Suite:
    """A list of attacks with a name and a version. The attacks are run in the order of the list."""

    name: str
    version: int
    attacks: Named
    waves: Mapping[str, int] = field(default_factory=dict)
    """number of halvings of the robust examples, by name of an attack that starts with those nearest to being broken"""
    smallest: bool = False
    """whether the suite searches for the smallest change of every example, instead of any change within eps"""

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


def suite(name: str, constraint: Constraint, access: Access = "gradients") -> Suite:
    """Return the suite of attacks called `name` for a constraint, such as a ball of a norm. Raises `UsageError` if
    there is no such suite for this constraint.

    If `access` is "labels", `black-box` consists of attacks that need only labels.
    """
    if name not in COMPOSED:
        raise UsageError(f"there is no suite {name!r}; expected one of {', '.join(COMPOSED)}")
    if isinstance(constraint, Corruptions):
        if name not in ("fast", "standard", "corruptions"):
            raise UsageError(
                f"there is no suite {name!r} of common corruptions", Remedy("suite", "corruptions")
            )
        name = "corruptions"
    elif isinstance(constraint, Limited):
        composed = LIMITED["flow" if "flow" in constraint.limits else constraint.name]
        if name not in composed:
            if name == "transfer":
                raise UsageError(
                    f"under {constraint} whole images are transformed, and no attack uses a surrogate; give the "
                    "attacker access to the model, as in access=gradients",
                    Remedy("threat", "linf:8/255"),
                )
            raise UsageError(
                f"there is no suite {name!r} under {constraint}; expected one of {', '.join(sorted(composed))}"
            )
        return Suite(name, 1, composed[name])
    elif name == "corruptions":
        norm = constraint.name
        raise UsageError(
            f"the suite corruptions has no attack under {norm}", Remedy("threat", "corruptions:3")
        )
    compose = labels_only if name == "black-box" and access == "labels" else COMPOSED[name]
    return Suite(name, 1, compose(constraint), WAVES.get(name, {}), smallest=name == "minimum-norm")


def variant(name: str, constraint: Constraint) -> Attack | None:
    """Return the attack that suites for a constraint list under `name`, with its settings, or None if no suite does.

    If several suites use the name for attacks with different settings, the first suite in `FIRST` decides.
    """
    for suite_name in FIRST:
        try:
            attacks = dict(suite(suite_name, constraint).attacks)
        except UsageError:  # this suite has no attack under the constraint
            continue
        if name in attacks:
            return attacks[name]
    return None


FIRST = ("standard", "quick", "fast", "rand", "minimum-norm", "corruptions", "transfer", "black-box")
"""Names of suites, in the order in which `variant` searches them for the name of an attack."""

PUBLISHED: Mapping[str, Attack] = {
    "MI-FGSM": Transfer(reach=1, neighbours=0),
    "NI-FGSM": Transfer(reach=1, neighbours=0, ahead=True),
    "DI-FGSM": Transfer(reach=1, diversity=0.5, neighbours=0, momentum=0),
    "TI-FGSM": Transfer(reach=1, shifts=7, neighbours=0, momentum=0),
    "SI-NI-FGSM": Transfer(reach=1, neighbours=0, ahead=True, halvings=4),
    "VMI-FGSM": Transfer(reach=1, neighbours=5, around=1.5),
}
"""`Transfer` with the settings of published attacks, except that VMI has 5 neighbours and its paper 20."""

TRANSFER: Named = (("Transfer", Transfer()), *PUBLISHED.items())
"""Attacks that compute their examples on surrogates: first `Transfer` with its default settings, then `PUBLISHED`."""

_TRANSFORMED: Mapping[str, Named] = {
    "quick": (("TransformPGD", TransformPGD()),),
    **dict.fromkeys(("fast", "standard"), (("TransformPGD", TransformPGD()), ("GridSearch", GridSearch()))),
    "black-box": (("GridSearch", GridSearch()),),
}
LIMITED: Mapping[str, Mapping[str, Named]] = {
    "patch": {
        "quick": (("PatchAttack", PatchAttack(places=8)),),
        **dict.fromkeys(
            ("fast", "standard"),
            (("PatchAttack", PatchAttack(places=50)), ("PGD", margin_pgd(steps=100, restarts=2))),
        ),
        "transfer": TRANSFER,
    },
    "spatial": _TRANSFORMED,
    "flow": {
        "quick": (("Flow", Flow(restarts=2)),),
        **dict.fromkeys(("fast", "standard"), (("Flow", Flow()),)),
    },
    "colour": _TRANSFORMED,
}
"""Suites by constraint and name, for constraints other than norm balls."""


def curve(constraint: Constraint) -> Named:
    """Return the minimum-norm attacks that are used to compute robust accuracy as a function of eps under a
    constraint.
    """
    if isinstance(constraint, Linf):
        return (("FMN", FMN(steps=100)),)
    return (("ALMA", ALMA(steps=100)),) if isinstance(constraint, L2) else (("PDPGD", PDPGD(steps=100)),)


SPRINT = Relay(searches=0, rounds=0)
"""Attack with a few short gradient runs: in `quick`, two from random starts and two towards the nearest classes.

`fast` uses one random start, and under L2 and L1 no target class, because more attacks follow.
"""


def _quick(constraint: Constraint) -> Named:
    if isinstance(constraint, L0):
        return (("PGD", margin_pgd(steps=50, restarts=2)),)
    return (("Sprint", SPRINT),)


def _fast(constraint: Constraint) -> Named:
    if isinstance(constraint, L0):
        return (("PGD", margin_pgd(steps=100, restarts=2)), ("SparseRS", SparseRS(queries=5000)))
    last = (("Square", Square(queries=500)), ("APGD-T", APGD(loss=dlr, steps=50, targets=3)))
    if isinstance(constraint, Linf):
        begin = ("Sprint", replace(SPRINT, restarts=1))
        relay = Relay(restarts=1, targets=3, searches=2, rounds=2, queries=150)
        # two Relays, the second on the margins that the first has lowered, break more than one of twice the length
        longer = replace(relay, searches=3, rounds=3)
        return (begin, ("FMN", FMN(steps=60)), ("Relay", relay), ("Relay-2", longer), *last)
    # under L2 and L1, targeted runs break nothing that later attacks do not break (docs/decisions/0007)
    begin = ("Sprint", replace(SPRINT, restarts=1, targets=0))
    # 60 % beyond the plane breaks more than 5 %, and patience ends runs that would stay outside the ball
    planes = ("FAB-T", FAB(steps=60, targets=5, eta=1.6, patience=10, refine=20))
    # a first step of twice the length breaks other examples than the default one
    wider = ("ALMA-2", ALMA(steps=60, reach=4, refine=20))
    windows = ("Relay", Relay(restarts=0, targets=0, searches=2, rounds=0, queries=100))
    if isinstance(constraint, L1):
        check = (("Square", Square(queries=1000)), ("APGD-T", APGD(loss=dlr, steps=100, targets=3)))
        return (begin, ("PDPGD", PDPGD(steps=100, refine=20)), planes, wider, windows, *check)
    first, proximal = ("ALMA", ALMA(steps=60, refine=20)), ("PDPGD", PDPGD(steps=50, refine=20))
    # steps of 30 % beyond the plane break examples that those of 60 % miss
    finer = ("FAB-T-2", FAB(steps=45, targets=4, eta=1.3, patience=15, refine=20))
    return (begin, first, planes, wider, proximal, finer, windows, *last)


def _standard(constraint: Constraint) -> Named:
    if isinstance(constraint, L0):
        thorough = margin_pgd(steps=100, restarts=5)
        return (
            ("PGD", thorough),
            ("PGD-CE", PGD(steps=100, reach=20.0, restarts=2, loss=cross_entropy)),
            ("PDPGD", PDPGD(steps=100)),
            ("SigmaZero", SigmaZero(steps=100)),
            ("SparseRS", SparseRS(queries=5000)),
        )
    sparse = isinstance(constraint, L1)
    return (
        ("APGD-CE", APGD(loss=cross_entropy, steps=100, restarts=5 if sparse else 1, shrink=sparse)),
        ("APGD-T", APGD(loss=dlr, steps=100, targets=5 if sparse else 9, shrink=sparse)),
        ("FAB-T", FAB(steps=100, targets=9)),
        ("Square", Square(queries=5000, scale_schedule=False)),
    )


def _rand(constraint: Constraint) -> Named:
    return (
        ("APGD-CE", APGD(loss=cross_entropy, steps=100, draws=20)),
        ("APGD-DLR", APGD(loss=dlr, steps=100, draws=20)),
    )


def _black_box(constraint: Constraint) -> Named:
    if isinstance(constraint, L0):
        return (("SparseRS", SparseRS(queries=5000)),)
    return (("Square", Square(queries=5000)),)


def labels_only(constraint: Constraint) -> Named:
    """Return the attacks of the suite `black-box` for an attacker that gets only the labels that the model predicts.

    Raises `UsageError` if there are none.
    """
    if isinstance(constraint, Linf):
        return (("RayS", RayS(queries=5000)),)
    if isinstance(constraint, L2):
        return (("HopSkipJump", HopSkipJump(queries=5000)), ("SurFree", SurFree(queries=5000)))
    norm = constraint.name
    raise UsageError(
        f"the suite 'black-box' has no attack under {norm} that needs only labels; use linf or l2"
    )


def _minimum_norm(constraint: Constraint) -> Named:
    if isinstance(constraint, L2):
        return (("DeepFool", DeepFool()), ("ALMA", ALMA(steps=100)), ("PDPGD", PDPGD(steps=100)))
    if isinstance(constraint, L1):
        return (("ALMA", ALMA(steps=100)), ("PDPGD", PDPGD(steps=200)))
    if isinstance(constraint, L0):
        return (("PDPGD", PDPGD(steps=100)), ("SigmaZero", SigmaZero(steps=200)))
    return (("DeepFool", DeepFool()), ("FMN", FMN(steps=100)))


def _corruptions(constraint: Constraint) -> Named:
    return tuple((name, Corruption(name)) for name in COUNTED)


def _transfer(constraint: Constraint) -> Named:
    return TRANSFER


COMPOSED: dict[str, Callable[[Constraint], Named]] = {
    "quick": _quick,
    "fast": _fast,
    "standard": _standard,
    "rand": _rand,
    "black-box": _black_box,
    "minimum-norm": _minimum_norm,
    "corruptions": _corruptions,
    "transfer": _transfer,
}
"""Functions that return the attacks of a suite for a constraint, by the name of the suite."""

WAVES: Mapping[str, Mapping[str, int]] = {
    "fast": {
        **dict.fromkeys(("ALMA", "ALMA-2"), 3),
        **dict.fromkeys(("FMN", "FAB-T", "FAB-T-2", "PDPGD", "Relay-2", "SparseRS"), 4),
        **dict.fromkeys(("Relay", "Square", "APGD-T"), 5),
    }
}
"""Number of halvings of each attack that runs in waves, by suite and attack; see `Suite.waves`."""
