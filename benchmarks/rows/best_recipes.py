"""The recipes that hold best on what they do not train on, trained thrice and judged by `standard`.

They are chosen in the record of `recipes`, by the held-out examples, and not by the test images that judge.
"""

from heapq import nlargest
from statistics import mean

from benchmarks.hardened import percent
from benchmarks.record import Cells, Claim, Outcome, newest
from benchmarks.rows.recipes import CONFIG, THREADS, cells, hardened

WHAT = "the three recipes that hold best in the record of `recipes`, three seeds each, `standard` on 1,000"
ROW, BEST, SEEDS = "best-recipes", 3, (0, 1, 2)


def measured() -> Outcome:
    first = newest("recipes")["detail"]
    names = nlargest(BEST, first, key=lambda name: float(first[name]["measured"]["chosen"]["robust"]))
    detail: Cells = {}
    table = []
    claims = []
    for name in names:
        cards = []
        for seed in SEEDS:
            kept = detail[f"{name} seed {seed}"] = hardened(ROW, name, "standard", seed)
            cards.append(kept["measured"])
            table.append({"recipe": name, "seed": seed, **cells(kept["measured"])})
        believed = percent(first[name]["measured"], "suite_robust_accuracy")
        held = mean(percent(card, "suite_robust_accuracy") for card in cards)
        claims.append(
            Claim(
                f"{name}: points that `fast` left of seed 0 and `standard` not of the mean <= 2",
                believed - held,
                2,
            )
        )
    config = {**CONFIG, "suite": "standard", "seeds": SEEDS, "threads": THREADS}
    return Outcome(table, claims, config, detail)
