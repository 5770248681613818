"""PGD whose passes run in bfloat16, judged in single precision: CPU time, and examples that it no longer breaks."""

from collections.abc import Mapping
from statistics import median

import torch
from torch import Tensor, nn

from benchmarks import ours
from benchmarks.large_networks import BUILDERS, large
from benchmarks.meter import cpu_seconds
from benchmarks.networks import present
from benchmarks.record import Cells, Claim, Outcome
from holdfast.attacks import PGD
from holdfast.core.constraints import Linf
from holdfast.core.draws import Draws
from holdfast.core.gradients import instead
from holdfast.core.model import Classifier, Model
from holdfast.core.threat import ThreatModel
from holdfast.runs.harness.target import prepared

WHAT = "PGD with passes in bfloat16, judged in single precision, n = 500, one thread: CPU time, and examples lost"
STEPS, N, ROUNDS = 40, 500, 2
SETTINGS = (("mnist-cnn", 0.06), ("mnist_cnn_a_adv", 0.3), ("cifar_cnn_a_adv", 2 / 255))
LARGE_N, LARGE_STEPS, LARGE_EPS = 8, 3, 0.5 / 255
SINGLE, HALF, CHECKED = "single", "bfloat16", "gradient in bfloat16, margin in single"


class _Half(nn.Module):
    """The passes of a network in bfloat16; with `checked`, its outputs are those of single precision."""

    def __init__(self, inner: nn.Module, *, checked: bool) -> None:
        super().__init__()
        self.inner, self.checked = inner, checked

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half: Tensor = self.inner(x).float()
        if not self.checked:
            return half
        with torch.no_grad():
            single: Tensor = self.inner(x)
        return instead(single, half) if half.requires_grad else single


def measured() -> Outcome:
    table: list[Cells] = []
    notes: list[str] = []
    more_lost = 0
    for net, x, y, eps in present(SETTINGS, N, notes):
        rows, lost = _small(net.name, net.module, x, y, eps)
        table += rows
        more_lost += lost
    for name in BUILDERS:
        net_224, x, y = large(name, LARGE_N)
        seconds, _ = _attacked(net_224, x, y, LARGE_EPS, PGD(steps=LARGE_STEPS, drop=False), seeds=(0,))
        table += [{"network": name, "n": LARGE_N, **cells} for cells in _shares(seconds)]
    claim = Claim(
        "networks on which bfloat16 loses more examples than another seed >= 1", more_lost, 1, least=True
    )
    config: Cells = {"steps": STEPS, "n": N, "rounds": ROUNDS, "settings": SETTINGS}
    return Outcome(table, [claim], config, {}, notes)


def _small(name: str, net: nn.Module, x: Tensor, y: Tensor, eps: float) -> tuple[list[Cells], bool]:
    """Lines of the table, and whether bfloat16 loses more examples than another seed."""
    seconds, broken = _attacked(net, x, y, eps, PGD(steps=STEPS), seeds=(0, 1))
    first, second = broken[SINGLE]
    lost = {who: int((first & ~masks[0]).sum()) for who, masks in broken.items()}
    between = int((first & ~second).sum())
    rows = [
        {
            "network": name,
            "n": N,
            **cells,
            "wrong after the attack": int(broken[cells["passes"]][0].sum()),
            "lost": lost[cells["passes"]],
            "lost by another seed": between,
        }
        for cells in _shares(seconds)
    ]
    return rows, lost[HALF] > between


def _shares(seconds: Mapping[str, list[float]]) -> list[Cells]:
    return [
        {"passes": who, "CPU / single": median(a / b for a, b in zip(spent, seconds[SINGLE], strict=True))}
        for who, spent in seconds.items()
    ]


def _attacked(
    net: nn.Module, x: Tensor, y: Tensor, eps: float, attack: PGD, seeds: tuple[int, ...]
) -> tuple[dict[str, list[float]], dict[str, list[Tensor]]]:
    """CPU seconds of each round, and the mask of the broken examples of each seed, by the precision of the passes."""
    batch, threat = ours.batch(x, y), ThreatModel(Linf(eps))
    with prepared(Classifier(net), batch.first(8)) as target:
        assert isinstance(target.optimised, Classifier)
        models: dict[str, Model] = {
            SINGLE: target.optimised,
            HALF: Classifier(_Half(target.optimised, checked=False)),
            CHECKED: Classifier(_Half(target.optimised, checked=True)),
        }

        def results(model: Model, seed: int) -> Tensor:
            return torch.cat([attack(model, piece, threat, rng=Draws(seed)) for piece in batch.split(256)])

        broken = {
            who: [target.logits(results(model, seed)).argmax(1) != y for seed in seeds]
            for who, model in models.items()
        }
        seconds: dict[str, list[float]] = {who: [] for who in models}
        for k in range(ROUNDS):
            for who in models if k % 2 == 0 else reversed(models):
                seconds[who].append(cpu_seconds(lambda who=who: results(models[who], 0)))
    return seconds, broken
