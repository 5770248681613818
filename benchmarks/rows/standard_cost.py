"""What `standard` costs: over the floor of its own passes, and over the reference's CPU time in the same run."""

from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

from benchmarks import ours
from benchmarks.absent import Absent
from benchmarks.meter import cpu_seconds, naive_floor
from benchmarks.networks import images, network
from benchmarks.peers import peer
from benchmarks.record import Cells, Claim, Outcome
from benchmarks.side_by_side import ratio, timed
from holdfast.attacks.suites import suite
from holdfast.core.evidence import Evidence

WHAT = "`standard`: CPU time over the floor of its own passes and over the reference AutoAttack's"
SETTINGS = (
    ("mnist_cnn_a_adv", "Linf", 0.3, 100, 2, 0.9),
    ("cifar_cnn_a_adv", "Linf", 2 / 255, 100, 2, 0.9),
    ("hardened-by-hand", "Linf", 0.2, 100, 2, 0.9),
    ("cifar_resnet20", "Linf", 0.25 / 255, 64, 1, 0.7),
)
"""Network, constraint, images, rounds (one where it takes most of half an hour), and the most over the reference."""


def measured() -> Outcome:
    table: list[Cells] = []
    claims: list[Claim] = []
    detail, notes = {}, []
    for name, norm, eps, n, rounds, bound in SETTINGS:
        try:
            peer("autoattack")
            seconds, found, floors = _one(name, norm, eps, n, rounds)
        except Absent as why:
            notes.append(f"{name}: {why}")
            continue
        mine = median(seconds["holdfast"])
        over_floor, over_reference = mine / sum(floors.values()), ratio(seconds, "holdfast", "AutoAttack")
        whole = {"network": name, "stage": "all", "n": n, "eps": eps, "ours / reference": over_reference}
        table.append({**whole, "ours / its floor": over_floor, "CPU s": mine})
        table += [
            {
                "network": name,
                "stage": attack.stage,
                "n": attack.surviving_before,
                "ours / its floor": attack.cost.cpu_s / floors[attack.stage],
                "CPU s": attack.cost.cpu_s,
            }
            for attack in found.attacks
        ]
        claims += [
            Claim(f"{name}: ours / floor of its passes <= 1.05", over_floor, 1.05),
            Claim(f"{name}: ours / reference <= {bound}", over_reference, bound),
        ]
        detail[name] = seconds
    return Outcome(
        table, claims, {"seed": 0, "network, norm, eps, n, rounds, bound": SETTINGS}, detail, notes
    )


def _one(
    name: str, norm: str, eps: float, n: int, rounds: int
) -> tuple[dict[str, list[float]], Evidence, dict[str, float]]:
    """CPU seconds of both, our evidence, and the floor of each of our stages."""
    net = network(name)
    x, y = images(net.data, n)
    attacks = [attack for _, attack in suite("standard", ours.constraint(norm, eps)).attacks]
    found: list[Evidence] = []
    contestants = {
        "holdfast": lambda: found.append(ours.assessed(net.module, x, y, attacks, norm, eps)),
        "AutoAttack": partial(_reference, net.module, x, y, norm, eps),
    }
    seconds, _ = timed(contestants, rounds, warm=False)
    return seconds, found[-1], _floors(net.module, x, y, found[-1])


def _reference(module: nn.Module, x: Tensor, y: Tensor, norm: str, eps: float) -> None:
    attack = peer("autoattack").AutoAttack(module, norm=norm, eps=eps, seed=0, device="cpu", verbose=False)
    attack.run_standard_evaluation(x, y, bs=250)


def _floors(module: nn.Module, x: Tensor, y: Tensor, evidence: Evidence) -> dict[str, float]:
    """CPU seconds that each attack's forwards and backwards cost naively, at the batch size the attack began with."""
    floors = {"clean": cpu_seconds(partial(naive_floor, module, x, y, 0, 1))}
    for attack in evidence.attacks:
        some = slice(0, max(attack.surviving_before, 1))
        both = _per_image(module, x[some], y[some], steps=10, forwards=0)
        alone = _per_image(module, x[some], y[some], steps=0, forwards=20)
        spent = attack.cost
        floors[attack.stage] = spent.backwards * both + (spent.forwards - spent.backwards) * alone
    return floors


def _per_image(module: nn.Module, x: Tensor, y: Tensor, steps: int, forwards: int) -> float:
    with torch.enable_grad():
        runs = [cpu_seconds(partial(naive_floor, module, x, y, steps, forwards)) for _ in range(5)]
    return median(runs) / (len(x) * (steps or forwards))
