"""Every recipe of the catalogue on the bundled network, each with three minutes of training, except certified training,
whose row is `certified-training`.
"""

from typing import Any

from benchmarks.hardened import made, percent, shares, spent
from benchmarks.record import Cells, Claim, Outcome
from holdfast.core.catalogue import RECIPES

WHAT = "every recipe on the bundled network, MNIST linf:0.3, three minutes each on two threads: clean, robust, time"
ROW, THREADS = "recipes", 2
CONFIG: Cells = {"model": "mnist-cnn", "data": "mnist", "threat": "linf:0.3", "budget": "3min"}
SURROGATES = {"ensemble": ("mnist-cnn",)}
FOR_SMOOTHING = {"denoised", "gaussian-noise"}
FOR_TRIGGERS = {"repair", "ft-sam"}
"""Recipes for the base classifier of randomised smoothing, which the row `smoothing` measures."""
FOR_SMALL_NETWORKS = {"rslad", "prune", "int8"}
"""Recipes that the rows `distil-robust` and `compression` measure."""
MORE: dict[str, Any] = {"multi-norm": {"others": "l2:1.5,l1:10"}}
"""What a recipe cannot do without."""
COMPARED = ("policy", "league", "generated", "augment-policy", "tune")
"""Recipes that rows of their own compare with others."""
CERTIFIED = ("ibp", "sabr")
"""Recipes whose bounds are too loose at this eps for three minutes."""
PUBLISHED = 88.5
"""What is left of the network of Madry et al. under AutoAttack, according to its authors."""


def measured() -> Outcome:
    others = {*FOR_SMOOTHING, *FOR_TRIGGERS, *FOR_SMALL_NETWORKS, *CERTIFIED, *COMPARED}
    detail: Cells = {name: hardened(ROW, name, "fast", 0) for name in RECIPES if name not in others}
    table = [{"recipe": name, **cells(kept["measured"])} for name, kept in detail.items()]
    worst = min(percent(kept["measured"], "clean_accuracy") for kept in detail.values())
    best = max(percent(kept["measured"], "suite_robust_accuracy") for kept in detail.values())
    claims = [
        Claim("clean accuracy of the worst recipe, % >= 50: none has collapsed", worst, 50.0, least=True),
        Claim(f"robust accuracy of the best, % >= {PUBLISHED}", best, PUBLISHED, least=True),
    ]
    return Outcome(table, claims, {**CONFIG, "suite": "fast", "seed": 0, "threads": THREADS}, detail)


def hardened(row: str, name: str, suite: str, seed: int, **place: str) -> Cells:
    """The card of the bundled network, hardened by a recipe as it comes; `place` is another threat or budget."""
    config = {**CONFIG, **place}
    return made(
        row, ", ".join((f"{name} seed {seed}", *place.values())), recipe={"use": name, **MORE.get(name, {})},
        suite=suite, seed=seed, threads=THREADS, surrogates=SURROGATES.get(name, ()), **config,
    )  # fmt: skip


def cells(card: Cells) -> Cells:
    """What a card says of the new model, and what it took."""
    doubts = ", ".join(doubt["name"] for doubt in card["after"]["doubts"])
    return {**shares(card), **spent(card), "doubts raised": doubts}
