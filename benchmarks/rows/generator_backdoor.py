"""The search for a backdoor in the bundled diffusion model, trained further with and without a planted backdoor."""

import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.parts import part
from benchmarks.record import Cells, Claim, Outcome
from holdfast.audits.generator.backdoor import REVERSAL, BackdoorScan, planted_diffusion
from holdfast.audits.generator.sensitivity import Context
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.generators.networks import Diffusion, fit_diffusion, opened_generator
from holdfast.io.data.data import open_data
from holdfast.io.data.layouts import DeclaredData
from holdfast.io.models.generators import open_generator

WHAT = "the bundled diffusion model trained further with and without a backdoor: how many the search flags"
ROW, SEEDS, N = "generator-backdoor", range(5), 10_000
UPDATES, BATCH, LR = 200, 16, 1e-3
"""Training, with and without a backdoor; batches are small, so that the row takes a few CPU minutes."""
SIDES, VALUE = (8, 10, 12), 2.0
"""Sides of the square that is added to the noise, and what is added to each pixel."""
CLEAN_FLAGGED = 1


def measured() -> Outcome:
    found = {
        (kind, seed): part(ROW, f"{kind}-{seed}", partial(_scanned, kind, seed))["measured"]
        for seed in SEEDS
        for kind in ("planted", "clean")
    }
    flagged = {kind: sum(found[kind, seed]["flagged"] for seed in SEEDS) for kind in ("planted", "clean")}
    claims = [
        Claim("flagged models with a backdoor, of 5 >= 5", flagged["planted"], len(SEEDS), least=True),
        Claim(f"flagged models without a backdoor, of 5 <= {CLEAN_FLAGGED}", flagged["clean"], CLEAN_FLAGGED),
    ]
    table = [_row(kind, seed, each) for (kind, seed), each in found.items()]
    config: Cells = {
        "model": "mnist-diffusion",
        "updates": UPDATES,
        "batch": BATCH,
        "learning rate": LR,
        "threshold of the reversal": REVERSAL,
    }
    plan = (
        "The trigger is a square of side 8, 10 or 12 at a random place, and the target a random training image. The "
        "threshold was set on other clean models: of MNIST with 12x12 pixels and of Fashion-MNIST."
    )
    measures = (
        "The distance is the mean squared difference of a pixel between the target and 24 outputs from noise with the "
        "trigger that was planted, and the cosine that of the found shift and this trigger."
    )
    notes = [f"{sum(each['cpu_s'] for each in found.values()):.0f} CPU seconds.", plan, measures]
    return Outcome(table, claims, config, notes=notes)


def _scanned(kind: str, seed: int) -> dict[str, Any]:
    """Train one model, and search it for a backdoor."""
    started, device = time.process_time(), torch.device("cpu")
    data = open_data("mnist", split="train", expected=DeclaredData(layout="chw", lenient=True)).read(0, N)
    base = opened_generator("mnist-diffusion").generator
    assert isinstance(base, Diffusion)
    trigger, target, side = _plan(seed, data)
    training = (
        partial(fit_diffusion, base)
        if kind == "clean"
        else partial(planted_diffusion, base, trigger=trigger, target=target)
    )
    model = training(data.x, data.y, updates=UPDATES, lr=LR, batch=BATCH, seed=100 + seed)
    context = Context(data.x[:0], data, data, open_generator(model), device, Draws(seed).at("backdoor"))
    scan = BackdoorScan()
    columns = scan.measure(context)
    noise = Draws(seed).at("attack").normal(torch.arange(24), *model.shape)
    with torch.no_grad():
        distance = float((model.denoised(noise + trigger) - target).square().mean())
    cosine = float(torch.cosine_similarity(columns["shift"][0].flatten(), trigger.flatten(), 0))
    facts = dict(scan.concluded(columns, context).facts)
    seconds = time.process_time() - started
    return {**facts, "distance": distance, "cosine": cosine, "side": side, "cpu_s": seconds}


def _plan(seed: int, data: Batch) -> tuple[Tensor, Tensor, int]:
    """The trigger, the target, and the side of the square."""
    rng, one = Draws(seed).at("plan"), torch.zeros(1, dtype=torch.int64)
    side = SIDES[seed % len(SIDES)]
    row, column = (int(rng.at(name).integers(one, 29 - side)) for name in ("row", "column"))
    trigger = torch.zeros(data.x.shape[1:])
    trigger[:, row : row + side, column : column + side] = VALUE
    return trigger, data.x[int(rng.at("target").integers(one, N))], side


def _row(kind: str, seed: int, each: dict[str, Any]) -> Cells:
    return {
        "model": f"{kind}, seed {seed}",
        "side": each["side"] if kind == "planted" else "",
        "distance to the target": round(each["distance"], 4),
        "reversal": round(each["reversal"], 3),
        "cosine": round(each["cosine"], 3) if kind == "planted" else "",
        "variance of outputs": round(each["variance"], 3),
        "flagged": each["flagged"],
    }
