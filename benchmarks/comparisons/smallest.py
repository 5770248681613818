"""Attacks that look for the smallest change."""

from functools import partial

from benchmarks.comparisons.comparison import UNDEFENDED, Comparison
from benchmarks.comparisons.running import advlib, cleverhans, foolbox
from holdfast.attacks import DDN, FMN, CarliniWagner, DeepFool

LINF, L2, L1, L0 = float("inf"), 2, 1, 0
minimal = partial(Comparison, eps=None, network=UNDEFENDED, n=100)

COMPARISONS = [
    minimal(
        "deepfool-l2", "L2", settings={"steps": 50}, ours={"holdfast": DeepFool(steps=50)},
        references={"adv-lib": advlib("df", steps=50, norm=2), "foolbox": foolbox("L2DeepFoolAttack", steps=50)},
    ),
    minimal(
        "deepfool-linf", "Linf", settings={"steps": 50}, ours={"holdfast": DeepFool(steps=50)},
        references={"adv-lib": advlib("df", steps=50, norm=LINF),
                    "foolbox": foolbox("LinfDeepFoolAttack", steps=50)},
    ),
    minimal(
        "cw-l2", "L2", settings={"searches": 9, "steps": 100, "lr": 0.01},
        ours={"holdfast": CarliniWagner(searches=9, steps=100)},
        references={"adv-lib": advlib("carlini_wagner_l2", binary_search_steps=9, max_iterations=100),
                    "cleverhans": cleverhans("carlini_wagner_l2", n_classes=10, lr=0.01, binary_search_steps=9,
                                             max_iterations=100)},
    ),
    minimal(
        "cw-linf", "Linf", settings={"steps": 100}, ours={"holdfast": CarliniWagner(steps=100)},
        references={"adv-lib": advlib("carlini_wagner_linf", max_iterations=100)}, n=50,
    ),
    *(
        minimal(
            f"ddn-{steps}", "L2", settings={"steps": steps}, ours={"holdfast": DDN(steps=steps)},
            references={"adv-lib": advlib("ddn", steps=steps, levels=None),
                        "foolbox": foolbox("DDNAttack", steps=steps)},
        )
        for steps in (20, 100)
    ),
    *(
        minimal(
            f"fmn-{label.lower()}", label, settings={"steps": 100}, ours={"holdfast": FMN(steps=100)},
            references={"adv-lib": advlib("fmn", norm=norm, steps=100), "foolbox": foolbox(name, steps=100)},
        )
        for label, norm, name in (("L0", L0, "L0FMNAttack"), ("L1", L1, "L1FMNAttack"), ("L2", L2, "L2FMNAttack"),
                                  ("Linf", LINF, "LInfFMNAttack"))
    ),
]  # fmt: skip
