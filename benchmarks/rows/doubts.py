"""The doubts: raised on masked networks, on no honest one; and what they cost."""

from collections.abc import Iterator

import torch
from torch import nn

import holdfast
from benchmarks import controls, ours
from benchmarks.absent import Absent
from benchmarks.meter import Counted, cpu_seconds
from benchmarks.networks import images, network
from benchmarks.record import Cells, Claim, Outcome
from holdfast.core.draws import Draws
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.doubts.probing import Probe, probes_for
from holdfast.doubts.thresholds import BACKWARDS, FORWARDS, SAMPLE

WHAT = "doubts with the suite `quick`: flags on honest networks, on masked ones, and the cost of the probes"
N = 200
OTHERS = (
    ("mnist_cnn_a_adv", 0.3),
    ("mnist_kw01", 0.1),
    ("mnist_badnet", 0.1),
    ("cifar_cnn_a_adv", 2 / 255),
    ("mnist-cnn", 0.1),
    ("mnist-cnn-hardened", 0.2),
)
APART = ("search", "again")
"""Probes with a budget of their own: `black-box`, and the fresh pass of `not-exhausted`."""


def measured() -> Outcome:
    table: list[Cells] = []
    notes: list[str] = []
    honest = [
        (control.name, control.data, controls.trained(control), control.eps) for control in controls.HONEST
    ]
    for name, eps in OTHERS:
        try:
            net = network(name)
            honest.append((name, net.data, net.module, eps))
        except Absent as why:
            notes.append(f"{name}: {why}")
    flagged, reasons = 0, {}
    for name, data, net, eps in honest:
        cells, says = _flags(net, data, eps)
        flagged += bool(cells["raised"])
        reasons |= {name: says} if says else {}
        table.append({"network": name, "kind": "honest", "eps": eps, **cells})
    missed = 0
    for name, net, eps in _masked():
        cells, says = _flags(net, "mnist", eps)
        reasons[name] = says
        missed += not cells["raised"]
        table.append({"network": name, "kind": "masked", "eps": eps, **cells})
    cost, forwards, backwards = _cost(controls.trained(controls.HONEST[0]), 0.1)
    claims = [
        Claim("honest networks >= 20", len(honest), 20, least=True),
        Claim("honest networks with a raised doubt <= 0", flagged, 0),
        Claim("masked networks without a raised doubt <= 0", missed, 0),
        Claim(f"forwards of a sampled example <= {FORWARDS}", forwards, FORWARDS),
        Claim(f"backwards of a sampled example <= {BACKWARDS}", backwards, BACKWARDS),
    ]
    config: Cells = {"suite": "quick", "n": N, "seed": 0, "sample": SAMPLE}
    return Outcome(table, claims, config, {"cost by probe": cost, "what was said": reasons}, notes)


def _flags(net: nn.Module, data: str, eps: float) -> tuple[Cells, list[str]]:
    x, y = images(data, N)
    result = holdfast.assess(net, (x, y), threat=f"linf:{eps!r}", suite="quick")
    raised = [f"{d.name} ({d.statistic:.3g})" if d.statistic is not None else d.name for d in result.doubts
              if d.state == "raised"]  # fmt: skip
    share = result.evidence.doubts_cost.forwards / max(result.cost.forwards, 1)
    cells = {
        "clean": result.metrics["clean_accuracy"].value,
        "robust": result.metrics["robust_accuracy"].value,
        "raised": ", ".join(raised),
        "share of forwards": share,
    }
    return cells, [f"{d.name}: {d.says}" for d in result.doubts if d.state == "raised"]


def _masked() -> Iterator[tuple[str, nn.Module, float]]:
    standard = controls.trained(controls.HONEST[0])
    yield "zero gradient: inputs rounded to 8 levels", controls.Quantised(standard), 0.1
    yield "saturated: logits times 1,000", controls.Saturated(standard), 0.1
    yield "randomised: noise of 0.2 at every call", controls.Randomised(standard), 0.1
    yield "distilled at T = 100", controls.trained(controls.DISTILLED), 0.1


def _cost(net: nn.Module, eps: float) -> tuple[dict[str, list[float]], float, float]:
    """Each probe on a full sample: forwards and backwards of an example, CPU seconds; the sums without those apart."""
    x, y = images("mnist", 2 * SAMPLE)
    with torch.no_grad():
        right = net(x).argmax(1) == y
    batch, threat = (
        ours.batch(x[right][:SAMPLE], y[right][:SAMPLE]),
        ThreatModel(ours.constraint("Linf", eps)),
    )
    spent: dict[str, list[float]] = {}

    def run(probe: Probe) -> None:
        counted = Counted(net)
        model = Classifier(counted)
        seconds = cpu_seconds(lambda: probe.run(model, batch, threat, Draws(0)))
        spent[probe.name] = [counted.forwards / len(batch), counted.backwards / len(batch), seconds]

    for probe in probes_for(threat):
        run(probe)
    shared = [values for name, values in spent.items() if name not in APART]
    return spent, sum(v[0] for v in shared), sum(v[1] for v in shared)
