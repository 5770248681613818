"""Every attack under every norm it is made for; each line runs every law of `holdfast.testing.laws`."""

from holdfast.attacks import (
    APGD,
    BIM,
    DDN,
    FAB,
    FGSM,
    FMN,
    PGD,
    CarliniWagner,
    DeepFool,
    MomentumPGD,
    Square,
)
from holdfast.core.constraints import L0, L1, L2, Linf
from holdfast.testing.laws import Case

ATTACKS = [
    Case(FGSM(), Linf, slack=0.5),
    Case(FGSM(), L2, slack=0.5),
    Case(BIM(), Linf, slack=0.9),
    Case(BIM(), L2, slack=0.9),
    Case(MomentumPGD(), Linf, slack=0.9),
    Case(MomentumPGD(), L2, slack=0.9),
    Case(PGD(), Linf),
    Case(PGD(), L2),
    Case(PGD(), L1, slack=0.8),
    Case(PGD(), L0, slack=0.8),
    Case(APGD(), Linf),
    Case(APGD(), L2),
    Case(APGD(), L1, slack=0.8),
    Case(FAB(steps=10), Linf),
    Case(FAB(steps=10), L2),
    Case(FAB(steps=10), L1, slack=0.8),
    Case(Square(queries=150), Linf, slack=0.6),
    Case(Square(queries=150), L2, slack=0.3),
    Case(Square(queries=150), L1, slack=0.3),
    Case(DeepFool(), Linf, smallest=True),
    Case(DeepFool(), L2, smallest=True),
    Case(DeepFool(), L1, slack=0.8, smallest=True),
    Case(CarliniWagner(searches=4, steps=20), Linf, slack=0.85, smallest=True),
    Case(CarliniWagner(searches=4, steps=20), L2, slack=0.85, smallest=True),
    Case(DDN(steps=30), L2, smallest=True),
    Case(FMN(steps=40), Linf, smallest=True),
    Case(FMN(steps=40), L2, smallest=True),
    Case(FMN(steps=40), L1, slack=0.8, smallest=True),
    Case(FMN(steps=40), L0, slack=0.5, smallest=True),
]
