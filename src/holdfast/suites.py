"""Named lists of attacks, versioned: the same name and version are the same attacks with the same settings.

`standard` is the composition of AutoAttack standard (Croce & Hein, "Reliable evaluation of adversarial robustness with
an ensemble of diverse parameter-free attacks", ICML 2020, arXiv:2003.01690; for L1 "Mind the box", ICML 2021,
arXiv:2103.01208), `rand` that of its version for randomised models, so that the numbers may stand beside published
ones. There is no AutoAttack for L0; there `standard` is projected gradient descent, PDPGD and
SigmaZero.
"""

from collections.abc import Callable
from dataclasses import dataclass

from holdfast.attacks import ALMA, APGD, FAB, FMN, PDPGD, PGD, DeepFool, SigmaZero, Square
from holdfast.attacks.protocol import Attack
from holdfast.core.constraints import L0, L1, L2, Constraint, Linf
from holdfast.core.errors import UsageError
from holdfast.ops.losses import cross_entropy, dlr

Named = tuple[tuple[str, Attack], ...]
"""Attacks with the names that a suite gives them."""


@dataclass(frozen=True)
class Suite:
    """A name, a version, and the attacks in their order."""

    name: str
    version: int
    attacks: Named
    smallest: bool = False
    """asks for the smallest change of every example, instead of for any change within eps"""

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


def suite(name: str, constraint: Constraint) -> Suite:
    """The suite of that name for a constraint; raises `UsageError` if there is none."""
    if name not in COMPOSED:
        raise UsageError(f"there is no suite {name!r}; there are {', '.join(COMPOSED)}")
    return Suite(name, 1, COMPOSED[name](constraint), smallest=name == "minimum-norm")


def curve(constraint: Constraint) -> Named:
    """The minimum-norm attacks that accuracy against eps is read from."""
    if isinstance(constraint, Linf):
        return (("FMN", FMN(steps=100)),)
    return (("ALMA", ALMA(steps=100)),) if isinstance(constraint, L2) else (("PDPGD", PDPGD(steps=100)),)


def _quick(constraint: Constraint) -> Named:
    if not isinstance(constraint, (Linf, L2)):
        return (("PGD", PGD(steps=50, restarts=2)),)
    sprint = PGD(steps=20, reach=10, restarts=3)
    return (("PGD", sprint), ("APGD-T", APGD(loss=dlr, steps=20, targets=3)))


def _standard(constraint: Constraint) -> Named:
    if isinstance(constraint, L0):
        thorough = PGD(steps=100, restarts=5)
        return (
            ("PGD", thorough),
            ("PGD-CE", PGD(steps=100, restarts=2, loss=cross_entropy)),
            ("PDPGD", PDPGD(steps=100)),
            ("SigmaZero", SigmaZero(steps=100)),
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
        raise UsageError("the suite 'black-box' has no attack under l0 yet; use linf, l2 or l1")
    return (("Square", Square(queries=5000)),)


def _minimum_norm(constraint: Constraint) -> Named:
    if isinstance(constraint, L2):
        return (("DeepFool", DeepFool()), ("ALMA", ALMA(steps=100)), ("PDPGD", PDPGD(steps=100)))
    if isinstance(constraint, L1):
        return (("ALMA", ALMA(steps=100)), ("PDPGD", PDPGD(steps=200)))
    if isinstance(constraint, L0):
        return (("PDPGD", PDPGD(steps=100)), ("SigmaZero", SigmaZero(steps=200)))
    return (("DeepFool", DeepFool()), ("FMN", FMN(steps=100)))


COMPOSED: dict[str, Callable[[Constraint], Named]] = {
    "quick": _quick,
    "standard": _standard,
    "rand": _rand,
    "black-box": _black_box,
    "minimum-norm": _minimum_norm,
}
"""Every suite by its name."""
