"""Adversarial training on generated images beside `auto` with the same total time, the training of the generator
included; and a learned policy of augmentations and a search of settings, in two minutes each.
"""

from typing import Any

from benchmarks.hardened import made, percent, shares, spent
from benchmarks.parts import RUNS, part
from benchmarks.record import Cells, Claim, Outcome
from holdfast.metrics.comparisons import change
from holdfast.runs.documents.stored_runs import open_run

WHAT = "`generated` beside `auto`, Fashion-MNIST linf:0.1, 12.5 CPU minutes with the generator, `standard` on 1,000"
ROW, DATA, THREAT, SEED = "generated", "fashion_mnist", "linf:0.1", 0
BUDGETS = {"auto": "750s", "generated": "750s", "augment-policy": "120s", "tune": "120s"}
"""CPU time of each training, in one thread."""
SUITES = {"auto": "standard", "generated": "standard", "augment-policy": "fast", "tune": "fast"}
ASSESSED = "5h"
"""Time of both assessments, which is enough for 1,000 images on a busy machine."""


def measured() -> Outcome:
    detail: Cells = {recipe: card(recipe) for recipe in BUDGETS}
    detail["difference"] = part(ROW, "difference", _difference)
    gain = detail["difference"]["measured"]
    table = []
    for requested in BUDGETS:
        found = detail[requested]["measured"]
        row = {"requested": requested, "recipe": found["recipe"], "suite": SUITES[requested], **shares(found)}
        row |= {
            **spent(found, by_cpu=True),
            "doubts raised": ", ".join(doubt["name"] for doubt in found["after"]["doubts"]),
        }
        if requested == "generated":
            row["generated − auto, points"] = (
                f"{gain['value']:+.1f} ({gain['low']:+.1f} to {gain['high']:+.1f})"
            )
        table.append(row)
    generated = detail["generated"]["measured"]
    share = generated["follow_up"]["accepted"] / max(generated["follow_up"]["tried"], 1)
    claims = [
        Claim("generated: share of images that a sample replaced >= 0.2", share, 0.2, least=True),
        Claim("generated: clean, % >= 80", percent(generated, "clean_accuracy"), 80.0, least=True),
    ]
    config: Cells = {
        "model": "mnist-cnn", "data": DATA, "threat": THREAT, "CPU time": BUDGETS, "seed": SEED,
        "threads": 1,
    }  # fmt: skip
    notes = [f"{recipe}: {note}" for recipe in BUDGETS if (note := _note(detail[recipe]["measured"]))]
    return Outcome(table, claims, config, detail, ["one seed", *notes])


def card(recipe: str) -> Cells:
    """The card of a training, with its part's date and commit."""
    return made(
        ROW, recipe, "mnist-cnn", DATA, THREAT, recipe, BUDGETS[recipe], suite=SUITES[recipe],
        seed=SEED, by_cpu=True, assess_budget=ASSESSED,
    )  # fmt: skip


def _difference() -> Cells:
    """Robust accuracy of `generated` minus that of `auto` in points, with the interval for paired images."""
    sides = [open_run(RUNS / ROW / recipe / "after").evidence for recipe in ("generated", "auto")]
    found = change("robust_accuracy", *sides)
    return {name: 100 * getattr(found, name) for name in ("value", "low", "high")} | {"n": found.n}


def _note(found: dict[str, Any]) -> str:
    """What the recipe measured after its training, in a sentence; empty if it measures nothing."""
    return found["notes"][-1] if "follow_up" in found else ""
