"""Assessments of a network after 50 further updates of training: with the run before them as baseline, and afresh."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import holdfast
from benchmarks.absent import Absent
from benchmarks.networks import images, network
from benchmarks.record import Cells, Claim, Outcome
from benchmarks.side_by_side import timed
from holdfast.runs.assess.result import Result

WHAT = "`assess --baseline` after 50 further updates of training, beside a fresh run on the same images"
N, UPDATES, BATCH, STEPS, LR, MOST = 200, 50, 64, 5, 1e-3, 0.5
TRAINING = 2_000
"""number of images for the updates, which follow those that are attacked"""
SEEDS = (0, 1)
"""each seed is one pair of runs, and the difference of the two fresh runs is that of the verdicts of two seeds"""


@dataclass(frozen=True)
class Setting:
    """A network, the change that it is attacked and trained with, and further settings of the assessment."""

    network: str
    eps: float
    threat: str = ""
    """further parts of the threat, such as `,access=scores`"""
    doubts: bool = True

    def __str__(self) -> str:
        return f"{self.network}{self.threat}{'' if self.doubts else ', no doubts'}"


SETTINGS = (
    Setting("mnist_cnn_a_adv", 0.3),
    Setting("mnist_cnn_a_adv", 0.3, doubts=False),
    Setting("cifar_cnn_a_adv", 2 / 255),
    Setting("mnist-cnn", 0.1, ",access=scores", doubts=False),
)


def measured() -> Outcome:
    table: list[Cells] = []
    notes: list[str] = []
    for setting in SETTINGS:
        try:
            table.append(_compared(setting))
        except Absent as why:
            notes.append(f"{setting}: {why}")
    claims: list[Claim] = []
    for cells in table:
        name, seeds = cells["setting"], cells["robust, two seeds differ by"]
        claims += [
            Claim(f"{name}: CPU / that of a fresh run <= {MOST}", cells["CPU / fresh"], MOST),
            Claim(f"{name}: robust examples beyond those of the fresh run <= what two seeds differ by",
                  cells["robust"] - cells["robust, fresh"], max(seeds, 1)),
        ]  # fmt: skip
    config: Cells = {
        "n": N, "updates": UPDATES, "batch": BATCH, "training": f"PGD, {STEPS} steps, SGD {LR:g}", "seeds": SEEDS,
    }  # fmt: skip
    return Outcome(table, claims, config, notes=notes)


def _compared(setting: Setting) -> Cells:
    net = network(setting.network)
    x, y = images(net.data, N + TRAINING)
    results: dict[tuple[str, int], Result] = {}

    def run(model: nn.Module, seed: int, baseline: Result | None) -> Result:
        threat = f"linf:{setting.eps!r}{setting.threat}"
        return holdfast.assess(
            model, (x[:N], y[:N]), threat, seed=seed, doubts=setting.doubts, baseline=baseline,
            save_adversarial=baseline is None, device="cpu",
        )  # fmt: skip

    earlier = run(net.module, SEEDS[0], None)
    model = _updated(net.module, x[N:], y[N:], setting.eps)
    seconds: list[dict[str, list[float]]] = []
    for seed in SEEDS:

        def kept(kind: str, baseline: Result | None, seed: int = seed) -> None:
            results[kind, seed] = run(model, seed, baseline)

        contestants: dict[str, Callable[[], object]] = {
            "fresh": partial(kept, "fresh", None),
            "baseline": partial(kept, "baseline", earlier),
        }
        order = contestants if seed % 2 == 0 else dict(reversed(contestants.items()))
        seconds.append(timed(order, 1, warm=False)[0])
    reuse = results["baseline", SEEDS[0]].attacks[0].reuse
    assert reuse is not None
    fresh, based = ([_robust(results[kind, seed]) for seed in SEEDS] for kind in ("fresh", "baseline"))
    return {
        "setting": str(setting),
        "CPU / fresh": median(each["baseline"][0] / each["fresh"][0] for each in seconds),
        "fresh, CPU s": median(each["fresh"][0] for each in seconds),
        "suite / fresh": _suite_s(results["baseline", SEEDS[0]]) / _suite_s(results["fresh", SEEDS[0]]),
        "robust before": _robust(earlier),
        "robust, fresh": fresh[0],
        "robust": based[0],
        "robust, two seeds differ by": abs(fresh[0] - fresh[1]),
        "stored": reuse.tried,
        "broken by stored": reuse.transferred,
        "broken": reuse.broke,
        "queries": reuse.queries,
        "earlier queries": reuse.earlier_queries,
    }


def _robust(result: Result) -> int:
    return int((result.evidence["correct"] & ~result.evidence["success"]).sum())


def _suite_s(result: Result) -> float:
    """CPU seconds of all attacks of the suite, and of the baseline."""
    return sum(attack.cost.cpu_s for attack in result.attacks)


def _updated(module: nn.Module, x: Tensor, y: Tensor, eps: float) -> nn.Module:
    """The network after further updates of adversarial training."""
    net = copy.deepcopy(module).train()
    for p in net.parameters():
        p.requires_grad_(True)
    optimizer = torch.optim.SGD(net.parameters(), LR, momentum=0.9)
    rng = torch.Generator().manual_seed(0)
    for _ in range(UPDATES):
        rows = torch.randint(len(x), (BATCH,), generator=rng)
        clean, labels = x[rows], y[rows]
        change = eps * (2 * torch.rand(clean.shape, generator=rng) - 1)
        for _ in range(STEPS):
            at = (clean + change).clamp(0, 1).requires_grad_()
            (grad,) = torch.autograd.grad(F.cross_entropy(net(at), labels), at)
            change = (at.detach() + 2 * eps / STEPS * grad.sign() - clean).clamp(-eps, eps)
        optimizer.zero_grad()
        F.cross_entropy(net((clean + change).clamp(0, 1)), labels).backward()
        optimizer.step()
    return net.eval()
