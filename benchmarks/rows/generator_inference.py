"""Membership inference of generators that memorise 200 digits, and of the bundled ones, which do not."""

import time
from functools import partial

import torch
from torch import nn

from benchmarks.parts import part
from benchmarks.record import Cells, Claim, Outcome
from holdfast.audits.generator.inference import FPR, Membership
from holdfast.audits.generator.parts import Context
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.model import Bounds
from holdfast.generators import Diffusion, ImageGAN, diffusion
from holdfast.generators.opening import opened_generator
from holdfast.io.data.data import open_data
from holdfast.io.data.expected import Expected
from holdfast.io.models.generators import OpenedGenerator
from holdfast.recipes.training import generator as gans

WHAT = "membership inference of a GAN and a diffusion model of 200 digits, and of the bundled ones of 60,000"
ROW, SEED, FEW, SAMPLES = "generator-inference", 0, 200, 2_000
UPDATES = {"diffusion": 2_000, "gan": 6_000}
"""updates of the generators of 200 digits; they were fixed before the first measurement"""
BUNDLED = {"diffusion": "mnist-diffusion", "gan": "mnist-gan"}


def measured() -> Outcome:
    detail: Cells = {
        f"{kind}, {size}": part(ROW, f"{kind}-{size}", partial(found, kind, size))
        for kind in UPDATES
        for size in (FEW, 60_000)
    }
    table: list[Cells] = []
    claims = []
    for kind in UPDATES:
        for size in (FEW, 60_000):
            result = detail[f"{kind}, {size}"]["measured"]
            best = result[result["best"]]
            table.append(
                {
                    "generator": kind, "training digits": size, "score": result["best"],
                    "found at 1 %, %": _interval(best), "AUC": round(best["auc"], 3),
                    "own samples, %": round(100 * best["own"], 1),
                    "memorised, %": round(100 * result["memorised"], 1) if "memorised" in result else "–",
                    "control, %": _interval(result["control"]), "CPU s": round(result["seconds"]),
                }
            )  # fmt: skip
            name = f"{kind} of {size:,} digits"
            if size == FEW:
                claims.append(Claim(f"{name}: found at 1 % >= 0.5", best["tpr"], 0.5, least=True))
            else:
                inside = best["low"] <= FPR <= best["high"]
                claims.append(Claim(f"{name}: interval contains 1 % (1: yes)", float(inside), 1, least=True))
    config: Cells = {"samples": SAMPLES, "updates": UPDATES, "seed": SEED, "threads": 1}
    return Outcome(table, claims, config, detail, ["one seed"])


def found(kind: str, size: int) -> Cells:
    """The facts of the part on membership, and the CPU time with training."""
    started = time.process_time()
    training, test = _digits("train"), _digits("test")
    if size == FEW:
        rows = torch.randperm(len(training), generator=torch.Generator().manual_seed(SEED))[:FEW]
        training = training.take(rows)
        generator = OpenedGenerator(kind, "", trained(kind, training))
    else:
        generator = opened_generator(BUNDLED[kind])
    samples = generator.samples(SAMPLES, SEED)
    rng = Draws(SEED).at(ROW)
    context = Context(samples, training, test, generator, torch.device("cpu"), rng)
    membership = Membership()
    finding = membership.concluded(membership.measure(context), context)
    return {**finding.facts, "seconds": time.process_time() - started}


def trained(kind: str, data: Batch) -> nn.Module:
    """A generator that is trained on few digits for many updates."""
    torch.manual_seed(SEED)
    if kind == "diffusion":
        return diffusion.fit(Diffusion(), data.x, data.y, updates=UPDATES[kind], seed=SEED)
    training = gans.GAN(data.x[:1], 10, Bounds(), Draws(SEED))
    for update in range(UPDATES[kind]):
        rows = torch.randint(len(data), (gans.BATCH,), generator=torch.Generator().manual_seed(update))
        training.update(data.take(rows), Draws(SEED).at("update", update))
    net = ImageGAN()
    net.generator.load_state_dict(training.average.state_dict())
    net.discriminator.load_state_dict(training.discriminator.state_dict())
    return net.eval()


def _digits(split: str) -> Batch:
    data = open_data("mnist", split=split, expected=Expected(layout="chw", lenient=True))
    return data.read(0, len(data))


def _interval(result: Cells) -> str:
    return f"{100 * result['tpr']:.1f} ({100 * result['low']:.1f} to {100 * result['high']:.1f})"
