"""The doubts that do not depend on the suite: none on honest networks, weakly trained ones included; right where due.

`loss-spread` on networks of short and weak trainings, and `chance`, `constant` and `input` on networks and data that do
not fit each other. All are measured under `quick`, because probes do not depend on the suite.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

import holdfast
from benchmarks import controls
from benchmarks.networks import images, present
from benchmarks.record import Cells, Claim, Outcome
from benchmarks.rows.doubts import OTHERS

WHAT = "doubts on weakly trained networks, and on networks and data that do not fit each other, under `quick`"
N = 500
"""Images of each network; the probes look at 128 of them."""
FEW = 64
"""Images of the two networks whose passes cost over ten times that of the others."""
WATCHED = ("loss-spread", "chance", "constant", "input")
"""The doubts that this row is about."""
FITTING = ("chance", "constant", "input")
"""Those that say that the number means nothing."""


def measured() -> Outcome:
    notes: list[str] = []
    honest = [_row(name, "honest", net, x, y, eps) for name, net, x, y, eps in _honest(notes)]
    masked = [_row(name, "saturated", net, x, y, eps) for name, net, x, y, eps in _saturated()]
    unfit = [_row(name, "unfit", net, x, y, eps) for name, net, x, y, eps in _unfit()]
    claims = [
        *(
            Claim(f"honest networks that raise `{name}` <= 0", sum(bool(row[name]) for row in honest), 0)
            for name in WATCHED
        ),
        Claim("saturated networks without `loss-spread` <= 0", sum(not r["loss-spread"] for r in masked), 0),
        Claim(
            "networks or data that do not fit without `chance`, `constant` or `input` <= 0",
            sum(not any(row[name] for name in FITTING) for row in unfit),
            0,
        ),
    ]
    config: Cells = {"suite": "quick", "n": N, "n of large networks": FEW, "seed": 0}
    return Outcome(honest + masked + unfit, claims, config, notes=notes)


def _honest(notes: list[str]) -> Iterator[tuple[str, nn.Module, Tensor, Tensor, float]]:
    for control in (*controls.HONEST, *controls.WEAK):
        yield control.name, controls.trained(control), *images(control.data, N), control.eps
    others = [(name, eps, N if n > 100 else FEW) for name, eps, n in OTHERS]
    for net, x, y, eps, n in present(others, N, notes):
        yield net.name, net.module, x[:n], y[:n], eps


def _saturated() -> Iterator[tuple[str, nn.Module, Tensor, Tensor, float]]:
    for name, factor in (("mnist-standard", 30), ("fashion-standard", 100), ("cifar-standard", 1000)):
        control = next(each for each in controls.HONEST if each.name == name)
        net = controls.Saturated(controls.trained(control), factor)
        yield f"{name}, logits times {factor}", net, *images(control.data, N), control.eps
    yield "distilled at T = 100", controls.trained(controls.DISTILLED), *images("mnist", N), 0.1


class Shifted(nn.Module):
    """A network that wants normalised input, without its normalisation: it sees x where it was trained on this map."""

    def __init__(self, inner: nn.Module, factor: float, shift: float) -> None:
        super().__init__()
        self.inner, self.factor, self.shift = inner, factor, shift

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x * self.factor + self.shift)
        return out


class Dead(nn.Module):
    """A network whose first activations are all off."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(torch.zeros_like(x))
        return out


def _unfit() -> Iterator[tuple[str, nn.Module, Tensor, Tensor, float]]:
    by_name = {control.name: control for control in controls.HONEST}
    cifar, mnist = (controls.trained(by_name[f"{data}-standard"]) for data in ("cifar", "mnist"))
    (x, y), (digits, labels) = images("cifar10", N), images("mnist", N)
    # trained on [0, 1]; as if trained on (x - mean) / std and given pixels
    yield "normalisation forgotten, CIFAR-10", Shifted(cifar, 0.25, 0.47), x, y, 2 / 255
    yield "normalisation forgotten, MNIST", Shifted(mnist, 0.3081, 0.1307), digits, labels, 0.1
    yield "every output the same", Dead(mnist), digits, labels, 0.1
    yield "labels of another order", mnist, digits, (labels * 3 + 1) % 10, 0.1
    yield "17 grey levels divided by 255", mnist, (digits * 16).round() / 255, labels, 0.1
    yield (
        "rows and columns exchanged",
        controls.trained(by_name["mnist-mlp"]),
        digits.mT.contiguous(),
        labels,
        0.05,
    )


def _row(name: str, kind: str, net: nn.Module, x: Tensor, y: Tensor, eps: float) -> Cells:
    """What each watched doubt says where it is raised; its statistic for `loss-spread` in any case."""
    result = holdfast.assess(net, (x, y), threat=f"linf:{eps!r}", suite="quick")
    doubts = {doubt.name: doubt for doubt in result.doubts}
    raised = {each: doubts[each].message if doubts[each].state == "raised" else "" for each in WATCHED}
    return {
        "network": name,
        "kind": kind,
        "eps": eps,
        "n": len(y),
        "clean": result.metrics["clean_accuracy"].value,
        "robust": result.metrics["robust_accuracy"].value,
        "spread of the losses": doubts["loss-spread"].statistic,
        **raised,
    }
