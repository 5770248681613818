"""Turns and shifts beside Foolbox's at the same grid, and one change for all images beside ART's on the same data.

Foolbox shifts in the frame of the turned image, the paper and we in that of the clean one: as sets the grids differ.
"""

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import ours
from benchmarks.absent import Absent
from benchmarks.meter import cpu_seconds
from benchmarks.networks import images, present
from benchmarks.peers import peer
from benchmarks.record import Cells, Claim, Outcome
from holdfast.attacks import GridSearch, TransformPGD, Universal, UniversalDeepFool
from holdfast.core.constraints import Linf
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.runs.harness.measure import measure
from holdfast.threats.transformations import Spatial

WHAT = "turns and shifts, and universal changes: accuracy left, beside Foolbox's and ART's"
NETS = ("mnist-cnn", "hardened-by-hand")
N, TURNS, SHIFTS, ROTATE, SHIFT, SEED = 200, 15, 5, 30.0, 3.0, 0
FIT, EPS, ROUNDS = 200, 0.2, 3
"""Of universal changes: examples to learn on, eps, and rounds of ART's, each of which costs more than all of ours."""

SECOND = ("TransformPGD", "UniversalDeepFool")
"""Who stands beside the one that is claimed to be at least as strong as the peer."""


def measured() -> Outcome:
    table: list[Cells] = []
    claims: list[Claim] = []
    notes: list[str] = []
    for net, x, y in present([(name,) for name in NETS], N, notes):
        train = images(net.data, FIT, split="train")
        spatial = {
            "GridSearch": partial(_spatial, net.module, x, y, GridSearch(turns=TURNS, values=SHIFTS)),
            "Foolbox": partial(_foolbox, net.module, x, y),
            "TransformPGD": partial(_spatial, net.module, x, y, TransformPGD()),
        }
        universal = {
            "Universal": partial(_universal, net.module, x, y, *train, Universal()),
            "UniversalDeepFool": partial(_universal, net.module, x, y, *train, UniversalDeepFool()),
            "ART": partial(_art, net.module, x, y, *train),
        }
        for what, contestants in (("turns and shifts", spatial), ("universal", universal)):
            left = _left(f"{net.name}, {what}", contestants, table, notes)
            mine, *others = (left[who] for who in contestants if who in left and who not in SECOND)
            claims += [Claim(f"{net.name}, {what}: accuracy left over the peer's <= 0", mine - other, 0.0)
                       for other in others]  # fmt: skip
            if "ART" in left:
                claims.append(Claim(f"{net.name}, UniversalDeepFool: accuracy left over the peer's <= 0",
                                    left["UniversalDeepFool"] - left["ART"], 0.0))  # fmt: skip
    config = {"n": N, "turns": TURNS, "shifts": SHIFTS, "rotate": ROTATE, "shift": SHIFT, "fit": FIT, "eps": EPS,
              "rounds": ROUNDS, "seed": SEED}  # fmt: skip
    return Outcome(table, claims, config, {}, notes)


def _left(
    case: str, contestants: Mapping[str, Callable[[], float]], table: list[Cells], notes: list[str]
) -> dict[str, float]:
    """The accuracy that each leaves; who is absent is noted."""
    left: dict[str, list[float]] = {}
    for who, run in contestants.items():
        found: list[float] = []
        try:
            seconds = cpu_seconds(partial(_kept, run, found))
        except Absent as why:
            notes.append(f"{who}: {why}")
            continue
        left[who] = found
        table.append({"case": case, "who": who, "accuracy left": found[0], "CPU s": seconds})
    return {who: found[0] for who, found in left.items()}


def _kept(run: Callable[[], float], found: list[float]) -> None:
    found.append(run())


def _spatial(net: nn.Module, x: Tensor, y: Tensor, attack: GridSearch | TransformPGD) -> float:
    threat = ThreatModel(Spatial(ROTATE, SHIFT))
    return ours.robust_accuracy(measure(Classifier(net), [ours.batch(x, y)], [attack], threat, seed=SEED))


def _foolbox(net: nn.Module, x: Tensor, y: Tensor) -> float:
    foolbox = peer("foolbox")
    attack = foolbox.attacks.SpatialAttack(
        max_translation=SHIFT, max_rotation=ROTATE, num_translations=SHIFTS, num_rotations=TURNS
    )
    model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    _, _, success = attack(model, x, y)
    return float((~success).double().mean())


def _universal(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    x_fit: Tensor,
    y_fit: Tensor,
    attack: Universal | UniversalDeepFool,
) -> float:
    threat = ThreatModel(Linf(EPS))
    evidence = measure(
        Classifier(net), [ours.batch(x, y)], [attack], threat, seed=SEED, fit=ours.batch(x_fit, y_fit)
    )
    return ours.robust_accuracy(evidence)


def _art(net: nn.Module, x: Tensor, y: Tensor, x_fit: Tensor, y_fit: Tensor) -> float:
    """ART's with DeepFool, its default, in a few rounds."""
    peer("art")
    from art.attacks.evasion import UniversalPerturbation
    from art.estimators.classification import PyTorchClassifier

    torch.manual_seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002  ART draws its order from it
    classifier = PyTorchClassifier(
        net, nn.CrossEntropyLoss(), x.shape[1:], 10, clip_values=(0.0, 1.0), device_type="cpu"
    )
    attack = UniversalPerturbation(
        classifier,
        attacker="deepfool",
        attacker_params={"verbose": False},
        eps=EPS,
        norm=np.inf,
        max_iter=ROUNDS,
        batch_size=100,
        verbose=False,
    )
    attack.generate(x_fit.numpy(), y_fit.numpy())
    with torch.no_grad():
        attacked = net((x + torch.from_numpy(attack.noise).float()).clamp(0, 1)).argmax(1)
        return ((attacked == y) & (net(x).argmax(1) == y)).double().mean().item()
