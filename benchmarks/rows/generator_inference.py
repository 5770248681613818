"""Membership inference of generators that memorise 200 digits, and of the bundled ones, which do not."""

import time
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.parts import part
from benchmarks.record import Cells, Claim, Outcome
from holdfast.audits.generator.attacks import FPR, Membership
from holdfast.audits.generator.copies import copies
from holdfast.audits.generator.sensitivity import Context
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.model import Bounds
from holdfast.generators import GAN, Diffusion
from holdfast.generators.networks import fit_diffusion, opened_generator
from holdfast.io.data.data import open_data
from holdfast.io.data.layouts import DeclaredData
from holdfast.io.models.generators import OpenedGenerator
from holdfast.recipes.training import gans
from holdfast.recipes.training.gans import RobustGAN, RobustLosses

WHAT = "membership inference of a GAN and a diffusion model of 200 digits, and of the bundled ones of 60,000"
ROW, SEED, FEW, SAMPLES = "generator-inference", 0, 200, 2_000
UPDATES = {"diffusion": 6_000, "gan": 3_000}
"""Updates of the generators of 200 digits. All settings were chosen by the share of copies among the samples, and not
by the scores."""
BATCH, LATENT, WIDTH, R1 = 16, 8, 256, 0.1
"""Examples of an update of the diffusion model; latent values, width of the layers and weight of R1 of the GAN."""
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
                    "generator": kind, "training digits": size, "copies, %": round(100 * result["copies"], 1),
                    "score": result["best"],
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
    config: Cells = {
        "samples": SAMPLES,
        "updates": UPDATES,
        "batch": {"diffusion": BATCH, "gan": gans.BATCH},
        "seed": SEED,
        "threads": 1,
    }
    return Outcome(table, claims, config, detail, ["one seed"])


def found(kind: str, size: int) -> Cells:
    """The facts of the part on membership, and the CPU time with training."""
    started = time.process_time()
    training, test = _digits("train"), _digits("test")
    if size == FEW:
        rows = torch.randperm(len(training), generator=torch.Generator().manual_seed(SEED))[:FEW]
        training = training.take(rows)
        generator = OpenedGenerator(kind, "", memorising(kind, training.x))
    else:
        generator = opened_generator(BUNDLED[kind])
    samples = generator.samples(SAMPLES, SEED)
    rng = Draws(SEED).at(ROW)
    context = Context(samples, training, test, generator, torch.device("cpu"), rng)
    membership = Membership()
    finding = membership.concluded(membership.measure(context), context)
    found = copies(samples, training.x, test.x)
    copied = found.rate.value + found.near.value
    return {**finding.facts, "copies": copied, "seconds": time.process_time() - started}


class _Generator(nn.Module):
    """Dense generator with a latent vector for each class."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Embedding(FEW, WIDTH // 2)
        self.layers = nn.Sequential(
            nn.Linear(LATENT + WIDTH // 2, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(),
            nn.Linear(WIDTH, 28 * 28), nn.Sigmoid(), nn.Unflatten(1, (1, 28, 28)),
        )  # fmt: skip

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        images: Tensor = self.layers(torch.cat((z, self.classes(y)), 1))
        return images


class _Discriminator(nn.Module):
    """Dense discriminator with a score for each class."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(28 * 28, WIDTH), nn.LeakyReLU(0.2), nn.Linear(WIDTH, WIDTH), nn.LeakyReLU(0.2),
            nn.Linear(WIDTH, FEW),
        )  # fmt: skip

    def scores(self, x: Tensor) -> Tensor:
        scores: Tensor = self.layers(x)
        return scores

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.scores(x).gather(1, y[:, None])[:, 0]


def memorising(kind: str, x: Tensor) -> Diffusion | GAN:
    """A generator that memorises the images. Each of them is a class of its own, as images with unique captions are,
    which a model of text and images memorises (Somepalli et al., arXiv:2305.20086).
    """
    torch.manual_seed(SEED)
    y = torch.arange(FEW)
    if kind == "diffusion":
        return fit_diffusion(Diffusion(classes=FEW), x, y, updates=UPDATES[kind], batch=BATCH, seed=SEED)
    losses = RobustLosses(eps=0, smoothness=0, r1=R1, class_head=0)
    networks = _Generator(), _Discriminator()
    training = RobustGAN(x[:1], FEW, Bounds(), Draws(SEED), networks, (LATENT,), losses)
    for update in range(UPDATES[kind]):
        rows = torch.randint(FEW, (gans.BATCH,), generator=torch.Generator().manual_seed(update))
        batch = Batch(x[rows], y[rows], torch.arange(gans.BATCH))
        training.update(batch, Draws(SEED).at("update", update))
    return GAN(training.average, latent_shape=(LATENT,), classes=FEW)


def _digits(split: str) -> Batch:
    data = open_data("mnist", split=split, expected=DeclaredData(layout="chw", lenient=True))
    return data.read(0, len(data))


def _interval(result: Cells) -> str:
    return f"{100 * result['tpr']:.1f} ({100 * result['low']:.1f} to {100 * result['high']:.1f})"
