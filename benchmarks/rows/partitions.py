"""Partitions: an ensemble of 100 members on MNIST, certified against changes of the training set."""

import json
from typing import Any

import torch

import holdfast
from benchmarks.hardened import dataset, interval
from benchmarks.networks import two_conv_two_fc
from benchmarks.parts import RUNS, part
from benchmarks.record import Cells, Claim, Outcome

WHAT = "an ensemble of 100 partitions, MNIST: accuracy, and what is certified against changed training images"
ROW, SEED, MEMBERS, CHANGES, N = "partitions", 0, 100, 20, 10_000
CPU_S, CLEAN, CERTIFIED = 120.0, 92.0, 88.0
"""CPU seconds of the training, and what must be reached, in %."""
RECIPE = {
    "use": "partitions",
    "partitions": MEMBERS,
    "training": {"epochs": 10, "lr": 5e-3, "augment": "shift"},
}


def measured() -> Outcome:
    result = part(ROW, "training", _trained)["measured"]
    table: list[Cells] = [{"recipe": "partitions", **result["shares"]}]
    claims = [
        Claim(f"accuracy, % >= {CLEAN:g}", result["clean"], CLEAN, least=True),
        Claim(
            f"certified against {CHANGES} changes, % >= {CERTIFIED:g}",
            result["certified"],
            CERTIFIED,
            least=True,
        ),
        Claim(f"CPU s of the training <= {CPU_S:g}", result["cpu_s"], CPU_S),
    ]
    config: Cells = {"network": "two_conv_two_fc", "data": "mnist", "recipe": RECIPE, "n": N, "seed": SEED}
    notes = [
        "one seed; settings were chosen on 2,000 training images that were not trained on",
        "a replaced training image counts twice",
    ]
    return Outcome(table, claims, config, {"curve": result["curve"], "cost": result["cost"]}, notes)


def _trained() -> Cells:
    torch.manual_seed(SEED)
    hardened = holdfast.harden(
        two_conv_two_fc(), dataset("mnist"), f"training-set:{CHANGES}", RECIPE, n=N, seed=SEED, device="cpu",
        run=RUNS / ROW, resume=(RUNS / ROW).is_dir(),
    )  # fmt: skip
    results: dict[str, Any] = json.loads(
        json.dumps(hardened.after.summary()["certification"]["training_set"])
    )
    metrics, cost = hardened.card["after"]["metrics"], dict(hardened.card["cost"])
    shares: Cells = {"members": MEMBERS, "accuracy, %": interval(metrics["clean_accuracy"])}
    shares |= {
        f"certified at {point['changes']}, %": interval(point["certified_accuracy"])
        for point in results["curve"]
    }
    return {
        "shares": {**shares, "median": results["median"], "training, CPU s": round(cost["cpu_s"], 1)},
        "clean": 100 * metrics["clean_accuracy"]["value"],
        "certified": 100 * metrics["certified_accuracy"]["value"],
        "cpu_s": cost["cpu_s"],
        "cost": cost,
        "curve": results,
    }
