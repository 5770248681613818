"""The doubts: raised on masked networks, on no honest one; and what they cost."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

import holdfast
from benchmarks import controls, ours
from benchmarks.meter import Counted, cpu_seconds
from benchmarks.networks import images, present
from benchmarks.record import Cells, Claim, Outcome
from holdfast.core.draws import Draws
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.doubts.probing import probes_for
from holdfast.doubts.protocol import BACKWARDS, FORWARDS, SAMPLE, Probe

WHAT = "doubts: flags on honest networks under three suites, on masked ones, and the cost of the probes"
N = SAMPLE
"""Images of each network: as many as the probes look at, with which the suites on all take about an hour."""
FEW = 12
"""Images of the two networks whose passes cost over ten times that of the others."""
OTHERS = (
    ("mnist_cnn_a_adv", 0.3, N),
    ("mnist_kw01", 0.1, N),
    ("mnist_badnet", 0.1, N),
    ("mnist_trades_smallcnn", 0.3, FEW),
    ("cifar_cnn_a_adv", 2 / 255, N),
    ("cifar_resnet20", 0.5 / 255, FEW),
    ("mnist-cnn", 0.1, N),
    ("mnist-cnn-hardened", 0.1, N),
    ("mnist-cnn-hardened", 0.2, N),
    ("mnist-cnn-hardened", 0.3, N),
    ("hardened-by-hand", 0.2, N),
)
"""Honest networks of other people, the bundled ones, and one that was bundled once: radius, and how many images."""
CLAIMED = ("standard", "fast")
"""The suites that must raise nothing on an honest network."""
BESIDE = "quick"
"""The suite whose flags are told beside them, and under which masked networks must show what they hide."""
APART = ("search", "settling-search", "again")
"""Probes with a budget of their own: two searches, and the fresh pass of `not-exhausted`."""
Examples = tuple[Tensor, Tensor]


def measured() -> Outcome:
    notes: list[str] = []
    honest, said = _honest_rows(notes)
    masked, hidden = _masked_rows()
    notes.append(f"under `{BESIDE}` {len(said[BESIDE])} of {len(honest)} honest networks raise a doubt")
    cost, forwards, backwards = _cost(controls.trained(controls.HONEST[0]), 0.1)
    claims = [
        Claim("honest networks >= 20", len(honest), 20, least=True),
        *(Claim(f"honest networks with a raised doubt under `{s}` <= 0", len(said[s]), 0) for s in CLAIMED),
        Claim(
            f"masked networks without a raised doubt under `{BESIDE}` <= 0",
            sum(not says for says in hidden.values()),
            0,
        ),
        Claim(f"forwards of a sampled example <= {FORWARDS}", forwards, FORWARDS),
        Claim(f"backwards of a sampled example <= {BACKWARDS}", backwards, BACKWARDS),
    ]
    config: Cells = {
        "suites": (*CLAIMED, BESIDE),
        "n": N,
        "n of large networks": FEW,
        "seed": 0,
        "sample": SAMPLE,
    }
    detail = {"cost by probe": cost, "said of honest networks": said, "said of masked networks": hidden}
    return Outcome(honest + masked, claims, config, detail, notes)


def _honest_rows(notes: list[str]) -> tuple[list[Cells], dict[str, dict[str, list[str]]]]:
    """A row of each honest network, and under each suite what is said of those that raise a doubt."""
    table: list[Cells] = []
    said: dict[str, dict[str, list[str]]] = {suite: {} for suite in (*CLAIMED, BESIDE)}
    for name, net, data, eps in _honest(notes):
        row: Cells = {"network": name, "kind": "honest", "eps": eps, "n": len(data[1])}
        for suite in said:
            cells, says = _flags(net, data, eps, suite)
            row |= cells
            said[suite] |= {f"{name}, eps {eps:.3g}": says} if says else {}
        table.append(row)
    return table, said


def _masked_rows() -> tuple[list[Cells], dict[str, list[str]]]:
    table, said, data = [], {}, images("mnist", N)
    for name, net, eps in _masked():
        cells, said[name] = _flags(net, data, eps, BESIDE)
        table.append({"network": name, "kind": "masked", "eps": eps, "n": N, **cells})
    return table, said


def _honest(notes: list[str]) -> Iterator[tuple[str, nn.Module, Examples, float]]:
    for control in controls.HONEST:
        yield control.name, controls.trained(control), images(control.data, N), control.eps
    for net, x, y, eps, n in present(OTHERS, N, notes):
        yield net.name, net.module, (x[:n], y[:n]), eps


def _flags(net: nn.Module, data: Examples, eps: float, suite: str) -> tuple[Cells, list[str]]:
    """Cells for the table, named after the suite, and what each raised doubt says."""
    result = holdfast.assess(net, data, threat=f"linf:{eps!r}", suite=suite)
    raised = [doubt for doubt in result.doubts if doubt.state == "raised"]
    cells = {
        "clean": result.metrics["clean_accuracy"].value,
        f"robust, {suite}": result.metrics["robust_accuracy"].value,
        f"raised, {suite}": ", ".join(
            d.name if d.statistic is None else f"{d.name} ({d.statistic:.3g})" for d in raised
        ),
        f"probes' share of forwards, {suite}": result.evidence.doubts_cost.forwards
        / max(result.cost.forwards, 1),
    }
    return cells, [f"{doubt.name}: {doubt.message}" for doubt in raised]


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
