"""`fast` and `quick` against `standard` on images that had no part in choosing them.

Nor had the networks, but for `hardened-by-hand` under L2: its training images did (docs/decisions/0007-fast.md).
Every seed of one suite is held against every seed of the other, example by example on the same images. CPU times are of
the attacks alone, both suites in turn in one process. `fast_choice` is the same on the networks that chose.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import permutations, product
from statistics import mean, median

from torch import Tensor, nn, tensor

from benchmarks import ours
from benchmarks.absent import Absent
from benchmarks.networks import images, network
from benchmarks.parts import part
from benchmarks.record import Cells, Claim, Outcome

WHAT = "`fast` and `quick` against `standard`: robust accuracy, examples missed, CPU time"


@dataclass(frozen=True)
class Setting:
    """A network, a constraint, and the share of the CPU time of `standard` that `fast` may take."""

    network: str
    norm: str
    eps: float
    n: int
    most: float
    seeds: tuple[int, ...] = (0, 1, 2)
    quick: bool = False


Opening = Callable[[Setting], tuple[nn.Module, Tensor, Tensor]]
"""The network of a setting with its images and their labels; `Absent` where one is not there."""

MNIST, CIFAR = 0.2, 0.05
SETTINGS = (
    Setting("single_step", "Linf", 0.3, 1000, MNIST, quick=True),
    Setting("hardened-by-hand", "Linf", 0.2, 1000, MNIST, quick=True),
    Setting("single_step", "L2", 1.5, 1000, MNIST),
    Setting("hardened-by-hand", "L2", 1.5, 1000, MNIST),
    Setting("mnist_cnn_a_adv", "Linf", 0.3, 1000, MNIST, quick=True),
    Setting("mnist_cnn_a_adv", "L2", 2.0, 1000, MNIST),
    Setting("cifar_cnn_a_adv", "Linf", 2 / 255, 1000, CIFAR, quick=True),
    Setting("cifar_cnn_a_adv", "L2", 0.25, 1000, CIFAR),
    Setting("cifar_resnet20", "Linf", 0.25 / 255, 200, CIFAR, seeds=(0,)),
    Setting("mnist_trades_smallcnn", "Linf", 0.3, 1000, MNIST, quick=True),
)


def measured() -> Outcome:
    return compared("fast", SETTINGS, _opened)


def _opened(setting: Setting) -> tuple[nn.Module, Tensor, Tensor]:
    net = network(setting.network)
    return net.module, *images(net.data, setting.n)


def compared(row: str, settings: Sequence[Setting], opened: Opening) -> Outcome:
    """All settings whose network and images, as `opened` gives them, are there."""
    table: list[Cells] = []
    claims: list[Claim] = []
    detail, notes = {}, []
    for setting in settings:
        name = f"{setting.network} {setting.norm} {setting.eps:.4g} n={setting.n}"
        try:
            module, x, y = opened(setting)
        except Absent as why:
            notes.append(f"{name}: {why}")
            continue
        seeds = {
            f"{name} seed {seed}": part(
                row, f"{name} seed {seed}", partial(_measured, setting, seed, module, x, y)
            )
            for seed in setting.seeds
        }
        runs = _runs([found["measured"] for found in seeds.values()])
        table += [_cells(name, suite, runs) for suite in runs]
        claims += _claims(name, setting, runs)
        detail |= seeds
    return Outcome(table, claims, {"settings": [vars(s) for s in settings], "batch": 256}, detail, notes)


Runs = dict[str, list[tuple[Tensor, float]]]
"""By suite and seed: which examples stand, and the CPU seconds of the attacks."""


def _measured(setting: Setting, seed: int, module: nn.Module, x: Tensor, y: Tensor) -> Cells:
    """By suite: a letter for each example, `.` where it stands, and the CPU seconds of the attacks."""
    suites = ["standard", "fast", *(["quick"] if setting.quick else [])]
    measured = {}
    for suite in suites if seed % 2 == 0 else reversed(suites):
        found = ours.by_suite(module, x, y, suite, setting.norm, setting.eps, seed=seed)
        stands = (found["correct"] & ~found["success"]).tolist()
        measured[suite] = ["".join(".x"[not s] for s in stands), sum(a.cost.cpu_s for a in found.attacks)]
    return {suite: measured[suite] for suite in suites}


def _runs(seeds: Sequence[Cells]) -> Runs:
    return {
        suite: [(tensor([letter == "." for letter in of[suite][0]]), of[suite][1]) for of in seeds]
        for suite in seeds[0]
    }


def _accuracy(runs: Runs, suite: str) -> float:
    """Robust accuracy in points, the mean over the seeds."""
    return mean(100 * stands.double().mean().item() for stands, _ in runs[suite])


def _ratio(runs: Runs, suite: str) -> float:
    """Median over the seeds of its CPU time over that of `standard`."""
    return median(a / b for (_, a), (_, b) in zip(runs[suite], runs["standard"], strict=True))


def _missed(runs: Runs, suite: str) -> float:
    """Points of examples that one run of `standard` broke and one of the suite did not, over all pairs."""
    pairs = product(runs["standard"], runs[suite]) if suite != "standard" else permutations(runs[suite], 2)
    rates = [100 * (~reference & other).double().mean().item() for (reference, _), (other, _) in pairs]
    return mean(rates) if rates else 0.0


def _cells(name: str, suite: str, runs: Runs) -> Cells:
    return {
        "setting": name,
        "suite": suite,
        "seeds": len(runs[suite]),
        "robust accuracy, %": _accuracy(runs, suite),
        "broken by `standard` and not here, points": _missed(runs, suite),
        "CPU / `standard`": _ratio(runs, suite),
    }


def _claims(name: str, setting: Setting, runs: Runs) -> list[Claim]:
    known = _accuracy(runs, "standard")
    missed = _missed(runs, "fast") - _missed(runs, "standard")
    claims = [
        Claim(f"{name}: fast - standard, points <= 0.1", _accuracy(runs, "fast") - known, 0.1),
        Claim(f"{name}: CPU of fast / standard <= {setting.most}", _ratio(runs, "fast"), setting.most),
    ]
    if len(setting.seeds) > 1:  # one seed shows no rate of its own
        claims.append(Claim(f"{name}: missed by fast beyond standard's own rate, points <= 0.1", missed, 0.1))
    if setting.quick:
        claims += [
            Claim(f"{name}: quick - standard, points <= 4", _accuracy(runs, "quick") - known, 4.0),
            Claim(f"{name}: CPU of quick / standard <= 0.03", _ratio(runs, "quick"), 0.03),
        ]
    return claims
