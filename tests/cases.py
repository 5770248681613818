"""Every attack under every norm it is made for; each line runs every law of `holdfast.testing.laws`."""

from dataclasses import fields, replace

from holdfast.attacks import (
    ALMA,
    APGD,
    BIM,
    DDN,
    EAD,
    FAB,
    FGSM,
    FMN,
    JSMA,
    NES,
    PDPGD,
    PGD,
    SPSA,
    ZOO,
    Bandits,
    Boundary,
    CarliniWagner,
    DeepFool,
    Flow,
    GeoDA,
    GridSearch,
    HopSkipJump,
    MomentumPGD,
    PatchAttack,
    RayS,
    Relay,
    SigmaZero,
    SignOPT,
    SimBA,
    SparseRS,
    Square,
    SuperDeepFool,
    SurFree,
    Thresholds,
    Transfer,
    TransformPGD,
)
from holdfast.core.constraints import L0, L1, L2, Linf
from holdfast.testing.laws import Case
from holdfast.threats.transformations import Colour, Patch, Spatial

# How near each comes to the exact distance, with a margin below the worst of 40 examples on each of 16 linear models;
# `many` is left out where it is that of what climbs the cross-entropy, 0.47 at worst.
ATTACKS = [
    Case(FGSM(), Linf),
    # one step, which the box cuts short; momentum keeps to its first direction alike
    Case(FGSM(), L2, slack=0.75),
    Case(BIM(), Linf),
    Case(BIM(), L2),
    Case(MomentumPGD(), Linf),
    Case(MomentumPGD(), L2, slack=0.75),
    Case(PGD(), Linf, many=0.6),
    Case(PGD(), L2, many=0.6),
    Case(PGD(), L1, slack=0.85, many=0.5),
    Case(PGD(), L0, many=0.95),
    Case(APGD(), Linf),
    Case(APGD(), L2),
    Case(APGD(), L1, slack=0.85, many=0.25),
    Case(Relay(searches=1, rounds=1, queries=50), Linf),
    Case(Relay(searches=1, rounds=1, queries=50), L2),
    Case(Relay(searches=1, rounds=1, queries=50), L1, slack=0.85, many=0.5),
    Case(FAB(steps=10), Linf, many=0.95),
    Case(FAB(steps=10), L2, many=0.95),
    Case(FAB(steps=10), L1, many=0.95),
    Case(FAB(steps=20, patience=5, refine=5), Linf, many=0.95, variant="refined"),
    Case(FAB(steps=20, patience=5, refine=5), L2, many=0.95, variant="refined"),
    Case(FAB(steps=20, patience=5, refine=5), L1, many=0.95, variant="refined"),
    # random search: under L2 300 queries are no nearer and 600 at 0.69, under L1 150 are at 0.41 and 300 at 0.81
    Case(Square(queries=150), Linf, slack=0.9, many=0.6),
    Case(Square(queries=150), L2, slack=0.6, many=0.45),
    Case(Square(queries=300), L1, slack=0.75, many=0.5),
    Case(Thresholds(queries=150), Linf),
    Case(RayS(queries=400), Linf, slack=0.9, many=0.6, smallest=True),
    # from labels alone, with as few queries as still come near: 300 are at 0.9, 0.78, 0.87, 0.7, 0.98, 0.84 and 0.74
    Case(HopSkipJump(queries=150), L2, slack=0.55, many=0.2, smallest=True),
    Case(HopSkipJump(queries=150), Linf, slack=0.5, many=0.25, smallest=True),
    Case(GeoDA(queries=150), L2, slack=0.65, many=0.3, smallest=True),
    Case(GeoDA(queries=150), Linf, slack=0.5, many=0.25, smallest=True),
    Case(SurFree(queries=150), L2, slack=0.75, many=0.35, smallest=True),
    Case(SignOPT(queries=150), L2, slack=0.55, many=0.25, smallest=True),
    Case(Boundary(queries=150), L2, slack=0.45, many=0.25, smallest=True),
    Case(SimBA(queries=150), Linf, many=0.6),
    Case(SimBA(queries=150), L2, slack=0.75, many=0.5),
    Case(SimBA(queries=150, basis="cosines"), Linf, variant="cosines", slack=0.8, many=0.5),
    Case(SimBA(queries=150, basis="cosines"), L2, variant="cosines", slack=0.75, many=0.5),
    # estimated gradients: 150 queries are 17 steps
    Case(NES(queries=150, pairs=4), Linf, slack=0.7, many=0.5),
    Case(NES(queries=150, pairs=4), L1, slack=0.5, many=0.2),
    Case(SPSA(queries=150, pairs=4), Linf, slack=0.7, many=0.5),
    Case(SPSA(queries=150, pairs=4), L2, slack=0.75, many=0.5),
    Case(SPSA(queries=150, pairs=4), L0, slack=0.6, many=0.45),
    Case(Bandits(queries=150), Linf, slack=0.8, many=0.5),
    Case(Bandits(queries=150), L2, slack=0.85, many=0.6),
    Case(ZOO(queries=500, coordinates=12), L2, slack=0.5, many=0.3, smallest=True),
    Case(SparseRS(queries=150), L0, many=0.95),
    Case(DeepFool(), Linf, many=0.6, smallest=True),
    Case(DeepFool(), L2, many=0.85, smallest=True),
    Case(DeepFool(), L1, many=0.75, smallest=True),
    Case(CarliniWagner(searches=4, steps=20), Linf, slack=0.9, many=0.5, smallest=True),
    Case(CarliniWagner(searches=4, steps=20), L2, slack=0.85, many=0.55, smallest=True),
    Case(DDN(steps=30), L2, many=0.3, smallest=True),
    Case(FMN(steps=40), Linf, many=0.5, smallest=True),
    Case(FMN(steps=40), L2, many=0.5, smallest=True),
    Case(FMN(steps=40), L1, many=0.45, smallest=True),
    Case(FMN(steps=40), L0, many=0.95, smallest=True),
    # Adam's steps know little of a line: after 100 of them 0.8 under L2, 0.9 under L1
    Case(PDPGD(steps=40), Linf, many=0.5, smallest=True),
    Case(PDPGD(steps=40), L2, slack=0.7, many=0.5, smallest=True),
    Case(PDPGD(steps=40), L1, slack=0.6, many=0.4, smallest=True),
    Case(PDPGD(steps=40, refine=5), Linf, many=0.5, smallest=True, variant="refined"),
    Case(PDPGD(steps=40, refine=5), L0, many=0.95, smallest=True, variant="refined"),
    Case(PDPGD(steps=40, refine=5), L2, slack=0.7, many=0.5, smallest=True, variant="refined"),
    Case(PDPGD(steps=40, refine=5), L1, slack=0.6, many=0.4, smallest=True, variant="refined"),
    Case(PDPGD(steps=40), L0, many=0.95, smallest=True),
    Case(ALMA(steps=40), L2, many=0.7, smallest=True),
    Case(ALMA(steps=40, refine=5), L2, many=0.7, smallest=True, variant="refined"),
    Case(ALMA(steps=40, refine=5), L1, slack=0.9, many=0.5, smallest=True, variant="refined"),
    Case(ALMA(steps=40), L1, slack=0.9, many=0.5, smallest=True),
    Case(SuperDeepFool(steps=20), L2, many=0.85, smallest=True),
    Case(EAD(searches=4, steps=20), L1, slack=0.75, many=0.4, smallest=True),
    Case(JSMA(), L0, many=0.95, smallest=True),
    Case(SigmaZero(steps=40), L0, many=0.95, smallest=True),
    # the model is its own surrogate
    Case(Transfer(neighbours=1), Linf),
    Case(Transfer(neighbours=1), L2),
    Case(Transfer(neighbours=1), L1, slack=0.9, many=0.25),
    Case(Transfer(neighbours=1), L0),
    Case(
        Transfer(steps=4, ahead=True, diversity=0.5, halvings=1, neighbours=0),
        Linf,
        variant="copies",
        many=0.3,
    ),
]


