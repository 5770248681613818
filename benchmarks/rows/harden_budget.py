"""What `harden` plans within a budget, and how much of it is used: by a real clock, alone and beside busy processes."""

import math
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch

import holdfast
from benchmarks import ours
from benchmarks.networks import images, network
from benchmarks.parts import RUNS, part
from benchmarks.record import Cells, Claim, Outcome
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.training import TrainingPlan
from holdfast.recipes import SingleStep
from holdfast.recipes.training.fit import Training, updates
from holdfast.runs.harden.checkpoints import LAST, saved

WHAT = (
    "planned over measured seconds of an update, and the used share of budgets of 20 to 180 s, under load too"
)
ROW, RECIPE, TRAINED, N = "harden-budget", "auto", 10_000, 20
NETWORKS = (("mnist-cnn", 0.3), ("mnist_kw01", 0.1), ("mnist_badnet", 0.3), ("mnist_trades_smallcnn", 0.3),
            ("cifar_cnn_a_adv", 8 / 255), ("cifar_resnet20", 8 / 255))  # fmt: skip
BUDGETS, BUSY = (20, 60, 180), 2
"""Seconds, and processes beside every second training that keep a core busy each."""
RATIO, USED, OF = (0.5, 2.0), (0.85, 1.05), 16
BATCH = 128
REFUSED = 0.7
"""A refusal is correct if an epoch of the fastest recipe takes this share of the budget. Planning, evaluation and
reserve take the rest."""


def measured() -> Outcome:
    table: list[Cells] = []
    detail: Cells = {}
    for i, (name, eps) in enumerate(NETWORKS):
        for j, budget in enumerate(BUDGETS):
            busy = BUSY * ((i + j) % 2)
            place = f"{name}, {budget} s, {busy} beside"
            detail[place] = part(ROW, place, lambda args=(name, eps, budget, busy, place): _trained(*args))
            table.append({"network": name, "budget, s": budget, "busy processes": busy,
                          **detail[place]["measured"]})  # fmt: skip
    ratios = [cells["planned / measured"] for cells in table if "planned / measured" in cells]
    used = [cells["used, %"] / 100 for cells in table if "used, %" in cells]
    held = sum(USED[0] <= share <= USED[1] for share in used) + sum("refused" in cells for cells in table)
    claims = [
        Claim(f"planned / measured seconds of an update, smallest >= {RATIO[0]:g}", min(ratios), RATIO[0], least=True),
        Claim(f"planned / measured seconds of an update, largest <= {RATIO[1]:g}", max(ratios), RATIO[1]),
        Claim(f"runs of {len(table)} that use {USED[0]:g} to {USED[1]:g} of their budget, or are refused correctly "
              f">= {OF}", held, OF, least=True),
    ]  # fmt: skip
    config: Cells = {"recipe": RECIPE, "trained on": TRAINED, "test images": N, "batch": BATCH}
    return Outcome(table, claims, config, detail)


def _trained(name: str, eps: float, budget_s: int, busy: int, place: str) -> Cells:
    """Numbers of one training; the assessments are as small as they can be and count nowhere."""
    net = network(name)
    module = net.module.requires_grad_()
    test, known = images(net.data, N), images(net.data, TRAINED, "train")
    run = RUNS / ROW / re.sub(r"[^A-Za-z0-9.]+", "-", place)
    with _loaded(busy):
        try:
            card = holdfast.harden(
                module, test, f"linf:{eps}", RECIPE, budget=f"{budget_s}s", suite="quick", fit=known,
                doubts=False, device="cpu", run=run,
            ).card  # fmt: skip
        except UsageError as error:
            epoch_s = _epoch_s(module, known, eps)
            verdict = "refused" if epoch_s > REFUSED * budget_s else "refused wrongly"
            return {verdict: str(error), "one epoch, s": epoch_s}
    planned_s = card["plan"]["attempts"][0]["update_s"]
    found = saved(run / "checkpoints", LAST)
    assert found is not None
    taken_s, n_updates = _measured_updates(found.checkpoint.plans)
    return {
        "recipe": card["recipe"], "epochs": card["epochs"],
        "first plan, epochs": card["plan"]["attempts"][0]["epochs"],
        "planned / measured": planned_s / (taken_s / n_updates),
        "used, %": 100 * card["cost"]["budget_used"], "planning, s": card["cost"]["planning_s"],
        "held out": card["held_out"]["n"],
    }  # fmt: skip


def _measured_updates(plans: Sequence[TrainingPlan]) -> tuple[float, int]:
    """Seconds and number of the updates between the plans of a training, before a guard adds a step to the attack."""
    seconds, n_updates = 0.0, 0
    for last, plan in pairwise(plans):
        if plan.rewound:
            break
        if plan.at > last.at:
            seconds, n_updates = seconds + plan.spent_s - last.spent_s, n_updates + plan.at - last.at
    return (seconds, n_updates) if n_updates else (math.nan, 1)


def _epoch_s(module: torch.nn.Module, known: tuple[torch.Tensor, torch.Tensor], eps: float) -> float:
    """Seconds of one epoch of the fastest recipe, from two updates after a first one."""
    recipe = SingleStep(training=Training(epochs=1, batch=BATCH))
    threat = ThreatModel(ours.constraint("Linf", eps))
    for n in (1, 2):
        data = ours.batch(*(values[: n * BATCH] for values in known))
        start = time.perf_counter()
        list(recipe(Classifier(module), data, threat, rng=Draws(0)))
    return (time.perf_counter() - start) / 2 * updates(TRAINED, BATCH)


@contextmanager
def _loaded(busy: int) -> Iterator[None]:
    """Within it so many processes compute without end."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()
