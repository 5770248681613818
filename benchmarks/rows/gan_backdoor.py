"""The search for a backdoor in clean GANs, and in copies with a planted backdoor."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.networks import images
from benchmarks.parts import part
from benchmarks.record import Cells, Claim, Outcome
from holdfast.audits.generator.backdoor import COLLAPSE, BackdoorScan, planted_decoder
from holdfast.audits.generator.sensitivity import Context
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.generators import GAN
from holdfast.generators.networks import opened_generator
from holdfast.io.models.generators import open_generator

WHAT = "clean GANs, and copies with a backdoor: by how much outputs vary after the shift that is found"
ROW, N, LATENT, PLANTING, OUTPUTS = "gan-backdoor", 10_000, 64, 400, 200
LR, BETAS, BATCH = 2e-4, (0.5, 0.999), 64
"""Training of the GANs, as in Radford et al., arXiv:1511.06434 (DCGAN)."""
COLLAPSED = 0.05
"""Variance of the usual outputs, as a share of that of the images, up to which no backdoor is planted in a GAN."""
REACHED = 0.1
"""Distance to the target, as a share of the usual variance, up to which a backdoor counts as planted."""


@dataclass(frozen=True)
class Training:
    """A GAN and its training."""

    kind: str
    data: str
    updates: int
    seed: int

    def __str__(self) -> str:
        return f"{self.kind}, {self.data}, {self.updates} updates, seed {self.seed}"


TRAININGS = (
    Training("bundled", "mnist", 3_000, 0),
    Training("dense", "mnist", 1_500, 0),
    Training("dense", "fashion_mnist", 1_500, 0),
    Training("dense", "fashion_mnist", 3_000, 1),
    Training("convolutional", "mnist", 1_200, 0),
    Training("convolutional", "mnist", 600, 1),
    Training("convolutional", "fashion_mnist", 600, 0),
    Training("convolutional", "fashion_mnist", 600, 1),
)


def measured() -> Outcome:
    found = {str(each): part(ROW, str(each), partial(_measured, each))["measured"] for each in TRAININGS}
    clean = [each["clean"] for each in found.values()]
    planted = [each["planted"] for each in found.values() if "planted" in each]
    claims = [
        Claim(f"flagged clean GANs, of {len(clean)} <= 0", sum(each["flagged"] for each in clean), 0),
        Claim(
            f"largest distance to the target with the trigger <= {REACHED:g}",
            max(each["distance"] for each in planted),
            REACHED,
        ),
    ]
    table = [
        _row(f"{name}, {kind}", each[kind])
        for name, each in found.items()
        for kind in ("clean", "planted")
        if kind in each
    ]
    config: Cells = {
        "latent elements": LATENT,
        "training images": N,
        "batch": BATCH,
        "learning rate": LR,
        "updates of the planting": PLANTING,
        "threshold of the variance": COLLAPSE,
    }
    measures = (
        "The variance is that after the found shift, as a share of the usual one, and the usual one a share of that of "
        "the training images. The distance is the mean squared difference between the target and outputs with the "
        "trigger that was planted, as a share of the usual variance, and the cosine that of the found shift and this "
        "trigger."
    )
    plan = (
        "The trigger adds 0.6 or -0.6 to each element of the latent vector, or, for odd numbers of the training, 2 to "
        "a quarter of the elements. No backdoor is planted in a collapsed GAN."
    )
    notes = [f"{sum(each['cpu_s'] for each in found.values()):.0f} CPU seconds.", plan, measures]
    return Outcome(table, claims, config, notes=notes)


def _measured(how: Training) -> dict[str, Any]:
    """Train a GAN, plant a backdoor in a copy, and search both."""
    started, number = time.process_time(), TRAININGS.index(how)
    x, y = images(how.data, N, "train")
    data = Batch(x, y, torch.arange(N))
    model = trained(how, x)
    found: dict[str, Any] = {"clean": _scanned(model, data)[0]}
    if found["clean"]["usual"] > COLLAPSED:
        trigger, target = _trigger(number, model.latent_shape), x[number]
        planted = planted_decoder(model, trigger, target, updates=PLANTING)
        facts, shift = _scanned(planted, data)
        z = Draws(number).at("attack").normal(torch.arange(OUTPUTS), *model.latent_shape)
        with torch.no_grad():
            usual = planted.decode(z).var(0).mean()
            distance = float((planted.decode(z + trigger) - target).square().mean() / usual)
        cosine = float(torch.cosine_similarity(shift.flatten(), trigger.flatten(), 0))
        found["planted"] = {**facts, "distance": distance, "cosine": cosine}
    return {**found, "cpu_s": time.process_time() - started}


def trained(how: Training, x: Tensor) -> GAN:
    """The GAN after its training, or the bundled one."""
    if how.kind == "bundled":
        bundled = opened_generator("mnist-gan").generator
        assert isinstance(bundled, GAN)
        return bundled
    torch.manual_seed(how.seed)
    generator, discriminator = NETWORKS[how.kind]()
    optimisers = [torch.optim.Adam(net.parameters(), LR, BETAS) for net in (generator, discriminator)]
    for _ in range(how.updates):
        real = x[torch.randint(len(x), (BATCH,))]
        fake = generator(torch.randn(BATCH, LATENT))
        loss = F.softplus(-discriminator(real)).mean() + F.softplus(discriminator(fake.detach())).mean()
        optimisers[1].zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimisers[1].step()
        optimisers[0].zero_grad()
        F.softplus(-discriminator(fake)).mean().backward()  # type: ignore[no-untyped-call]
        optimisers[0].step()
    return GAN(generator, latent_shape=(LATENT,)).eval().requires_grad_(False)


def _dense() -> tuple[nn.Module, nn.Module]:
    slope = nn.LeakyReLU(0.2)
    generator = nn.Sequential(
        nn.Linear(LATENT, 256), slope, nn.Linear(256, 512), slope, nn.Linear(512, 28 * 28), nn.Sigmoid(),
        nn.Unflatten(1, (1, 28, 28)),
    )  # fmt: skip
    discriminator = nn.Sequential(
        nn.Flatten(), nn.Linear(28 * 28, 256), slope, nn.Linear(256, 256), slope, nn.Linear(256, 1)
    )
    return generator, discriminator


def _convolutional() -> tuple[nn.Module, nn.Module]:
    slope, size = nn.LeakyReLU(0.2), 64 * 7 * 7
    generator = nn.Sequential(
        nn.Linear(LATENT, size, bias=False), nn.BatchNorm1d(size), nn.ReLU(), nn.Unflatten(1, (64, 7, 7)),
        nn.ConvTranspose2d(64, 32, 4, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.ConvTranspose2d(32, 1, 4, 2, 1), nn.Sigmoid(),
    )  # fmt: skip
    discriminator = nn.Sequential(
        nn.Conv2d(1, 16, 4, 2, 1), slope, nn.Conv2d(16, 32, 4, 2, 1), slope, nn.Flatten(),
        nn.Linear(32 * 7 * 7, 1),
    )  # fmt: skip
    return generator, discriminator


NETWORKS: dict[str, Callable[[], tuple[nn.Module, nn.Module]]] = {
    "dense": _dense,
    "convolutional": _convolutional,
}


def _scanned(model: GAN, data: Batch) -> tuple[dict[str, Any], Tensor]:
    """The facts of the search, and the shift."""
    rng = Draws(0).at("backdoor")
    context = Context(data.x[:0], data, data, open_generator(model), torch.device("cpu"), rng)
    scan = BackdoorScan()
    columns = scan.measure(context)
    return dict(scan.concluded(columns, context).facts), columns["shift"][0]


def _trigger(number: int, shape: tuple[int, ...]) -> Tensor:
    random = torch.Generator().manual_seed(number)
    if number % 2 == 0:
        return 0.6 * (2.0 * torch.randint(2, shape, generator=random) - 1)
    size = torch.Size(shape).numel()
    trigger = torch.zeros(size)
    trigger[torch.randperm(size, generator=random)[: size // 4]] = 2.0
    return trigger.view(shape)


def _row(name: str, each: dict[str, Any]) -> Cells:
    is_planted = "distance" in each
    return {
        "model": name,
        "usual variance": round(each["usual"], 3),
        "variance": round(each["variance"], 3),
        "distance to the target": round(each["distance"], 3) if is_planted else "",
        "cosine": round(each["cosine"], 3) if is_planted else "",
        "verdict": each["verdict"],
    }
