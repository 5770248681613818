"""The recipe `robust-gan` beside the plain training of the same GAN, with equally many updates."""

import time
from functools import partial
from typing import Any

import torch

from benchmarks.parts import part
from benchmarks.record import Cells, Claim, Outcome
from holdfast.audits.generator.attacks import Discriminator
from holdfast.audits.generator.audit import GeneratorAudit
from holdfast.audits.generator.copies import frechet_distance
from holdfast.audits.generator.hardening import GeneratorHardening
from holdfast.audits.generator.sensitivity import Context, LatentChange
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.generators import ImageGAN
from holdfast.io.data.data import open_data
from holdfast.io.data.layouts import DeclaredData
from holdfast.io.models.generators import open_generator
from holdfast.io.models.models import open_model
from holdfast.recipes.training.gans import RobustLosses

WHAT = "`robust-gan` beside the plain GAN on MNIST, equal updates, three seeds"
ROW = "robust-gan"
UPDATES, SEEDS, EPS, N = 1_700, (0, 1, 2), 0.1, 5_000
"""Updates of each training, of which the robust one takes about three CPU minutes; size of the latent and of the pixel
changes; numbers of samples and of held-out images."""
LOSSES = {
    "plain": RobustLosses(eps=0, smoothness=0, r1=0, class_head=0),
    "robust": RobustLosses(),
}
LARGER = 0.05
"""share by which the Fréchet distance may be larger"""


def measured() -> Outcome:
    parts = {
        (kind, seed): part(ROW, f"{kind}-{seed}", partial(_trained, kind, seed))
        for seed in SEEDS
        for kind in LOSSES
    }
    table: list[Cells] = [
        {"training": kind, "seed": seed, **found["measured"]} for (kind, seed), found in parts.items()
    ]

    def mean(kind: str, name: str) -> float:
        return sum(float(parts[kind, seed]["measured"][name]) for seed in SEEDS) / len(SEEDS)

    def claim(name: str, limit: float) -> Claim:
        return Claim(
            f"{name}, robust / plain, mean of the seeds",
            mean("robust", name) / max(mean("plain", name), 1e-9),
            limit,
        )

    claims = [
        claim("worst latent change", 1.0),
        claim("evasion of the discriminator", 1.0),
        claim("Fréchet distance", 1 + LARGER),
    ]
    config: Cells = {
        "model": "ImageGAN", "data": "mnist", "updates": UPDATES, "seeds": SEEDS, "latent change": EPS,
        "pixel change": EPS, "samples": N, "features": "mnist-cnn", "losses": {k: vars(v) for k, v in LOSSES.items()},
    }  # fmt: skip
    detail = {f"{kind}-{seed}": found for (kind, seed), found in parts.items()}
    return Outcome(table, claims, config, detail, ["the last update of each training is measured"])


def _digits(split: str) -> Batch:
    data = open_data("mnist", split=split, expected=DeclaredData(layout="chw", lenient=True))
    return data.read(0, len(data))


def _trained(kind: str, seed: int) -> Cells:
    training, held_out = _digits("train"), _digits("test").first(N)
    features = open_model("mnist-cnn").model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        gan = ImageGAN()
    given = open_generator(gan)
    audit = GeneratorAudit(
        training, held_out, N, lambda: given.samples(N, seed), lambda: features, torch.device("cpu"), Draws(seed),
        given,
    )  # fmt: skip
    work = GeneratorHardening(audit, gan, LOSSES[kind], False, None, seed, Draws(seed).at(ROW))
    trainer, begun = work.trainer(), time.process_time()
    for update in range(UPDATES):
        trainer.update(work.batch(update), work.rng.at("update", update))
    seconds = time.process_time() - begun
    new = open_generator(work.trained(trainer))
    samples = new.samples(N, seed)
    context = Context(samples, training, held_out, new, torch.device("cpu"), Draws(seed).at("parts"))
    facts: dict[str, Any] = {}
    for measure in (LatentChange(EPS), Discriminator(EPS)):
        facts[measure.name] = measure.concluded(measure.measure(context), context).facts
    latent, evaded = facts["sensitivity"], facts["discriminator"]
    return {
        "worst latent change": latent["worst"],
        "random latent change": latent["random"],
        "evasion of the discriminator": evaded["generated_worst"],
        "of them unchanged": evaded["generated_unchanged"],
        "Fréchet distance": frechet_distance(work.features(samples), work.features(held_out.x)),
        "CPU s": round(seconds, 1),
    }
