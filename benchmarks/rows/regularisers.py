"""Recipes that make no attack, where they are of use: a small eps; ordinary and adversarial training beside them."""

from benchmarks.hardened import percent
from benchmarks.record import Cells, Claim, Outcome
from benchmarks.rows.recipes import CONFIG, THREADS, cells, hardened

WHAT = "recipes that make no attack, MNIST linf:0.1, three minutes each on two threads: clean, robust, time"
ROW, THREAT, SUITE, SEED = "regularisers", "linf:0.1", "fast", 0
BESIDE = ("standard", "pgd")
REGULARISERS = ("gradient-regularisation", "lipschitz", "cure", "llr", "jacobian", "vat")
LEAST = 20
"""Points that each must leave beyond what ordinary training does, which is a third of the images or so."""


def measured() -> Outcome:
    detail: Cells = {
        name: hardened(ROW, name, SUITE, SEED, threat=THREAT) for name in (*BESIDE, *REGULARISERS)
    }
    table = [{"recipe": name, **cells(kept["measured"])} for name, kept in detail.items()]
    left = {name: percent(kept["measured"], "suite_robust_accuracy") for name, kept in detail.items()}
    claims = [
        Claim(f"{name}: points beyond ordinary training >= {LEAST}", left[name] - left["standard"], LEAST, least=True)
        for name in REGULARISERS
    ]  # fmt: skip
    config = {**CONFIG, "threat": THREAT, "suite": SUITE, "seed": SEED, "threads": THREADS}
    return Outcome(table, claims, config, detail, ["one seed"])