STEPS, QUERIES = 12, 60
"""Of the laws that ask nothing of an attack's strength; the planted bugs are found with 8 steps."""


def brief(case):
    """The case with few steps and queries: what it does at each step stays the same."""
    limits = {"steps": STEPS, "queries": QUERIES}
    settings = {field.name for field in fields(case.attack)} & set(limits)
    shorter = {name: min(getattr(case.attack, name), limits[name]) for name in settings}
    return replace(case, attack=replace(case.attack, **shorter))


def patch(eps):
    """A patch has no radius."""
    return Patch(2, 2)


def confined(eps):
    """Away from the image's sides."""
    return Patch(2, 2, within="1:1-3:3")


def centred(eps):
    """In the middle of the image."""
    return Patch(2, 2, "centre", 1)


def spatial(eps):
    """Turns, shifts and scales."""
    return Spatial(rotate=60, shift=1, scale=0.2)


def flow(eps):
    """Pixels out of their places."""
    return Spatial(flow=0.7)


def colour(eps):
    """Colours and brightness."""
    return Colour(hue=90, saturation=0.5, brightness=0.3, contrast=0.5)


LIMITED = [
    Case(PatchAttack(steps=10, places=2), patch),
    Case(PatchAttack(steps=10, places=2), centred),
    Case(PatchAttack(steps=10, places=2), confined),
    Case(PGD(steps=10), patch),
    Case(TransformPGD(steps=5, restarts=3), spatial),
    Case(TransformPGD(steps=5, restarts=3), colour),
    Case(GridSearch(turns=5, values=3), spatial),
    Case(Flow(steps=8, restarts=2), flow),
    Case(GridSearch(values=3), colour),
]
