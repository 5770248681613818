"""Compressed networks: nine tenths of the weights pruned, and 8 bits, beside the network that they were made from."""

import json
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

import holdfast
from benchmarks.hardened import dataset, hardened_in_cpu_time, interval, standing
from benchmarks.parts import part
from benchmarks.record import Cells, Claim, Outcome
from holdfast.core.estimate import Estimate
from holdfast.io.models.architectures import naive_gradients
from holdfast.runs.assess.result import Result
from holdfast.statistics.intervals import paired_difference

WHAT = "the bundled hardened network, MNIST linf:0.3, 90 % sparse and with 8 bits: `standard` on 500 images"
ROW, SEED, N, THREAT, SUITE = "compression", 0, 500, "linf:0.3", "standard"
FIRST = 500
"""First of the test images that are measured; the settings of the pruning were chosen on the images before it."""
DENSE = "mnist-cnn-hardened"
RECIPES: dict[str, tuple[dict[str, Any], str]] = {
    "prune": ({"use": "prune", "sparsity": 0.9, "training": {"overshoot": 1.2}}, "180s"),
    "int8": ({"use": "int8"}, "20s"),
}
"""Recipe and CPU time of each training."""
LOST, APART = 3.0, 2.0
"""Points that the sparse network may lose, and by which the accuracy through the rounding may differ."""
NAIVE_N = 200


def measured() -> Outcome:
    dense = part(ROW, "dense", lambda: _assessed(holdfast.assess(DENSE, **_settings(), doubts=False)))[
        "measured"
    ]
    made = {name: part(ROW, name, partial(_compressed, name)) for name in RECIPES}
    kept: Cells = {name: found["measured"] for name, found in made.items()}
    table: list[Cells] = [{"network": "dense", "recipe": "", **_cells(dense)}]
    for name, found in kept.items():
        follow_up = found["card"]["follow_up"]
        shares = {key: f"{100 * value:.1f}" for key, value in follow_up["robust_accuracy"].items()}
        table.append(
            {
                "network": {"prune": "90 % sparse", "int8": "8 bits"}[name],
                "recipe": name,
                **_cells(found),
                "points lost": interval(vars(_lost(dense, found))),
                "bytes": follow_up["bytes"]["after"],
                "bytes before": follow_up["bytes"]["before"],
                "PGD through, %": shares["through"],
                "transferred, %": shares["transferred"],
                "naive, %": shares.get("naive", ""),
                "doubts of the naive attack": ", ".join(found.get("raised", ())),
            }
        )
    naive = kept["int8"]["card"]["follow_up"]["robust_accuracy"]
    claims = [
        Claim(f"points lost by pruning <= {LOST:g}", 100 * _lost(dense, kept["prune"]).value, LOST),
        Claim(
            f"points between 8 bits and the dense network <= {APART:g}",
            100 * abs(_lost(dense, kept["int8"]).value),
            APART,
        ),
        Claim(
            "points that the naive attack on 8 bits leaves too many > 0",
            100 * (naive["naive"] - naive["worst"]),
            0.1,
            least=True,
        ),
        Claim(
            "doubts about masked gradients that the naive attack raises >= 1",
            float("zero-gradient" in kept["int8"]["raised"]),
            1,
            least=True,
        ),
    ]
    config: Cells = {
        "network": DENSE, "data": "mnist", "threat": THREAT, "recipes": RECIPES, "budget": "CPU time",
        "suite": SUITE, "n": N, "first image": FIRST, "n of the naive attack": NAIVE_N, "seed": SEED,
    }  # fmt: skip
    first = (
        "pruning had a first attempt, with 60 s and no overshoot, which lost 13.6 points under `standard` on the "
        "images 0 to 499; a longer training with overshoot followed, and this row measures the images after these"
    )
    notes = ["one seed; intervals of points are paired", first]
    return Outcome(table, claims, config, {"dense": dense, **made}, notes)


def _settings(n: int = N, suite: str = SUITE) -> dict[str, Any]:
    with np.load(dataset("mnist")) as file:
        x, y = (file[name][FIRST : FIRST + n] for name in ("x_test", "y_test"))
    data = torch.from_numpy(x).view(n, 1, 28, 28) / 255, torch.from_numpy(y).long()
    return {"data": data, "threat": THREAT, "suite": suite, "n": n, "seed": SEED, "device": "cpu"}


def _cells(found: Cells) -> Cells:
    return {"clean, %": interval(found["clean"]), "robust, %": interval(found["suite"]), "n": N}


def _lost(dense: Cells, found: Cells) -> Estimate:
    return paired_difference(torch.tensor(dense["robust"]), torch.tensor(found["robust"]))


def _assessed(result: Result) -> Cells:
    names = {"clean": "clean_accuracy", "suite": "suite_robust_accuracy"}
    shares = {key: vars(result.metrics[name]) for key, name in names.items()}
    return {**json.loads(json.dumps(shares)), "robust": standing(result)}


def _compressed(name: str) -> Cells:
    recipe, budget = RECIPES[name]
    result = hardened_in_cpu_time(
        DENSE, "mnist", threat=THREAT, recipe=recipe, budget=budget, suite="quick", n=N, seed=SEED,
        doubts=False, anyway=True, assess_budget="1h",
    )  # fmt: skip
    found = _assessed(holdfast.assess(result.model, **_settings(), doubts=False, surrogates=[DENSE]))
    found["card"] = json.loads(json.dumps(result.card))
    if name == "int8":
        assert isinstance(result.model.net, nn.Module)
        with naive_gradients(result.model.net):
            naive = holdfast.assess(result.model, **_settings(NAIVE_N, "quick"))
        found["raised"] = [doubt.name for doubt in naive.doubts if doubt.state == "raised"]
    return found
