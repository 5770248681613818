"""Images that survive PGD with 40 steps, over five seeds, beside those of every peer on the same images."""

from statistics import mean

import torch
from torch import Tensor, nn

from benchmarks import ours
from benchmarks.absent import Absent
from benchmarks.networks import present
from benchmarks.record import Cells, Claim, Outcome
from benchmarks.rows.peers_pgd import PEERS, apgd
from holdfast.attacks import APGD, PGD
from holdfast.attacks.parts.losses import cross_entropy

WHAT = "robust accuracy after PGD at 40 steps, five seeds, same images; APGD-CE beside it"
STEPS, N, SEEDS = 40, 200, (0, 1, 2, 3, 4)
SETTINGS = (
    ("single_step", 0.3),
    ("mnist_cnn_a_adv", 0.3),
    ("cifar_cnn_a_adv", 2 / 255),
    ("hardened-by-hand", 0.2),
)
REFERENCE = "AutoAttack APGD-CE"


def measured() -> Outcome:
    table: list[Cells] = []
    claims, detail, notes = [], {}, []
    for net, x, y, eps in present(SETTINGS, N, notes):
        left, absent = _left_by_all(net.module, x, y, eps)
        notes += absent
        for who, values in left.items():
            table.append(
                {"network": net.name, "who": who, "robust accuracy": mean(values), "seeds": _spread(values)}
            )
        others = [mean(values) for who, values in left.items() if who in PEERS]
        if others:
            over = 100 * (mean(left["holdfast PGD"]) - min(others))
            claims.append(Claim(f"{net.name}: our PGD over the best peer's, points <= 0.5", over, 0.5))
        if REFERENCE in left:
            over = 100 * (mean(left["holdfast APGD-CE"]) - mean(left[REFERENCE]))
            claims.append(Claim(f"{net.name}: our APGD-CE over the reference's, points <= 0", over, 0.0))
        detail[net.name] = left
    config: Cells = {
        "steps": STEPS,
        "step size": "2.5 eps / steps",
        "n": N,
        "seeds": SEEDS,
        "settings": SETTINGS,
    }
    return Outcome(table, claims, config, detail, notes)


def _left_by_all(
    module: nn.Module, x: Tensor, y: Tensor, eps: float
) -> tuple[dict[str, list[float]], list[str]]:
    mine = {
        "holdfast PGD": PGD(steps=STEPS),
        "holdfast PGD, cross-entropy": PGD(steps=STEPS, loss=cross_entropy),
        "holdfast APGD-CE": APGD(steps=STEPS, loss=cross_entropy),
    }
    left = {
        who: [ours.robust_accuracy(ours.assessed(module, x, y, [a], "Linf", eps, seed=s)) for s in SEEDS]
        for who, a in mine.items()
    }
    absent = []
    for who, run in {**PEERS, REFERENCE: apgd}.items():
        values = []
        try:
            for seed in SEEDS:
                torch.manual_seed(seed)
                x_adv = run(module, x.clone(), y, eps, STEPS, 2.5 * eps / STEPS)
                with torch.no_grad():
                    values.append((module(x_adv.float()).argmax(1) == y).double().mean().item())
        except Absent as why:
            absent.append(f"{who}: {why}")
            continue
        left[who] = values
    return left, absent


def _spread(values: list[float]) -> str:
    return f"{min(values):.3f} to {max(values):.3f}"
