"""A learned attack strategy beside random and fixed ones, at as many passes as the fixed one makes in two minutes."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import ours
from benchmarks.networks import images, network
from benchmarks.parts import part
from benchmarks.record import Cells, Claim, Outcome
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.training import STATE, Checkpoint, without_prefix
from holdfast.recipes import PolicyTraining
from holdfast.recipes.training.attack_policies import Policy, distribution
from holdfast.recipes.training.recipe import Recipe
from holdfast.runs.harden.pace import Pacer
from holdfast.statistics.intervals import paired_difference, proportion

WHAT = (
    "learned, random and fixed attack strategies at equal passes, MNIST linf:0.3, `fast` on 2,000 test images"
)
ROW, EPS, TRAINED, TESTED, SEED = "policy", 0.3, 60_000, 2_000, 0
BUDGET_S, EPOCH_S = 120.0, 60.0
"""CPU seconds of the fixed strategy, and of one of its epochs in the first plan, which is replaced after an update."""
STRATEGIES: dict[str, dict[str, Any]] = {
    "fixed, 7 steps": {"strategy": "fixed"},
    "learned": {"strategy": "learned"},
    "random": {"strategy": "random"},
    "fixed, 3 steps": {"strategy": "fixed", "steps": 3},
}
"""The last one shows what fewer steps alone achieve, which make more updates with equal passes."""
EQUAL = 0.02
"""Largest relative difference of passes: of about one update."""


def measured() -> Outcome:
    """Train with each strategy, and compare the networks on the same images."""
    detail: Cells = {}
    passes = 0.0
    for name, settings in STRATEGIES.items():
        detail[name] = part(ROW, f"{name}, seed {SEED}", partial(_strategy, settings, passes))
        passes = passes or detail[name]["measured"]["passes"]
    parts = {name: detail[name]["measured"] for name in STRATEGIES}
    robust = {strategy: _mask(found["robust"]) for strategy, found in parts.items()}
    table: list[Cells] = []
    for strategy, found in parts.items():
        row = {"recipe": "policy", "strategy": strategy, **cells(found)}
        if strategy != "learned":
            gain = paired_difference(robust["learned"], robust[strategy])
            row["learned − this, points"] = (
                f"{100 * gain.value:+.1f} ({100 * gain.low:+.1f} to {100 * gain.high:+.1f})"
            )
        table.append(row)
    made = [found["passes"] for found in parts.values()]
    claims = [
        Claim("largest relative difference of passes <= 0.02", max(made) / min(made) - 1, EQUAL),
        Claim("least clean accuracy, % >= 90", min(row["clean"] for row in table), 90.0, least=True),
    ]
    config = {
        "model": "mnist-cnn", "threat": f"linf:{EPS}", "train": TRAINED, "test": TESTED, "seed": SEED,
        "CPU s of fixed": BUDGET_S, "threads": 1,
    }  # fmt: skip
    return Outcome(table, claims, config, detail)


def _strategy(settings: dict[str, Any], passes: float) -> Cells:
    """The network of one strategy: with a budget of CPU time, or with a number of passes for each example."""
    recipe = PolicyTraining(**settings, passes=passes)
    found, last = trained(recipe, None if passes else BUDGET_S, TRAINED, TESTED)
    policy = Policy.of(without_prefix(last.tensors, STATE), "policy.")
    return {**found, **({} if recipe.strategy == "fixed" else distribution(policy))}


def bundled() -> Classifier:
    """The bundled network, as the package opens it."""
    net = network("mnist-cnn").module
    return (net if isinstance(net, Classifier) else Classifier(net)).eval()


def trained(recipe: Recipe, budget_s: float | None, n_train: int, n_test: int) -> tuple[Cells, Checkpoint]:
    """Train the bundled network by a recipe, for `budget_s` CPU seconds if given, and attack the last checkpoint."""
    model = bundled().requires_grad_()
    x, y = images("mnist", n_train, "train")
    how = replace(recipe.training, pacing=pacer(budget_s, time.process_time))
    timed: Any = recipe
    start = time.process_time()
    *checkpoints, last = replace(timed, training=how)(
        model, Batch(x, y, torch.arange(len(x))), ThreatModel(ours.constraint("Linf", EPS)), rng=Draws(SEED)
    )
    cpu_s = time.process_time() - start
    last.put_into(model)
    evidence = ours.by_suite(
        model.eval().requires_grad_(False), *images("mnist", n_test), "fast", "Linf", EPS
    )
    passes = sum(each.measured["forwards"] for each in (*checkpoints, last))
    return {
        "passes": passes, "cpu_s": cpu_s, "updates": last.updates, "epochs": last.epoch - 1 + last.part,
        "clean": _digits(evidence["correct"]), "robust": _digits(evidence["correct"] & ~evidence["success"]),
    }, last  # fmt: skip


def pacer(budget_s: float | None, clock: Callable[[], float]) -> Pacer | None:
    """Plans for a budget of CPU seconds; None without one."""
    return None if budget_s is None else Pacer(budget_s, EPOCH_S, 0.0, 0.0, clock)


def _digits(mask: Tensor) -> str:
    """One digit for each image, so that a record is short."""
    return "".join(str(int(each)) for each in mask)


def _mask(digits: str) -> Tensor:
    return torch.tensor([digit == "1" for digit in digits])


def cells(found: Cells) -> Cells:
    """Accuracies with their intervals, and the cost of the training."""
    clean, robust = (proportion(_mask(found[name])) for name in ("clean", "robust"))
    return {
        "clean": round(100 * clean.value, 1),
        "robust, %": f"{100 * robust.value:.1f} ({100 * robust.low:.1f}–{100 * robust.high:.1f})",
        "n": clean.n, "passes": round(found["passes"], 1), "CPU s": round(found["cpu_s"]),
        "updates": found["updates"],
        **({"steps": f"{found['mean_steps'][0]:.1f} → {found['mean_steps'][-1]:.1f}"} if "mean_steps" in found else {}),
    }  # fmt: skip
