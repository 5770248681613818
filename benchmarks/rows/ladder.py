"""What `auto` chooses between on images of one channel, in several budgets and norms; and whether it chooses well."""

from benchmarks.hardened import percent
from benchmarks.record import Cells, Claim, Outcome
from benchmarks.rows.recipes import CONFIG, THREADS, cells, hardened
from holdfast.config.recipes import candidates
from holdfast.sources.models import open_model

WHAT = "the recipes that `auto` chooses between, in budgets of 1 to 10 minutes, under three norms: what each leaves"
ROW, SUITE, SEED = "ladder", "fast", 0
PLACES = (
    ("linf:0.3", "1min"),
    ("linf:0.3", "3min"),
    ("linf:0.3", "10min"),
    ("l2:2", "3min"),
    ("l1:10", "3min"),
)
WORSE = 1.0
"""Points that the choice may leave less than the best of them."""


def measured() -> Outcome:
    table: list[Cells] = []
    claims: list[Claim] = []
    detail: Cells = {}
    model = open_model(str(CONFIG["model"])).model
    for threat, budget in PLACES:
        left: dict[str, float] = {}
        chosen = ""
        for one in candidates({"use": "auto"}, model, (1, 28, 28)):
            kept = hardened(ROW, one.name, SUITE, SEED, threat=threat, budget=budget)
            detail[f"{one.name}, {threat}, {budget}"] = kept
            card = kept["measured"]
            left[one.name] = percent(card, "robust_accuracy")
            if not chosen or card["epochs"] >= one.least:
                chosen = one.name
            table.append({"threat": threat, "budget": budget, "recipe": one.name, **cells(card)})
        claims.append(
            Claim(
                f"{threat} in {budget}: points that {chosen} leaves less than the best <= {WORSE:g}",
                max(left.values()) - left[chosen],
                WORSE,
            )
        )
    config: Cells = {
        "model": CONFIG["model"],
        "data": CONFIG["data"],
        "places": PLACES,
        "suite": SUITE,
        "seed": SEED,
        "threads": THREADS,
    }
    return Outcome(table, claims, config, detail, ["one seed"])
