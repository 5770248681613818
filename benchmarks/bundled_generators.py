"""Trains the bundled generators on all MNIST training images and writes their cards."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import holdfast
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.model import Bounds
from holdfast.generators import Diffusion, ImageGAN, ImageVAE, networks
from holdfast.generators.networks import content_of
from holdfast.recipes.training import gans

SEED, SAMPLES = 0, 500
MEASURED = {
    "frechet": "Fréchet distance",
    "copy_rate": "share of copies",
}
"""Metrics of the audit that are on the card, if the audit has them, and their titles."""


@dataclass(frozen=True)
class Recipe:
    """A generator and its training."""

    kind: str
    """its name in `holdfast.generators.networks.GENERATORS`"""
    what: str
    settings: dict[str, Any]
    train: Callable[[Tensor, Tensor], nn.Module]


def trained_diffusion(x: Tensor, y: Tensor) -> nn.Module:
    return networks.fit_diffusion(Diffusion(), x, y, updates=DIFFUSION_UPDATES, seed=SEED)


def trained_vae(x: Tensor, y: Tensor) -> nn.Module:
    return networks.fit_vae(ImageVAE(), x, updates=VAE_UPDATES, seed=SEED)


def trained_gan(x: Tensor, y: Tensor) -> nn.Module:
    training = gans.GAN(x[:1], 10, Bounds(), Draws(SEED))
    for update in range(GAN_UPDATES):
        rng = Draws(SEED).at("update", update)
        rows = torch.randint(len(x), (gans.BATCH,), generator=torch.Generator().manual_seed(update))
        training.update(Batch(x[rows], y[rows], rows), rng)
    net = ImageGAN()
    net.generator.load_state_dict(training.average.state_dict())
    net.discriminator.load_state_dict(training.discriminator.state_dict())
    return net.eval()


DIFFUSION_UPDATES, VAE_UPDATES, GAN_UPDATES = 4_500, 2_500, 3_000
GENERATORS = {
    "mnist-diffusion": Recipe(
        "diffusion",
        "class-conditional diffusion model with 20 steps of a deterministic sampler",
        {"updates": DIFFUSION_UPDATES, "seed": SEED},
        trained_diffusion,
    ),
    "mnist-gan": Recipe(
        "gan",
        "class-conditional GAN with 48 latent values",
        {"updates": GAN_UPDATES, "seed": SEED},
        trained_gan,
    ),
    "mnist-vae": Recipe(
        "vae", "VAE with 16 latent values", {"updates": VAE_UPDATES, "seed": SEED}, trained_vae
    ),
}
"""The bundled generators, by name."""


def write_generator(name: str, folder: Path, training: tuple[Tensor, Tensor]) -> None:
    """Train a generator, and write its weights in half precision and its card."""
    recipe, start = GENERATORS[name], time.process_time()
    torch.manual_seed(SEED)
    net = recipe.train(*training)
    spent = time.process_time() - start
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.safetensors").write_bytes(content_of(net.half(), recipe.kind, {}))
    write_card(name, folder, sum(p.numel() for p in net.parameters()), spent)


def write_card(name: str, folder: Path, n_parameters: int, spent: float) -> None:
    """Audit the generator, and write the card from the number of its parameters, the CPU seconds of its training, and
    the results.
    """
    recipe, given = GENERATORS[name], {"held_out": "mnist-mini", "features": "mnist-cnn"}
    found = holdfast.audit.generator(
        name, "mnist-mini", **given, samples=SAMPLES, latent=0, seed=SEED, device="cpu"
    )
    rows = "\n".join(
        f"| {title} | {float(found.metrics[metric].value):.3g} |"
        for metric, title in MEASURED.items()
        if metric in found.metrics
    )
    settings = ", ".join(f"{key} {value:,}" for key, value in recipe.settings.items())
    text = f"""# {name}

A {recipe.what} for images of digits. Bundled for demonstration and tests, not for production.

| | |
| --- | --- |
| kind | {recipe.kind}, {n_parameters:,} parameters in half precision |
| samples | 1 x 28 x 28, values in [0, 1] |
| data | all MNIST training images |
| training | `make bundled`, {settings}; {spent:.0f} s of CPU time on one thread |
| versions | torch {torch.__version__.split("+")[0]} |
{rows}

The measures are those of
`holdfast audit generator {name} mnist-mini --held-out mnist-mini --features mnist-cnn --samples {SAMPLES} --latent 0`.
Copies are searched among the first 5,000 training images.

Licence: Apache-2.0. Trained on MNIST by Yann LeCun, Corinna Cortes and Christopher J. C. Burges (CC BY-SA 3.0).
"""
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
