"""Whole runs of `fast` beside those of `standard` on 60, 200 and 1,000 images, doubts included.

Three of the eight networks are in no other row: they are trained here, on the first 10,000 training images.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

from torch import Tensor, nn

import holdfast
from benchmarks import controls
from benchmarks.controls import Control, conv, noisy, pgd, trades
from benchmarks.networks import images, network
from benchmarks.parts import part
from benchmarks.record import Cells, Claim, Outcome
from holdfast.runs.assess.result import Result

WHAT = "whole runs of `fast` and `standard` on 60, 200 and 1,000 images of eight networks: CPU, doubts, examples missed"
SIZES = {60: 0.15, 200: 0.10, 1000: 0.06}
"""Numbers of images, and the largest median of the CPU time of `fast` over that of `standard`."""
MOST_DOUBTS = 0.25
FIRST = 1000
"""First test image: those before are the ones of other rows."""
NEW = (
    Control("mnist-pgd-0.2-gelu", partial(conv, act=nn.GELU), partial(pgd, eps=0.2), 0.2, epochs=4),
    Control(
        "fashion-trades-0.05-max-pool",
        partial(conv, pool=True),
        partial(trades, eps=0.05),
        0.05,
        data="fashion_mnist",
        epochs=3,
    ),
    Control("cifar-noise", controls.RGB, partial(noisy, sigma=0.1), 1 / 255, data="cifar10", epochs=4),
)


@dataclass(frozen=True)
class TestedNetwork:
    """A network, its data and the Linf radius."""

    name: str
    eps: float
    data: str
    opened: Callable[[], nn.Module]


def _known(name: str, data: str, eps: float) -> TestedNetwork:
    return TestedNetwork(name, eps, data, lambda: network(name).module)


SUBJECTS = (
    _known("mnist-cnn", "mnist", 0.1),
    _known("mnist-cnn-hardened", "mnist", 0.2),
    _known("mnist_cnn_a_adv", "mnist", 0.3),
    _known("mnist_kw01", "mnist", 0.1),
    _known("cifar_cnn_a_adv", "cifar10", 2 / 255),
    *(TestedNetwork(c.name, c.eps, c.data, partial(controls.trained, c)) for c in NEW),
)


def measured() -> Outcome:
    table: list[Cells] = []
    claims: list[Claim] = []
    for n, most in SIZES.items():
        rows = [
            part("fast-small", f"{s.name} n={n}", partial(_row, s, n, k))["measured"]
            for k, s in enumerate(SUBJECTS)
        ]
        ratio, doubts = (
            median(row[column] for row in rows) for column in ("CPU / `standard`", "share of doubts")
        )
        missed, more = (sum(row[column] for row in rows) for column in ("missed", "further"))
        table += rows
        claims += [
            Claim(f"n={n}: median CPU of fast / standard <= {most}", ratio, most),
            Claim(f"n={n}: median share of doubts in fast <= {MOST_DOUBTS}", doubts, MOST_DOUBTS),
            Claim(
                f"n={n}: examples missed by fast and broken by standard - the reverse <= 0", missed - more, 0
            ),
            Claim(f"n={n}: raised doubts <= 0", sum(row["raised"] != "" for row in rows), 0),
        ]
    return Outcome(table, claims, {"first image": FIRST, "seed": 0, "sizes": list(SIZES)}, {}, [])


def _row(subject: TestedNetwork, n: int, place: int) -> Cells:
    """Both suites on one network; which is first alternates."""
    net, (x, y) = subject.opened().eval(), images(subject.data, n, "test", FIRST)
    suites = ("fast", "standard")[:: -1 if place % 2 else 1]
    runs = {suite: _assessed(net, x, y, subject.eps, suite) for suite in suites}
    fast, standard = runs["fast"].evidence, runs["standard"].evidence
    robust = {suite: run.evidence["correct"] & ~run.evidence["success"] for suite, run in runs.items()}
    return {
        "network": subject.name,
        "n": n,
        "robust accuracy, %": 100 * robust["fast"].double().mean().item(),
        "of `standard`, %": 100 * robust["standard"].double().mean().item(),
        "missed": int((robust["fast"] & ~robust["standard"]).sum()),
        "further": int((~robust["fast"] & robust["standard"]).sum()),
        "CPU / `standard`": fast.cost.cpu_s / standard.cost.cpu_s,
        "attacks alone": sum(a.cost.cpu_s for a in fast.attacks)
        / sum(a.cost.cpu_s for a in standard.attacks),
        "share of doubts": fast.doubts_cost.cpu_s / fast.cost.cpu_s,
        "raised": ", ".join(doubt.name for doubt in fast.doubts if doubt.state == "raised"),
    }


def _assessed(net: nn.Module, x: Tensor, y: Tensor, eps: float, suite: str) -> Result:
    return holdfast.assess(net, (x, y), holdfast.Linf(eps), suite, bounds=(0, 1))
