"""PGD-40 on convolutional networks of three sizes: CPU time over the naive floor."""

from collections.abc import Callable
from functools import partial

import torch

from benchmarks import ours
from benchmarks.alone import timed_alone
from benchmarks.meter import naive_floor
from benchmarks.networks import present
from benchmarks.record import Cells, Claim, Outcome
from benchmarks.side_by_side import FLOOR, ratio
from holdfast.attacks import PGD
from holdfast.attacks.parts.fast_networks import multiply_adds

WHAT = (
    "PGD-40 on convolutional networks of three sizes, one thread of two cores: CPU time over the naive floor"
)
STEPS, ROUNDS = 40, 3
SETTINGS = (
    ("mnist_cnn_a_adv", 0.3, 200),
    ("mnist_trades_smallcnn", 0.3, 60),
    ("cifar_resnet20", 2 / 255, 30),
)
"""network, eps and number of images"""


def measured() -> Outcome:
    table: list[Cells] = []
    claims, detail, notes = [], {}, []
    for net, x, y, eps, n in present(SETTINGS, max(n for *_, n in SETTINGS), notes):
        contestants = {
            FLOOR: partial(_floor, net.name, n),
            "holdfast": partial(_ours, net.name, n, eps, drop=True),
            "holdfast, all kept": partial(_ours, net.name, n, eps, drop=False),
        }
        seconds = timed_alone(contestants, ROUNDS)
        found = ours.assessed(net.module, x[:n], y[:n], [PGD(steps=STEPS)], "Linf", eps)
        table += [
            {
                "network": net.name,
                "n": n,
                "multiplications, millions": multiply_adds(net.module, x[:1]) / 1e6,
                "robust": ours.robust_accuracy(found),
                "who": who,
                "cost / floor": ratio(seconds, who),
            }
            for who in seconds
        ]
        claims.append(Claim(f"{net.name}: ours / floor <= 0.50", ratio(seconds, "holdfast"), 0.5))
        detail[net.name] = seconds
    return Outcome(
        table, claims, {"steps": STEPS, "rounds": ROUNDS, "network, eps, n": SETTINGS}, detail, notes
    )


def _floor(name: str, n: int) -> Callable[[], object]:
    ((net, x, y),) = present([(name,)], n, [])
    return _warmed(partial(naive_floor, net.module, x, y, STEPS))


def _ours(name: str, n: int, eps: float, *, drop: bool) -> Callable[[], object]:
    ((net, x, y),) = present([(name,)], n, [])
    return _warmed(partial(ours.assessed, net.module, x, y, [PGD(steps=STEPS, drop=drop)], "Linf", eps))


def _warmed(work: Callable[[], object]) -> Callable[[], object]:
    torch.set_num_threads(1)
    work()
    return work
