"""What `auto` chooses between on images of one channel, by budget, threat and size of the data; and how well."""

from benchmarks.hardened import percent
from benchmarks.record import Cells, Claim, Outcome
from benchmarks.rows.recipes import CONFIG, THREADS, cells, hardened
from holdfast.config.recipes import candidates
from holdfast.core.errors import UsageError
from holdfast.sources.models import open_model

WHAT = "what `auto` chooses between, by budget (1 and 3 minutes), threat and size of data: what each leaves"
ROW, SUITE, SEED = "ladder", "fast", 0
PLACES = (
    ("mnist", "linf:0.3", "1min"),
    ("mnist", "linf:0.3", "3min"),
    ("mnist", "linf:0.1", "1min"),
    ("mnist", "l2:2", "1min"),
    ("mnist", "l1:10", "1min"),
    ("mnist-mini", "linf:0.3", "1min"),
)
"""Data, threat and budget; the last has a twelfth of the examples."""
WORSE = 1.0
"""Points that the choice may leave less than the best of them."""


def measured() -> Outcome:
    table: list[Cells] = []
    claims: list[Claim] = []
    detail: Cells = {}
    model = open_model(str(CONFIG["model"])).model
    for data, threat, budget in PLACES:
        left: dict[str, float] = {}
        chosen = ""
        for one in candidates({"use": "auto"}, model, (1, 28, 28)):
            place = {"data": data, "threat": threat, "budget": budget}
            try:
                kept = hardened(ROW, one.name, SUITE, SEED, **place)
            except UsageError as refusal:  # not one epoch fits
                detail[f"{one.name}, {data}, {threat}, {budget}"] = {"measured": None, "why": str(refusal)}
                table.append({**place, "recipe": one.name, "epochs": 0})
                continue
            detail[f"{one.name}, {data}, {threat}, {budget}"] = kept
            card = kept["measured"]
            left[one.name] = percent(card, "robust_accuracy")
            if not chosen or card["epochs"] >= one.least:
                chosen = one.name
            table.append({**place, "recipe": one.name, **cells(card)})
        claims.append(
            Claim(
                f"{data}, {threat} in {budget}: points that {chosen} leaves less than the best <= {WORSE:g}",
                max(left.values()) - left[chosen],
                WORSE,
            )
        )
    config: Cells = {
        "model": CONFIG["model"],
        "places": PLACES,
        "suite": SUITE,
        "seed": SEED,
        "threads": THREADS,
    }
    return Outcome(table, claims, config, detail, ["one seed"])
