"""Turns and shifts beside Foolbox's at the same grid, and one change for all images beside ART's on the same data."""

from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import ours
from benchmarks.absent import Absent
from benchmarks.meter import cpu_seconds
from benchmarks.networks import images, network
from benchmarks.peers import peer
from benchmarks.record import Cells, Claim, Outcome
from holdfast.attacks import GridSearch, TransformPGD, Universal
from holdfast.core.constraints import Linf
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.transformations import Spatial
from holdfast.harness import measure

WHAT = "turns and shifts, and universal changes: accuracy left, beside Foolbox's and ART's"
NETS = (("mnist-cnn", "mnist"), ("cifar_resnet20", "cifar10"))
N, TURNS, SHIFTS, ROTATE, SHIFT, SEED = 200, 15, 5, 30.0, 3.0, 0
FIT, EPS = 500, {"mnist-cnn": 0.15, "cifar_resnet20": 8 / 255}


def measured() -> Outcome:
    table: list[Cells] = []
    claims: list[Claim] = []
    notes: list[str] = []
    for name, data in NETS:
        try:
            net, (x, y) = network(name).module, images(data, N)
            train = images(data, FIT, split="train")
        except Absent as why:
            notes.append(f"{name}: {why}")
            continue
        sides = {
            "turns and shifts": {
                "GridSearch": partial(_grid, net, x, y),
                "Foolbox": partial(_foolbox, net, x, y),
                "TransformPGD": partial(_climb, net, x, y),
            },
            "universal": {
                "Universal": partial(_universal, net, x, y, *train, EPS[name]),
                "ART": partial(_art, net, x, y, *train, EPS[name]),
            },
        }
        for what, contestants in sides.items():
            left = {}
            for who, run in contestants.items():
                found: list[float] = []
                try:
                    seconds = cpu_seconds(lambda run=run, found=found: found.append(run()))  # type: ignore[misc]
                except Absent as why:
                    notes.append(f"{who}: {why}")
                    continue
                left[who] = found[0]
                table.append(
                    {"network": name, "what": what, "who": who, "accuracy left": found[0], "CPU s": seconds}
                )
            claims += [
                Claim(
                    f"{name}, {what}: accuracy left over {who}'s <= 0",
                    left[next(iter(contestants))] - left[who],
                    0.0,
                )
                for who in ("Foolbox", "ART")
                if who in left
            ]
    config = {
        "n": N,
        "turns": TURNS,
        "shifts": SHIFTS,
        "rotate": ROTATE,
        "shift": SHIFT,
        "fit": FIT,
        "eps": EPS,
    }
    return Outcome(table, claims, config, {}, notes)


def _grid(net: nn.Module, x: Tensor, y: Tensor) -> float:
    return _spatial(net, x, y, GridSearch(turns=TURNS, values=SHIFTS))


def _climb(net: nn.Module, x: Tensor, y: Tensor) -> float:
    return _spatial(net, x, y, TransformPGD())


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


def _universal(net: nn.Module, x: Tensor, y: Tensor, x_fit: Tensor, y_fit: Tensor, eps: float) -> float:
    threat = ThreatModel(Linf(eps))
    evidence = measure(
        Classifier(net), [ours.batch(x, y)], [Universal()], threat, seed=SEED, fit=ours.batch(x_fit, y_fit)
    )
    return ours.robust_accuracy(evidence)


def _art(net: nn.Module, x: Tensor, y: Tensor, x_fit: Tensor, y_fit: Tensor, eps: float) -> float:
    """ART's with its own defaults, DeepFool in up to 20 rounds, until it breaks 80 %."""
    peer("art")
    from art.attacks.evasion import UniversalPerturbation
    from art.estimators.classification import PyTorchClassifier

    torch.manual_seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002  ART draws its order from it
    classifier = PyTorchClassifier(
        net, nn.CrossEntropyLoss(), x.shape[1:], 10, clip_values=(0.0, 1.0), device_type="cpu"
    )
    attack = UniversalPerturbation(
        classifier, attacker="deepfool", eps=eps, norm=np.inf, batch_size=100, verbose=False
    )
    attack.generate(x_fit.numpy(), y_fit.numpy())
    with torch.no_grad():
        attacked = net((x + torch.from_numpy(attack.noise).float()).clamp(0, 1)).argmax(1)
        return ((attacked == y) & (net(x).argmax(1) == y)).double().mean().item()
