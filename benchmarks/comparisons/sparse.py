"""Later minimum-norm attacks and the historic sparse ones."""

from functools import partial

from benchmarks.comparisons.comparison import UNDEFENDED, Comparison
from benchmarks.comparisons.running import advlib, art, foolbox
from holdfast.attacks import ALMA, EAD, JSMA, PDPGD, SigmaZero, SuperDeepFool

minimal = partial(Comparison, eps=None, network=UNDEFENDED, n=100)

COMPARISONS = [
    *(
        minimal(
            f"sigma-zero-{steps}", "L0", settings={"steps": steps}, ours={"holdfast": SigmaZero(steps=steps)},
            references={"adv-lib": advlib("sigma_zero", num_steps=steps)},
        )
        for steps in (100, 300)
    ),
    *(
        minimal(
            f"pdpgd-{norm.lower()}", norm, settings={"steps": 100}, ours={"holdfast": PDPGD(steps=100)},
            references={"adv-lib": advlib("pdpgd", num_steps=100, norm=order, **settings)},
        )
        for norm, order, settings in (
            ("Linf", float("inf"), {}), ("L2", 2, {}), ("L1", 1, {}), ("L0", 0, {"proximal_operator": 23}),
        )
    ),
    minimal(
        "alma-l2", "L2", settings={"steps": 100}, ours={"holdfast": ALMA(steps=100)},
        references={"adv-lib": advlib("alma", num_steps=100, init_lr_distance=0.1, α=0.5)},
    ),
    minimal(
        "alma-l1", "L1", settings={"steps": 100}, ours={"holdfast": ALMA(steps=100)},
        references={"adv-lib": advlib("alma", num_steps=100, distance="l1", init_lr_distance=0.5, α=0.5)},
    ),
    minimal(
        "super-deepfool", "L2", settings={"steps": 50}, ours={"holdfast": SuperDeepFool(steps=50)},
        references={"adv-lib": advlib("sdf", steps=50, df_steps=50)},
    ),
    minimal(
        "ead", "L1", settings={"searches": 9, "steps": 100}, ours={"holdfast": EAD(searches=9, steps=100)},
        references={"foolbox": foolbox("EADAttack", binary_search_steps=9, steps=100, decision_rule="L1"),
                    "art": art("ElasticNet", binary_search_steps=9, max_iter=100, decision_rule="L1", batch_size=100,
                               verbose=False)}, n=50,
    ),
    minimal(
        "jsma", "L0", settings={"theta": 1}, ours={"holdfast": JSMA()},
        references={"art": art("SaliencyMapMethod", theta=1.0, batch_size=100, verbose=False)},
        note="art aims at a random class of each example",
    ),
]  # fmt: skip
