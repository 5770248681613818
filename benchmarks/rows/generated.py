"""Adversarial training on generated images beside `auto` with the same total time, the training of the generator
included; and a learned policy of augmentations and a search of settings, in two minutes each.
"""

from benchmarks.hardened import made
from benchmarks.record import Cells

WHAT = "`generated` beside `auto`, Fashion-MNIST linf:0.1, 12.5 CPU minutes with the generator, `standard` on 1,000"
ROW, DATA, THREAT, SEED = "generated", "fashion_mnist", "linf:0.1", 0
BUDGETS = {"auto": "750s", "generated": "750s", "augment-policy": "120s", "tune": "120s"}
"""CPU time of each training, in one thread."""
SUITES = {"auto": "standard", "generated": "standard", "augment-policy": "fast", "tune": "fast"}


def card(recipe: str) -> Cells:
    return made(
        ROW, recipe, "mnist-cnn", DATA, THREAT, recipe, BUDGETS[recipe], suite=SUITES[recipe], seed=SEED, by_cpu=True,
        assess_budget="5h",
    )  # fmt: skip
