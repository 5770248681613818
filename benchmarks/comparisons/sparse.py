"""Later minimum-norm attacks and the historic sparse ones."""

from functools import partial

from benchmarks.comparisons.comparison import UNDEFENDED, Comparison
from benchmarks.comparisons.running import advlib
from holdfast.attacks import PDPGD, SigmaZero

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
]  # fmt: skip
