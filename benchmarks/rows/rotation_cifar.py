"""Constructions that rotate hardened parameter sets of a residual network, and a chain of rotations: CIFAR-10.

ResNet-18 on all training images where there is an accelerator; without one a network of 78,042 parameters on a tenth of
them, which is labelled so: what it is worth is no more than its own accuracy says. Statistics of batch norm are
computed anew for each set. The attackers are those of the row `rotation`.
"""

from dataclasses import replace
from functools import cache, partial

import torch

from benchmarks.lines import LINES
from benchmarks.networks import images
from benchmarks.record import Cells, Outcome
from benchmarks.rotated import Examples, Kind, single_step
from benchmarks.rows.cifar_hardening import MEAN, RESNET18, STD
from benchmarks.rows.rotation import Construction, generated, immunised, independent, static
from benchmarks.rows.rotation_robust import outcome
from holdfast.core.batch import Batch
from holdfast.core.model import Classifier
from holdfast.io.models.architectures import ARCHITECTURES
from holdfast.recipes.training.fit import Training
from holdfast.rotation import Basins, Immunise
from holdfast.rotation.immunising import Crafting

WHAT = "rotating hardened sets of a residual network on CIFAR-10: ResNet-18 on an accelerator, a small one without"
ROW, SEEDS = "rotation-cifar", (0,)
ACCELERATED = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ACCELERATED else "cpu")
TRAINED, HELD, TEST = (45_000, 5_000, 10_000) if ACCELERATED else (5_000, 1_000, 2_000)
NETWORK: dict[str, int] = RESNET18 if ACCELERATED else {"width": 16, "blocks": 1}
EPOCHS = 15 if ACCELERATED else 10
CONSTRUCTIONS: dict[str, Construction] = {
    "static": static,
    "fresh seeds": independent,
    "fresh seed, immunised": partial(immunised, fresh=True),
    "draws of 3 basins": partial(generated, "basins"),
}
CHOSEN = ("chain of immunised rotations", "FGSM-RS, as many passes", "PGD of 7 steps, as many passes")


def network() -> Classifier:
    """A residual network at weights that are drawn anew."""
    net = ARCHITECTURES["resnet"](**NETWORK)
    return Classifier(net, mean=MEAN, std=STD, classes=10).to(DEVICE).eval()


@cache
def examples() -> Examples:
    """Training images, the first that follow them, which admit, and test images."""
    x, y = images("cifar10", TRAINED + HELD, split="train")
    train, held = (_batch(x[rows], y[rows]) for rows in (slice(TRAINED), slice(TRAINED, None)))
    return Examples(train, held, _batch(*images("cifar10", TEST)))


def _batch(x: torch.Tensor, y: torch.Tensor) -> Batch:
    return Batch(x, y, torch.arange(len(x))).to(DEVICE)


_HOW = Training(
    epochs=EPOCHS,
    batch=64,
    optimizer="sgd",
    lr=0.05,
    averaging="none",
    augment="crop-flip",
    layout="channels-last",
)
KIND = Kind(
    "robust", ROW, 8 / 255, single_step(_HOW), single_step(_HOW), network, examples,
    Basins(seeds=3, sets=10, every=4, lr=1e-3), old=3, live=2, own=2,
    immunise=Immunise(crafting=Crafting(examples=TRAINED // 8)),
    attacks=400 if ACCELERATED else 200, drawn=160 if ACCELERATED else 20,
)  # fmt: skip


def measured() -> Outcome:
    found = outcome(KIND, SEEDS, CONSTRUCTIONS, {name: LINES[name] for name in CHOSEN})
    config: Cells = {
        "network": NETWORK,
        "parameters": sum(p.numel() for p in network().parameters()),
        "training images": TRAINED,
        "epochs": EPOCHS,
        "device": DEVICE.type,
        **found.config,
    }
    few = "no accelerator: a small network on a tenth of the images, one seed"
    return replace(found, config=config, notes=found.notes if ACCELERATED else [*found.notes, few])
