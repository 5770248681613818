"""Networks of certified training: what bounds and branch and bound prove about them on every test image."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.hardened import made, percent, spent
from benchmarks.networks import images
from benchmarks.parts import RUNS, part
from benchmarks.record import Cells, Claim, Outcome
from holdfast.certifiers.branching import BranchAndBound
from holdfast.certifiers.protocol import Prover
from holdfast.certifiers.provers import IBP, Crown
from holdfast.core.batch import Batch
from holdfast.core.model import Classifier
from holdfast.io.models.models import open_model
from holdfast.threats.parsing import parse_threat

WHAT = "certified training of the bundled network, MNIST linf:0.1: proved by bounds and branch and bound, all images"
ROW, SEED, THREADS, THREAT, MODEL = "certified-training", 0, 1, "linf:0.1", "mnist-cnn"
TIMEOUT_S = 5.0
"""Time limit of branch and bound for each image."""
CPU_S, CLEAN, CERTIFIED = 1_200.0, 98.0, 95.0
"""CPU seconds of ten minutes on two cores, and what must be reached within them, in %."""
CASCADE: tuple[Prover, ...] = (IBP(), Crown(), BranchAndBound(timeout_s=TIMEOUT_S))


@dataclass(frozen=True)
class Track:
    """A recipe and its settings. Trainings have a number of epochs, because a budget of wall-clock time depends on the
    load of the machine.
    """

    recipe: str
    training: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


FASTER = {"precision": "bfloat16"}
"""Products in bfloat16 take about 0.6 times as long on the processor of the record; proofs are made in float32."""
TRACKS = (Track("sabr", {"epochs": 16, **FASTER}), Track("ibp", {"epochs": 30, **FASTER}))


def measured() -> Outcome:
    table: list[Cells] = []
    claims: list[Claim] = []
    detail: Cells = {}
    for track in TRACKS:
        recipe = {"use": track.recipe, **track.settings, "training": track.training}
        card = made(
            ROW, track.recipe, MODEL, "mnist", THREAT, recipe, None, suite="quick", seed=SEED, threads=THREADS
        )  # fmt: skip
        proofs = part(ROW, f"{track.recipe} proofs", lambda track=track: _proved(track))
        shares, took = proofs["measured"], spent(card["measured"])
        table.append(
            {"recipe": track.recipe, "epochs": took["epochs"], "training, CPU s": round(took["CPU s"]), **shares,
             "quick on 1,000, %": round(percent(card["measured"], "suite_robust_accuracy"), 1)}
        )  # fmt: skip
        detail |= {track.recipe: card, f"{track.recipe} proofs": proofs}
    best = max(table, key=lambda row: min(row["clean, %"] - CLEAN, row["certified, %"] - CERTIFIED))
    name = best["recipe"]
    claims = [
        Claim(f"{name}: clean, % >= {CLEAN:g}", best["clean, %"], CLEAN, least=True),
        Claim(f"{name}: certified, % >= {CERTIFIED:g}", best["certified, %"], CERTIFIED, least=True),
        Claim(f"{name}: CPU s of the training <= {CPU_S:g}", best["training, CPU s"], CPU_S),
    ]
    config: Cells = {
        "model": MODEL, "data": "mnist", "threat": THREAT, "timeout_s": TIMEOUT_S, "seed": SEED, "threads": THREADS,
        "tracks": [vars(track) for track in TRACKS],
    }  # fmt: skip
    return Outcome(
        table, claims, config, detail, ["one seed; evaluations on held-out examples are part of the CPU time"]
    )


def _proved(track: Track) -> Cells:
    """Shares of all test images that are correct, and that each method of the cascade has proved, in %."""
    model = (
        open_model(str(RUNS / ROW / track.recipe / "model.safetensors")).model.eval().requires_grad_(False)
    )
    x, y = images("mnist", 10_000)
    torch.set_num_threads(1)
    return cascade(model, Batch(x, y, torch.arange(len(y))), CASCADE, threat=THREAT)


def cascade(model: Classifier, examples: Batch, provers: Sequence[Prover], *, threat: str) -> Cells:
    """What each prover adds to those before it, as shares of all images in %, and the CPU time of all of them."""
    parts = [examples.take(rows) for rows in torch.arange(len(examples)).split(500)]
    with torch.no_grad():
        correct = torch.cat([model(each.x).argmax(1) == each.y for each in parts])
    certified, broken = torch.zeros_like(correct), torch.zeros_like(correct)
    shares: Cells = {"clean, %": _percent(correct)}
    begun = time.process_time()
    for prover in provers:
        left = (correct & ~certified & ~broken).nonzero()[:, 0]
        if not len(left):
            break
        batch = examples.take(left)
        proofs = prover.ready(
            model, batch.take(torch.arange(min(8, len(left)))), parse_threat(threat).opened()
        )(batch)
        certified[left], broken[left] = proofs.certified, proofs.broken
        shares[f"{prover.name}, %"] = _percent(certified)
    shares |= {
        "certified, %": _percent(certified),
        "broken, %": _percent(broken),
        "undecided": int((correct & ~certified & ~broken).sum()),
        "CPU ms an image": round(1_000 * (time.process_time() - begun) / len(examples), 1),
    }
    return shares


def _percent(mask: torch.Tensor) -> float:
    return round(100 * float(mask.double().mean()), 2)
