"""PGD-40 under Linf: CPU time over the naive floor, beside every peer's."""

from functools import partial

import torch

from benchmarks import ours
from benchmarks.meter import naive_floor
from benchmarks.networks import present
from benchmarks.record import Cells, Claim, Outcome
from benchmarks.rows.peers_pgd import PEERS, apgd
from benchmarks.side_by_side import FLOOR, ratio, timed
from holdfast.attacks import PGD
from holdfast.attacks.parts.losses import cross_entropy

WHAT = "PGD-40 as a list of attacks (free doubts only): CPU time over the naive floor, n = 200, one thread"
STEPS, N, ROUNDS = 40, 200, 5
SETTINGS = (("mnist_cnn_a_adv", 0.3), ("cifar_cnn_a_adv", 2 / 255), ("hardened-by-hand", 0.2))


def measured() -> Outcome:
    table: list[Cells] = []
    claims, detail, notes = [], {}, []
    for net, x, y, eps in present(SETTINGS, N, notes):
        size = 2.5 * eps / STEPS
        contestants = {
            FLOOR: partial(naive_floor, net.module, x, y, STEPS),
            "holdfast": partial(ours.assessed, net.module, x, y, [PGD(steps=STEPS, drop=False)], "Linf", eps),
            "holdfast, cross-entropy": partial(
                ours.assessed,
                net.module,
                x,
                y,
                [PGD(steps=STEPS, loss=cross_entropy, drop=False)],
                "Linf",
                eps,
            ),
            **{who: partial(run, net.module, x, y, eps, STEPS, size) for who, run in PEERS.items()},
            "AutoAttack APGD-CE": partial(apgd, net.module, x, y, eps, STEPS, size),
        }
        torch.manual_seed(0)
        seconds, absent = timed(contestants, ROUNDS)
        notes += [f"{who}: {why}" for who, why in absent.items()]
        table += [{"network": net.name, "who": who, "cost / floor": ratio(seconds, who)} for who in seconds]
        claims.append(Claim(f"{net.name}: ours / floor <= 1.05", ratio(seconds, "holdfast"), 1.05))
        detail[net.name] = seconds
    config: Cells = {"steps": STEPS, "n": N, "rounds": ROUNDS, "settings": SETTINGS, "drop": False}
    return Outcome(table, claims, config, detail, notes)
