"""Every recipe of the catalogue on the bundled network, each with three minutes of training."""

from benchmarks.hardened import made, percent, shares, spent
from benchmarks.record import Cells, Claim, Outcome
from holdfast.config.naming import RECIPES

WHAT = "every recipe on the bundled network, MNIST linf:0.3, three minutes each on two threads: clean, robust, time"
MODEL, DATA, THREAT, BUDGET = "mnist-cnn", "mnist", "linf:0.3", "3min"
BEST, SEEDS = 3, (0, 1, 2)
SURROGATES = {"ensemble": ("mnist-cnn",)}
MORE = {"multi-norm": {"others": "l2:1.5,l1:10"}}
"""What a recipe cannot do without."""


def measured() -> Outcome:
    detail: Cells = {name: _made(name, "fast", 0) for name in RECIPES}
    table = [
        {"recipe": name, "suite": "fast", "seed": 0, **_row(kept["measured"])}
        for name, kept in detail.items()
    ]
    order = sorted(
        detail, key=lambda name: percent(detail[name]["measured"], "robust_accuracy"), reverse=True
    )
    for name in order[:BEST]:
        for seed in SEEDS:
            kept = detail[f"{name} seed {seed}"] = _made(name, "standard", seed)
            table.append({"recipe": name, "suite": "standard", "seed": seed, **_row(kept["measured"])})
    worst = min(percent(detail[name]["measured"], "clean_accuracy") for name in RECIPES)
    claims = [
        Claim("clean accuracy of the worst recipe, % >= 50: none has collapsed", worst, 50.0, least=True)
    ]
    config: Cells = {"model": MODEL, "data": DATA, "threat": THREAT, "budget": BUDGET, "seeds": SEEDS}
    return Outcome(table, claims, config, detail)


def _made(name: str, suite: str, seed: int) -> Cells:
    part = f"{name} {suite} seed {seed}"
    surrogates = SURROGATES.get(name, ())
    recipe = {"use": name, **MORE.get(name, {})}
    return made(
        "recipes", part, MODEL, DATA, THREAT, recipe, BUDGET, suite=suite, seed=seed, threads=2,
        surrogates=surrogates,
    )  # fmt: skip


def _row(card: Cells) -> Cells:
    doubts = ", ".join(doubt["name"] for doubt in card["after"]["doubts"])
    return {**shares(card), **spent(card), "doubts raised": doubts}
