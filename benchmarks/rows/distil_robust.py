"""Robust distillation into a network with a quarter of the parameters, beside adversarial training of it."""

import json
from functools import partial
from typing import Any

import torch

from benchmarks.hardened import hardened_in_cpu_time, interval, percent, standing
from benchmarks.parts import part
from benchmarks.record import Cells, Claim, Outcome
from holdfast.io.models.architectures import cnn
from holdfast.statistics.intervals import paired_difference

WHAT = "RSLAD into a quarter of the parameters, MNIST linf:0.3, beside `atta` with the same CPU time"
ROW, SEED, N, THREAT, BUDGET, SUITE = "distil-robust", 0, 500, "linf:0.3", "90s", "fast"
TEACHER = "mnist-cnn-hardened"
STUDENT = {"width": 8, "hidden": 50}
RECIPES: dict[str, Any] = {
    "atta": {"use": "atta"},
    "rslad": {"use": "rslad", "teacher": TEACHER, "steps": 3, "reach": 2.0},
}
GAIN = 3.0
"""Points that the distilled network must have more."""


def measured() -> Outcome:
    detail: Cells = {name: part(ROW, name, partial(_trained, name)) for name in RECIPES}
    kept = {name: found["measured"] for name, found in detail.items()}
    table: list[Cells] = [
        {
            "recipe": name,
            "clean, %": interval(card["after"]["metrics"]["clean_accuracy"]),
            "robust, %": interval(card["after"]["metrics"]["suite_robust_accuracy"]),
            "n": card["after"]["n"],
            "epochs": card["epochs"],
            "passes": card["cost"]["forwards"],
            "CPU s": card["cost"]["cpu_s"],
        }
        for name, card in ((name, found["card"]) for name, found in kept.items())
    ]
    gain = paired_difference(torch.tensor(kept["rslad"]["robust"]), torch.tensor(kept["atta"]["robust"]))
    table[1]["points more"] = interval(vars(gain))
    claims = [
        Claim(f"points more than atta in the same time >= {GAIN:g}", 100 * gain.value, GAIN, least=True),
        Claim(
            "clean accuracy of both, % >= 50: none has collapsed",
            min(percent(found["card"], "clean_accuracy") for found in kept.values()),
            50.0,
            least=True,
        ),
    ]
    parameters = sum(weight.numel() for weight in cnn(**STUDENT).parameters())
    config: Cells = {
        "network": f"cnn with {STUDENT}, {parameters:,} parameters", "data": "mnist", "threat": THREAT,
        "recipes": RECIPES, "budget": f"{BUDGET} of CPU time", "suite": SUITE, "n": N, "seed": SEED,
    }  # fmt: skip
    return Outcome(table, claims, config, detail, ["one seed; the interval is paired"])


def _trained(name: str) -> Cells:
    torch.manual_seed(SEED)
    result = hardened_in_cpu_time(
        cnn(**STUDENT),
        "mnist",
        threat=THREAT,
        recipe=RECIPES[name],
        budget=BUDGET,
        suite=SUITE,
        n=N,
        seed=SEED,
        assess_budget="1h",
    )
    return {"card": json.loads(json.dumps(result.card)), "robust": standing(result.after)}
