"""Attacks that follow gradients inside an eps."""

from functools import partial

from benchmarks.comparisons.comparison import Comparison
from benchmarks.comparisons.running import advlib, autoattack, cleverhans, foolbox, sparse, torchattacks
from holdfast.attacks import APGD, BIM, FAB, FGSM, PGD, MomentumPGD
from holdfast.attacks.parts.losses import cross_entropy, dlr

REACH = 2.5
"""40 steps of 0.01875 at eps 0.3, of 0.125 at 2, of 0.625 at 10: each a path of 2.5 eps."""
PGD40 = {"steps": 40, "step_size": 0.01875}
PGDS = {
    "holdfast, cross-entropy": PGD(steps=40, reach=REACH, loss=cross_entropy),
    "holdfast": PGD(steps=40, reach=REACH),
}
apgd = partial(autoattack, "autopgd_base.APGDAttack", n_iter=100)

COMPARISONS = [
    Comparison(
        "fgsm", "Linf", 0.3, {}, {"holdfast": FGSM()},
        {"torchattacks": torchattacks("FGSM"), "foolbox": foolbox("FGSM")},
    ),
    Comparison(
        "bim", "Linf", 0.3, {"steps": 40, "step_size": 0.01}, {"holdfast": BIM(steps=40, reach=40 * 0.01 / 0.3)},
        {"torchattacks": torchattacks("BIM", alpha=0.01, steps=40),
         "foolbox": foolbox("LinfBasicIterativeAttack", abs_stepsize=0.01, steps=40)},
    ),
    Comparison(
        "pgd-linf", "Linf", 0.3, PGD40, PGDS,
        {"torchattacks": torchattacks("PGD", alpha=0.01875, steps=40),
         "foolbox": foolbox("LinfPGD", abs_stepsize=0.01875, steps=40),
         "adv-lib": advlib("pgd_linf", ε=0.3, steps=40, absolute_step_size=0.01875)},
        seeds=(0, 1, 2, 3, 4),
    ),
    Comparison(
        "pgd-l2", "L2", 2.0, {"steps": 40, "step_size": 0.125}, PGDS,
        {"foolbox": foolbox("L2PGD", abs_stepsize=0.125, steps=40),
         "torchattacks": torchattacks("PGDL2", alpha=0.125, steps=40)},
        seeds=(0, 1, 2),
    ),
    Comparison(
        "pgd-l1", "L1", 10.0, {"steps": 40, "step_size": 0.625}, PGDS,
        {"foolbox SLIDE": foolbox("SparseL1DescentAttack", abs_stepsize=0.625, steps=40),
         "foolbox PGD": foolbox("L1PGD", abs_stepsize=0.625, steps=40),
         "cleverhans SLIDE": cleverhans("sparse_l1_descent", eps_iter=0.625, nb_iter=40, rand_init=True)},
        seeds=(0, 1, 2),
    ),
    Comparison(
        "pgd-l0", "L0", 25, {"steps": 40}, PGDS, {"sparse-imperceivable-attacks": sparse(40, 30000 / 255)},
        seeds=(0, 1, 2), note="the authors' MNIST step size, on the L1-normalised gradient",
    ),
    Comparison(
        "momentum-pgd", "Linf", 0.3, {"steps": 40, "step_size": 0.01875, "decay": 1.0},
        {"holdfast": MomentumPGD(steps=40, reach=REACH, loss=cross_entropy)},
        {"torchattacks": torchattacks("MIFGSM", alpha=0.01875, steps=40, decay=1.0),
         "foolbox": foolbox("MIFGSM", abs_stepsize=0.01875, steps=40, momentum=1.0)},
    ),
    *(
        Comparison(
            f"apgd-ce-{norm.lower()}", norm, eps, {"steps": 100},
            {"holdfast": APGD(loss=cross_entropy, steps=100, shrink=norm == "L1")},
            {"AutoAttack": apgd(loss="ce", **({"use_largereps": True} if norm == "L1" else {}))}, seeds=(0, 1, 2),
        )
        for norm, eps in (("Linf", 0.3), ("L2", 2.0), ("L1", 10.0))
    ),
    Comparison(
        "apgd-dlr-linf", "Linf", 0.3, {"steps": 100}, {"holdfast": APGD(loss=dlr, steps=100)},
        {"AutoAttack": apgd(loss="dlr")}, seeds=(0, 1, 2),
    ),
    *(
        Comparison(
            f"apgd-t-{norm.lower()}", norm, eps, {"steps": 100, "targets": 9},
            {"holdfast": APGD(loss=dlr, steps=100, targets=9)},
            {"AutoAttack": autoattack("autopgd_base.APGDAttack_targeted", n_iter=100)},
        )
        for norm, eps in (("Linf", 0.3), ("L2", 2.0))
    ),
    *(
        Comparison(
            f"fab{'-t' if targeted else ''}-{norm.lower()}", norm, eps, {"steps": 100},
            {"holdfast": FAB(steps=100, targets=9 if targeted else 0)},
            {"AutoAttack": autoattack("fab_pt.FABAttack_PT", n_iter=100, n_restarts=1, targeted=targeted)},
            n=50,
        )
        for norm, eps in (("Linf", 0.3), ("L2", 2.0), ("L1", 10.0))
        for targeted in (False, True)
    ),
]  # fmt: skip
