"""Bounds of small networks that together use every operation with bounds: no input is below them, and they are tight in
small regions.
"""

import pytest
import torch
from torch import Tensor, nn

from benchmarks import bounds_page
from benchmarks.rows.certified_operations import NAMES, case
from holdfast import Batch, Classifier, Linf, ThreatModel
from holdfast.certifiers.bounds.crown import relaxed, substitute
from holdfast.certifiers.bounds.graph import region_of
from holdfast.certifiers.bounds.operators import TRANSLATIONS
from holdfast.certifiers.branching import AlphaCrown, BranchAndBound
from holdfast.certifiers.provers import IBP, Crown, CrownIBP, prepared_graph
from holdfast.core.model import Bounds

SAMPLES = 500


def sampled(x: Tensor, eps: float) -> Tensor:
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    share = torch.rand(SAMPLES, x.shape[1], generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    share[::2] = share[::2].round()
    return low + (high - low) * share


@pytest.mark.parametrize("seed", range(len(NAMES)), ids=[name for _, name in NAMES])
def test_bounds_of_a_layer_are_sound_and_approach_the_function_in_small_regions(seed: int) -> None:
    _, model, x, eps = case(seed)
    x = x.clamp(0.1, 0.9)
    y = model(x).argmax(1)
    batch, threat = Batch(x, y, torch.arange(1)), ThreatModel(Linf(eps))
    graph = prepared_graph(model, batch)
    logits = model(sampled(x, eps))
    least = float((logits[:, y[0]] - logits.index_fill(1, y, -torch.inf).amax(1)).min())
    allowed = 1e-12 * max(1.0, float(logits.abs().max()))
    bounds = [float(prover.on(graph, model, threat)(batch).bound) for prover in (IBP(), CrownIBP(), Crown())]
    assert max(bounds) <= least + allowed
    # the smallest value of a differentiable function in a tiny box follows from its gradient
    region = region_of(x, Linf(1e-5), Bounds())
    radius = float((region.high - region.low).max()) / 2  # with the tolerance of accepted inputs
    rows = torch.eye(3, dtype=torch.float64)[None]
    lower = substitute(relaxed(graph, region), graph.output, rows).lower[0]
    gradient = torch.autograd.functional.jacobian(lambda x: model(x)[0], x).flatten(1).abs().sum(1)
    excess = (model(x)[0] - lower) - radius * gradient
    assert float(excess.detach().max()) <= 1e-3 * radius * max(1.0, float(gradient.max()))


@pytest.mark.parametrize("layer", [nn.Tanh(), nn.GELU()], ids=lambda layer: type(layer).__name__)
def test_optimised_lines_and_divisions_improve_the_bounds_of_smooth_functions(layer: nn.Module) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), layer, nn.Linear(8, 8), layer, nn.Linear(8, 3)).double()
    for parameter in net.parameters():
        parameter.data.mul_(2)
    model = Classifier(net).eval().requires_grad_(False)
    x = torch.rand(6, 4, dtype=torch.float64)
    batch, threat = (
        Batch(x, model(x).argmax(1), torch.arange(6)),
        ThreatModel(Linf(0.2)),
    )
    crown, alpha, branching = (
        prover.ready(model, batch, threat)(batch)
        for prover in (Crown(), AlphaCrown(2.0), BranchAndBound(2.0))
    )
    assert (alpha.bound >= crown.bound - 1e-9).all()
    assert (alpha.bound > crown.bound + 1e-3).any()
    decided = branching.certified | branching.broken
    assert decided.sum() > crown.certified.sum()


def test_divided_inputs_of_products_decide_more() -> None:
    torch.manual_seed(3)

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(3 * x) * self.b(3 * x))

    model = Classifier(Gate().double()).eval().requires_grad_(False)
    x = torch.rand(8, 3, dtype=torch.float64)
    batch, threat = Batch(x, model(x).argmax(1), torch.arange(8)), ThreatModel(Linf(0.1))
    crown, branching = (
        prover.ready(model, batch, threat)(batch) for prover in (Crown(), BranchAndBound(1.0))
    )
    assert not (crown.certified & branching.broken).any()
    assert (branching.certified | branching.broken).sum() > crown.certified.sum()


@pytest.mark.slow
def test_the_table_of_operations_is_in_step_with_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(TRANSLATIONS, "aten.erfc", raising=False)  # which tests of remedies register
    written = bounds_page.PAGE.read_text(encoding="utf-8")
    assert written == bounds_page.page(written), "write it again: make benchmarks-page"
