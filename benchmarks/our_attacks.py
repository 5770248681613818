"""Our attack for each comparison of `attack_cases`, at the settings that stand there."""

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
    RayS,
    Square,
)
from holdfast.attacks.protocol import Attack
from holdfast.ops.losses import cross_entropy, dlr

REACH = 2.5
"""40 steps of 0.01875 at eps 0.3, of 0.125 at 2, of 0.625 at 10: each a path of 2.5 eps."""


def ours_for(name: str) -> dict[str, Attack]:
    """By what the table calls it: at the reference's own loss, and at ours where that differs."""
    kind, _, rest = name.partition("-")
    if name == "fgsm":
        return {"holdfast": FGSM()}
    if name == "bim":
        return {"holdfast": BIM(steps=40, reach=40 * 0.01 / 0.3)}
    if name == "momentum-pgd":
        return {"holdfast": MomentumPGD(steps=40, reach=REACH)}
    if kind == "pgd":
        same = PGD(steps=40, reach=REACH, loss=cross_entropy)
        return {"holdfast, cross-entropy": same, "holdfast": PGD(steps=40, reach=REACH)}
    if kind == "apgd":
        return {"holdfast": _apgd(rest)}
    if kind == "fab":
        return {"holdfast": FAB(steps=100, targets=9 if rest.startswith("t-") else 0)}
    if kind == "square":
        return {"holdfast": Square(queries=1000)}
    if kind == "rays":
        return {"holdfast": RayS(queries=int(rest))}
    if kind == "deepfool":
        return {"holdfast": DeepFool(steps=50)}
    if name == "cw-l2":
        return {"holdfast": CarliniWagner(searches=9, steps=100)}
    if name == "cw-linf":
        return {"holdfast": CarliniWagner(steps=100)}
    if kind == "ddn":
        return {"holdfast": DDN(steps=int(rest))}
    return {"holdfast": FMN(steps=100)}


def _apgd(rest: str) -> APGD:
    if rest.startswith("t-"):
        return APGD(loss=dlr, steps=100, targets=9)
    loss = dlr if rest.startswith("dlr") else cross_entropy
    return APGD(loss=loss, steps=100, shrink=rest.endswith("l1"))
