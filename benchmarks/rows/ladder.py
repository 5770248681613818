"""What `auto` leaves on images of one channel, and what those it chooses between leave, each with the whole budget."""

from benchmarks.hardened import percent
from benchmarks.record import Cells, Claim, Outcome
from benchmarks.rows.recipes import CONFIG, THREADS, cells, hardened
from holdfast.config.naming import AUTO
from holdfast.config.recipes import candidates
from holdfast.core.errors import UsageError
from holdfast.sources.models import open_model

WHAT = "`auto` by budget (1 and 3 minutes), threat and size of data, and each that it chooses between: what is left"
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
"""Points that `auto` may leave less than the best of them."""


def measured() -> Outcome:
    table: list[Cells] = []
    claims: list[Claim] = []
    detail: Cells = {}
    model = open_model(str(CONFIG["model"])).model
    names = [one.name for one in candidates({"use": AUTO}, model, (1, 28, 28))]
    for data, threat, budget in PLACES:
        left: dict[str, float] = {}
        for name in (AUTO, *names):
            place = {"data": data, "threat": threat, "budget": budget}
            try:
                kept = hardened(ROW, name, SUITE, SEED, **place)
            except UsageError as refusal:  # not one epoch fits
                detail[f"{name}, {data}, {threat}, {budget}"] = {"measured": None, "why": str(refusal)}
                table.append({**place, "asked for": name, "epochs": 0})
                continue
            detail[f"{name}, {data}, {threat}, {budget}"] = kept
            card = kept["measured"]
            left[name] = percent(card, "robust_accuracy")
            table.append({**place, "asked for": name, "recipe": card["recipe"], **cells(card)})
        claims.append(
            Claim(
                f"{data}, {threat} in {budget}: points that auto leaves less than the best <= {WORSE:g}",
                max(left.values()) - left[AUTO],
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
