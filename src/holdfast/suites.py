"""Named lists of attacks, versioned: the same name and version are the same attacks with the same settings.

`standard` is the composition of AutoAttack standard (Croce & Hein, "Reliable evaluation of adversarial robustness with
an ensemble of diverse parameter-free attacks", ICML 2020, arXiv:2003.01690; for L1 "Mind the box", ICML 2021,
arXiv:2103.01208), `rand` that of its version for randomised models, so that the numbers may stand beside published
ones. There is no AutoAttack for L0; there `standard` is projected gradient descent, FMN and Sparse-RS. Under
common corruptions `standard` is `corruptions`, the fifteen of Hendrycks & Dietterich.
"""

from collections.abc import Callable
from dataclasses import dataclass

from holdfast.attacks import APGD, DDN, FAB, FMN, PGD, Corruption, DeepFool, SparseRS, Square
from holdfast.attacks.corruption import COUNTED
from holdfast.attacks.protocol import Attack
from holdfast.core.constraints import L0, L1, L2, Constraint, Linf
from holdfast.core.corruptions import Corruptions
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
    if isinstance(constraint, Corruptions):
        if name not in ("standard", "corruptions"):
            raise UsageError(f"there is no suite {name!r} of common corruptions; choose --suite corruptions")
        name = "corruptions"
    elif name == "corruptions":
        norm = type(constraint).__name__.lower()
        raise UsageError(
            f"the suite corruptions has nothing under {norm}; choose a threat such as corruptions:3"
        )
    return Suite(name, 1, COMPOSED[name](constraint), smallest=name == "minimum-norm")


def curve(constraint: Constraint) -> Named:
    """The minimum-norm attacks that accuracy against eps is read from."""
    if isinstance(constraint, L2):
        return (("DDN", DDN(steps=100)),)
    return (("FMN", FMN(steps=100)),)


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
            ("FMN", FMN(steps=200)),
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


def _minimum_norm(constraint: Constraint) -> Named:
    if isinstance(constraint, L2):
        return (("DeepFool", DeepFool()), ("DDN", DDN(steps=100)), ("FMN", FMN(steps=100)))
    if isinstance(constraint, Linf):
        return (("DeepFool", DeepFool()), ("FMN", FMN(steps=100)))
    return (("FMN", FMN(steps=200)),)


def _corruptions(constraint: Constraint) -> Named:
    return tuple((name, Corruption(name)) for name in COUNTED)


COMPOSED: dict[str, Callable[[Constraint], Named]] = {
    "quick": _quick,
    "standard": _standard,
    "rand": _rand,
    "black-box": _black_box,
    "minimum-norm": _minimum_norm,
    "corruptions": _corruptions,
}
"""Every suite by its name."""
