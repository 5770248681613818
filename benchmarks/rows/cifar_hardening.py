"""What `holdfast harden` makes of CIFAR-10: ResNet-18 on an accelerator, a small residual network without one.

Each training goes on where it was stopped, so that the row may be run in pieces.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.hardened import made, percent, shares, spent
from benchmarks.networks import images
from benchmarks.record import Cells, Claim, Outcome
from holdfast.io.models.architectures import ARCHITECTURES

WHAT = "CIFAR-10 hardened within minutes: ResNet-18 on an accelerator, a small network without one; `fast`"
RESNET18 = {"width": 64, "blocks": 2, "stages": 4}
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
HOW: dict[str, Any] = {"optimizer": "sgd", "lr": 0.1, "augment": "crop-flip"}
SEED, THREADS = 0, 2


@dataclass(frozen=True)
class Track:
    """A threat, how it is trained, and what must be left, in %; without claims it only shows what was reached."""

    name: str
    threat: str
    budget: str
    recipe: dict[str, Any]
    clean: float | None = None
    robust: float | None = None
    arguments: dict[str, int] = field(default_factory=lambda: dict(RESNET18))
    n: int = 10_000


def _recipe(use: str, **training: Any) -> dict[str, Any]:
    return {"use": use, "training": {**HOW, **training}}


ACCELERATED = (
    Track("linf 8/255, 2 minutes", "linf:8/255", "2min", _recipe("n-fgsm"), 80.0, 44.0),
    Track("linf 8/255, 13 minutes", "linf:8/255", "13min", _recipe("trades", awp=0.005), 80.0, 50.0),
    Track("l2 0.5, 13 minutes", "l2:0.5", "13min", _recipe("pgd", awp=0.005), 88.0, 67.0),
)
SMALL: dict[str, Any] = {"arguments": {"width": 16, "blocks": 1}, "n": 1_000}
UNACCELERATED = (
    Track("linf 8/255, small network, 10 minutes", "linf:8/255", "10min", _recipe("n-fgsm"), **SMALL),
    Track("l2 0.5, small network, 10 minutes", "l2:0.5", "10min", _recipe("n-fgsm"), **SMALL),
)


def measured() -> Outcome:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    table: list[Cells] = []
    claims: list[Claim] = []
    detail: Cells = {}
    tracks = ACCELERATED if device == "cuda" else UNACCELERATED
    for track in tracks:
        kept = detail[track.name] = _made(track, device)
        card = kept["measured"]
        table.append({"track": track.name, "recipe": card["recipe"], **shares(card), **spent(card)})
        for what, metric, least in (
            ("clean", "clean_accuracy", track.clean),
            ("fast", "suite_robust_accuracy", track.robust),
        ):
            if least is not None:
                claims.append(
                    Claim(f"{track.name}: {what}, % >= {least:g}", percent(card, metric), least, least=True)
                )
        claims.append(Claim(f"{track.name}: doubts raised <= 0", len(card["after"]["doubts"]), 0))
    notes = [] if device == "cuda" else ["no accelerator: the tracks with ResNet-18 are left out"]
    config: Cells = {
        "tracks": [vars(track) for track in tracks],
        "seed": SEED,
        "device": device,
        "threads": THREADS,
    }
    return Outcome(table, claims, config, detail, notes)


def _made(track: Track, device: str) -> Cells:
    """The card of a network that begins with the weights of the seed."""
    torch.manual_seed(SEED)
    net = ARCHITECTURES["resnet"](**track.arguments)
    return made(
        "cifar-hardening", track.name, net, images("cifar10", track.n), track.threat, track.recipe, track.budget,
        fit=images("cifar10", 50_000, split="train"), suite="fast", n=track.n, seed=SEED, threads=THREADS,
        device=device, mean=MEAN, std=STD,
    )  # fmt: skip
