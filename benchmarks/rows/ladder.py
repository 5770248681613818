"""What `auto` leaves on images of one channel, and what the others would have left that its plan had room for."""

from typing import Any

from benchmarks.hardened import made, percent
from benchmarks.record import Cells, Claim, Outcome
from benchmarks.rows.recipes import CONFIG, THREADS, cells
from holdfast.settings.grammar import AUTO

WHAT = "`auto` by budget, threat and size of data, and the others that it chooses between with the epochs of its plan"
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
    chosen = [_card({"use": AUTO}, *place) for place in PLACES]  # which are timed, and so not beside others
    for place, found in zip(PLACES, chosen, strict=True):
        auto = found["measured"]
        plan = auto["plan"]["attempts"][0]
        robust = {AUTO: percent(auto, "suite_robust_accuracy")}
        detail[", ".join((AUTO, *place))] = found
        table.append(_row(place, f"auto: {auto['recipe']}", auto))
        for name, epochs in plan["fits"].items():
            if not epochs or name == plan["recipe"] == auto["recipe"]:
                continue
            other = _other(name, epochs, place)
            detail[", ".join((name, *place))] = other
            robust[name] = percent(other["measured"], "suite_robust_accuracy")
            table.append(_untimed(_row(place, name, other["measured"])))
        claims.append(
            Claim(
                f"{', '.join(place[:2])} in {place[2]}: points that auto leaves less than the best <= {WORSE:g}",
                max(robust.values()) - robust[AUTO],
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
    return Outcome(
        table,
        claims,
        config,
        detail,
        ["one seed; the others have the epochs that its plan would leave them, and are not timed"],
    )


def _card(recipe: dict[str, Any], data: str, threat: str, budget: str) -> Cells:
    epochs = recipe.get("training", {}).get("epochs")
    return made(
        ROW, _name(recipe["use"], epochs, (data, threat, budget)), CONFIG["model"], data, threat, recipe,
        budget if epochs is None else None, suite=SUITE, seed=SEED, threads=THREADS,
    )  # fmt: skip


def _name(use: str, epochs: int | None, place: tuple[str, str, str]) -> str:
    return ", ".join((use, *place, *([] if epochs is None else [f"{epochs} epochs"])))


def _other(use: str, epochs: float, place: tuple[str, str, str]) -> Cells:
    """Trained for the epochs of the first plan, rounded to whole ones."""
    return _card({"use": use, "training": {"epochs": max(round(epochs), 1)}}, *place)


def _untimed(row: Cells) -> Cells:
    """What has its epochs given: how long they took says nothing of the plan."""
    return {name: cell for name, cell in row.items() if name not in {"wall s", "planning s", "CPU s"}}


def _row(place: tuple[str, str, str], trained_by: str, card: Cells) -> Cells:
    data, threat, budget = place
    return {"data": data, "threat": threat, "budget": budget, "trained by": trained_by, **cells(card)}
