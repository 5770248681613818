"""Bounds of networks: sound for every operation, tight for the simple ones, and refused where none are known."""

import importlib
import itertools
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import holdfast
from holdfast import L1, L2, Batch, Classifier, Linf, ThreatModel
from holdfast.certifiers.bounds import tracing
from holdfast.certifiers.bounds.alpha import AffineSum, Optimised, optimised, reduced, sharpen
from holdfast.certifiers.bounds.crown import NO_CHOICES, cuts, refine, relaxed, substitute
from holdfast.certifiers.bounds.graph import Region, Relaxation, gamma, region_of
from holdfast.certifiers.bounds.operations import ReLU
from holdfast.certifiers.bounds.tracing import traced
from holdfast.certifiers.bounds.windows import frames
from holdfast.certifiers.branching import AlphaCrown, BranchAndBound, OutputProperty, Search, Tree, _Problems
from holdfast.certifiers.objectives import margin_rows
from holdfast.certifiers.protocol import Prover
from holdfast.certifiers.provers import IBP, Crown, CrownIBP
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.model import Bounds
from holdfast.core.outputs import OutputKind


class Block(nn.Module):
    """A residual block with batch norm and a shortcut that pads channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 1, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.second(F.relu(self.first(x))))
        return F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1)))


class Deep(nn.Module):
    """Residual blocks with shortcuts that are the identity, a convolution with a stride, or a selection of columns and
    rows with further channels.
    """

    def __init__(self) -> None:
        super().__init__()
        self.start, self.last = nn.Conv2d(2, 3, 3, 1, 1), nn.Linear(80, 3)
        self.same = nn.ModuleList(nn.Conv2d(3, 3, 3, 1, 1) for _ in range(2))
        self.down = nn.ModuleList((nn.Conv2d(3, 5, 3, 2, 1), nn.Conv2d(5, 5, 3, 1, 1)))
        self.short = nn.Conv2d(3, 5, 1, 2)
        self.narrow = nn.ModuleList((nn.Conv2d(5, 5, 3, (1, 2), 1), nn.Conv2d(5, 5, 3, 1, 1)))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.start(x))
        y = F.relu(y + self.same[1](F.relu(self.same[0](y))))
        y = F.relu(self.short(y) - self.down[1](F.relu(self.down[0](y))))
        y = F.relu(F.pad(y[:, 1:4, :, ::2], (0, 0, 0, 0, 2, 0)) + self.narrow[1](F.relu(self.narrow[0](y))))
        return self.last(y[:, :, :, :2].flatten(1))


class Joined(nn.Module):
    """Two branches, a constant and a difference."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        left, right = F.leaky_relu(self.left(x)), F.hardtanh(self.right(1 - x))
        both = torch.cat((left, left - 2 * right, torch.full((len(x), 2), 0.5)), 1)
        return self.last(both) / 3 - 1


class Normalised(nn.Module):
    """Normalisation as a user writes it, before a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)
        )
        self.register_buffer("mean", torch.tensor([0.4, 0.5]).view(1, 2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x - self.mean) / torch.tensor([0.2, 0.3]).view(1, 2, 1, 1))


class RowConstants(nn.Module):
    """A factor for each row, in a value with as many rows as channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.last, self.factor = nn.Linear(256, 3), nn.Parameter(torch.randn(8, 1) * 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.second(F.relu(self.first(x) * self.factor))).flatten(1))


class Branches(nn.Module):
    """Images of two branches, joined between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 1, 1)
        self.both, self.last = nn.Conv2d(3, 2, 3), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(torch.cat((self.left(x), self.right(x)), 1))
        return self.last(F.relu(self.both(y)).flatten(1))


class Parallel(nn.Module):
    """Two activations, none of which depends on the other."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.left(x)) + F.relu(self.right(x)))


class InPlace(nn.Module):
    """Operations that change values which are used again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        shortcut = y.flatten(1)
        F.relu(y, inplace=True)
        y += x
        return self.last(shortcut)


class Coloured(nn.Module):
    """Normalisation of a grey image with three constants, which makes three channels of it."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - torch.tensor([0.1, 0.4, 0.6]).view(1, 3, 1, 1)) / 0.3


def images(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


NETWORKS = {
    "dense": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)),
        (6,),
    ),
    "two linear layers": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)),
        (6,),
    ),
    "convolutions": (
        lambda: images(
            nn.Conv2d(2, 3, 3, 2, 1), nn.ReLU(), nn.Conv2d(3, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
        ),
        (2, 6, 6),
    ),
    "windows": (
        lambda: images(
            nn.Conv2d(2, 3, 3, 1, 1),
            nn.BatchNorm2d(3),
            nn.ReLU(),
            nn.Conv2d(3, 2, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(2, 2, 2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(50, 3),
        ),
        (2, 12, 12),
    ),
    "residual": (lambda: images(Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)), (2, 6, 6)),
    "deep residual": (Deep, (2, 16, 16)),
    "max pooling": (
        lambda: images(
            nn.Conv2d(2, 3, 3, padding=1), nn.MaxPool2d(3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(27, 3)
        ),
        (2, 6, 6),
    ),
    "joined": (Joined, (6,)),
    "normalised": (Normalised, (2, 6, 6)),
    **{
        type(layer).__name__: (
            lambda layer=layer: nn.Sequential(
                nn.Linear(6, 8), layer, nn.Linear(8, 8), layer, nn.Linear(8, 3)
            ),
            (6,),
        )
        for layer in (
            nn.Tanh(),
            nn.Sigmoid(),
            nn.Sigmoid(),
            nn.SiLU(),
            nn.Softplus(),
            nn.LeakyReLU(0.2),
            nn.ReLU6(),
        )
    },
    "row constants": (RowConstants, (1, 8, 8)),
    "parallel": (Parallel, (6,)),
    "branches": (Branches, (2, 6, 6)),
    "in place": (InPlace, (2, 4, 4)),
    "grey to colour": (
        lambda: images(Coloured(), nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)),
        (1, 6, 6),
    ),
    "one dimension": (
        lambda: images(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(12, 3)),
        (2, 8),
    ),
    "softmax": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3), nn.LogSoftmax(1)), (6,)),
}
"""factory and input shape of a network with each kind of operation"""


def network(name: str) -> tuple[Classifier, Tensor]:
    """A network with random weights that are large enough for many signs to be unknown, and two inputs."""
    make, shape = NETWORKS[name]
    torch.manual_seed(3)
    net = make()
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.weight.data.mul_(2)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return Classifier(net).eval().requires_grad_(False), torch.rand(2, *shape)


def points(region: Region, n: int = 400) -> Tensor:
    """Inputs of the region of the first example: corners of its box and inner points, those outside of the ball moved
    into it.
    """
    low, high, centre = region.low[:1], region.high[:1], region.centre[:1]
    share = torch.rand(n, *low.shape[1:], dtype=low.dtype)
    share[: n // 2] = share[: n // 2].round()
    x = low + share * (high - low)
    if region.norm is None:
        return x
    change = x - centre
    size = change.flatten(1).norm(p=region.norm, dim=1).clamp(min=1e-9)
    return centre + change * (region.radius / size).clamp(max=1).view(-1, *(1,) * (x.dim() - 1))


@pytest.mark.parametrize("constraint", [Linf(0.1), L2(0.4), L1(0.8)], ids=str)
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "deep residual"])  # it takes too long
def test_every_value_is_inside_its_bounds(name: str, constraint: Linf | L2 | L1) -> None:
    model, x = network(name)
    graph = traced(model, x)
    region = region_of(x, constraint, Bounds())
    inside = graph.values(points(region))
    relaxation = relaxed(graph, region)
    sharpen(relaxation, 2)
    for index in range(1, graph.output + 1):
        refine(relaxation, index)
        for low, high in (graph.intervals(region.box)[index], relaxation.bound(index)):
            assert (inside[index] >= low[:1]).all(), graph.node(index).operation
            assert (inside[index] <= high[:1]).all(), graph.node(index).operation


@pytest.fixture
def without_cuts(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A function after whose call bounds are substituted back to the input, without an early end."""
    return lambda: monkeypatch.setattr("holdfast.certifiers.bounds.crown.cuts", lambda *_: [])


@pytest.mark.parametrize("name", ["windows", "convolutions", "deep residual"])
def test_bounds_on_windows_are_those_of_the_whole_value(
    name: str, monkeypatch: pytest.MonkeyPatch, without_cuts: Callable[[], None]
) -> None:
    model, x = network(name)
    graph = traced(model, x).to(torch.float64)
    assert any(len(frames(graph, index, 0)) > 1 for index in graph.bounded)
    without_cuts()
    for constraint in (Linf(0.02), L2(0.1)):
        region = region_of(x, constraint, Bounds()).to(torch.float64)
        by_windows = relaxed(graph, region)
        with monkeypatch.context() as patch:
            patch.setattr("holdfast.certifiers.bounds.windows.frames", lambda *_: {})
            whole = relaxed(graph, region)
        for index in graph.bounded:
            for one, other in zip(by_windows.bound(index), whole.bound(index), strict=True):
                torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


def test_substitutions_that_end_early_leave_the_other_bounds_as_they_are(
    without_cuts: Callable[[], None], set_limit: Callable[[str, object], None]
) -> None:
    model, x = network("deep residual")
    graph = traced(model, x).to(torch.float64)
    region = region_of(x, Linf(0.01), Bounds()).to(torch.float64)
    set_limit("holdfast.certifiers.bounds.crown._MANY", 1)
    assert any(cuts(graph, index) for index in graph.bounded)
    ended = relaxed(graph, region)
    without_cuts()
    complete = relaxed(graph, region)
    inside = graph.values(points(region))
    for index in graph.bounded:
        assert (inside[index] >= ended.bound(index)[0][:1]).all()
        assert (inside[index] <= ended.bound(index)[1][:1]).all()
        (low, high), (low_2, high_2) = ended.bound(index), complete.bound(index)
        unknown = (low_2 < 0) & (high_2 > 0)
        assert torch.equal((low < 0) & (high > 0), unknown)
        torch.testing.assert_close(low[unknown], low_2[unknown], atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(high[unknown], high_2[unknown], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    "name", ["dense", "two linear layers", "convolutions", "windows", "residual", "parallel"]
)
def test_the_network_that_remains_is_the_network_in_its_region(name: str) -> None:
    model, x = network(name)
    for dtype in (torch.float32, torch.float64):
        graph = traced(model, x[:1]).to(dtype)
        region = region_of(x[:1].to(dtype), Linf(0.1), Bounds())
        relaxation = relaxed(graph, region)
        small = reduced(relaxation)
        known = [relaxation.bound(graph.node(i).inputs[0]) for i in graph.nonlinear]
        assert any(((low >= 0) | (high <= 0)).any() for low, high in known)
        assert any(((low < 0) & (high > 0)).any() for low, high in known)
        inside = points(region)
        exact = traced(model, x[:1]).to(torch.float64)(inside.double())
        last = small.graph.node(small.graph.output).operation
        assert isinstance(last, AffineSum)
        assert ((small.graph(inside).double() - exact).abs() <= last.error).all()
        assert (last.error < 1e-2 * (1 if dtype == torch.float32 else 1e-8)).all()
        for index, values in enumerate(small.graph.values(inside)):
            assert (values >= small.bound(index)[0]).all()
            assert (values <= small.bound(index)[1]).all()
        rows = margin_rows(model(x[:1]).argmax(1), graph.shape_of(graph.output)[0], dtype)
        whole, of_small = (substitute(each, each.graph.output, rows).lower for each in (relaxation, small))
        if dtype == torch.float64:  # the rounding errors that are subtracted differ
            torch.testing.assert_close(of_small, whole, atol=1e-9, rtol=1e-9)
        assert (of_small <= margins_of(rows, exact).amin(0)).all()


def margins_of(rows: Tensor, logits: Tensor) -> Tensor:
    """The margins (n, k) of logits (n, classes)."""
    return logits @ rows[0].double().t()


def test_linear_networks_are_bounded_exactly() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(3, 6), torch.full((1, 6), 0.5)
    net = nn.Linear(6, 3, bias=False)
    net.weight.data.copy_(weight)
    model = Classifier(net).eval().requires_grad_(False)
    y = model(x).argmax(1)
    difference = (weight[y] - weight)[torch.arange(3) != y]
    for constraint, dual in ((Linf(0.1), 1), (L2(0.1), 2), (L1(0.1), torch.inf)):
        expected = (difference @ x[0] - 0.1 * difference.norm(p=dual, dim=1)).amin()
        batch = Batch(x, y, torch.arange(1))
        for prover in (IBP(), Crown()):
            proofs = prover.ready(model, batch, ThreatModel(constraint))(batch)
            if prover.name == "crown" or isinstance(constraint, Linf):
                assert float(proofs.bound) == pytest.approx(float(expected), abs=1e-4)
                assert proofs.bound <= expected


def test_each_method_is_at_least_as_tight_as_the_one_before() -> None:
    model, x = network("dense")
    graph, y = traced(model, x), model(x).argmax(1)
    rows, region = margin_rows(y, 3, x.dtype), region_of(x, Linf(0.1), Bounds())
    batch, threat = Batch(x, y, torch.arange(2)), ThreatModel(Linf(0.1))
    ibp, crown_ibp, crown = (
        prover.ready(model, batch, threat)(batch).bound for prover in (IBP(), CrownIBP(), Crown())
    )
    relaxation = relaxed(graph, region)
    sharpen(relaxation, 20)
    alpha = optimised(relaxation, graph.output, rows, steps=20, until_positive=False).lower.amin(1)
    assert (crown >= torch.maximum(crown_ibp, ibp) - 1e-4).all()
    assert (alpha >= crown - 1e-4).all()
    assert (alpha > crown + 1e-3).any()


def test_rounding_errors_are_subtracted() -> None:
    """A function whose terms cancel: its exact minimum is 0, and no float32 bound may exceed it."""
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
    net[0].weight.data.copy_(torch.tensor([[1e4 / 3, 1e4 / 7], [1e4 / 3, 1e4 / 7]]))
    net[2].weight.data.copy_(torch.tensor([[1.0, -1.0], [0.0, 0.0]]))
    model = Classifier(net).eval().requires_grad_(False)
    batch = Batch(torch.full((1, 2), 0.5), torch.tensor([0]), torch.arange(1))
    for prover in (IBP(), CrownIBP(), Crown(), AlphaCrown()):
        assert prover.ready(model, batch, ThreatModel(Linf(0.1)))(batch).bound <= 0, prover


@pytest.mark.parametrize("prover", [IBP(), CrownIBP(), Crown()], ids=lambda prover: prover.name)
def test_bounds_are_below_the_exact_minimum_where_constants_are_rounded(prover: Prover) -> None:
    # reciprocals of the deviations are rounded to float32
    for seed in range(20):
        torch.manual_seed(seed)
        net, x, mean, std = nn.Linear(6, 2), torch.rand(1, 6), torch.rand(6), torch.rand(6) + 0.3
        model = Classifier(net, mean=mean.tolist(), std=std.tolist()).eval().requires_grad_(False)
        batch, threat = Batch(x, torch.zeros(1, dtype=torch.long), torch.arange(1)), ThreatModel(Linf(1e-6))
        found = Fraction(float(prover.ready(model, batch, threat)(batch).bound))
        low, high = (each[0].tolist() for each in region_of(x, threat.constraint, model.bounds).box)
        weights = [[Fraction(value) for value in row] for row in net.weight.tolist()]
        least = Fraction(net.bias[0].item()) - Fraction(net.bias[1].item())
        for place, (first, second) in enumerate(zip(*weights, strict=True)):
            factor = (first - second) / Fraction(std[place].item())
            end = Fraction(low[place] if factor > 0 else high[place])
            least += factor * (end - Fraction(mean[place].item()))
        assert found <= least, seed


def test_an_interpolation_is_bounded_although_its_weights_are_differences_of_places() -> None:
    resized, x = nn.Upsample(size=(2, 320), mode="bilinear").eval(), torch.zeros(1, 1, 2, 224)
    x[..., ::2] = 1
    assert (holdfast.bounds(resized, x, 0.0, method="ibp").lower.double() <= resized(x.double())).all()


class Shifted(nn.Module):
    """Small sums of all inputs, multiplied by `factor` after the addition of several constants to the two outputs."""

    def __init__(self, offsets: list[tuple[float, float]], factor: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("offsets", torch.tensor(offsets))
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        y = 1e-6 * x.flatten(1).sum(1, keepdim=True)
        for offset in self.offsets:
            y = y + offset
        return y * self.factor


@pytest.mark.parametrize("prover", [Crown(), BranchAndBound(timeout_s=5)], ids=lambda prover: prover.name)
def test_a_sum_that_overflows_proves_nothing(prover: Crown) -> None:
    # 10 * 6e37 overflows in a backward substitution, although all values and the true margin -6e37 do not
    net = Shifted([(-1.65e37, 1.65e37)] * 2 + [(3e37, -3e37)], 10.0)
    model, x = Classifier(net).eval(), torch.full((1, 1, 2, 2), 0.5)
    assert model(x).argmax(1) == 1
    batch = Batch(x, torch.zeros(1, dtype=torch.long), torch.arange(1))
    assert not prover.ready(model, batch, ThreatModel(Linf(1e-3)))(batch).certified


@pytest.mark.slow
def test_rounding_errors_of_many_constants_are_subtracted() -> None:
    # in a sum from the last constant to the first, all others are lost
    net, x = Shifted([(-0.49 * 2.0**-23, 0.0)] * 600 + [(1.5, 0.0)]), torch.full((1, 1, 2, 2), 0.5)
    graph = traced(Classifier(net).eval(), x)
    lower = substitute(
        relaxed(graph, region_of(x, Linf(1e-3), Bounds())), graph.output, torch.eye(2)[None]
    ).lower
    assert lower[0, 0] <= float(graph.to(torch.float64)(x.double())[0, 0])


def test_rounding_errors_of_a_subproblem_are_at_least_those_of_its_own_bounds() -> None:
    layers = [nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 3)]
    model = Classifier(nn.Sequential(nn.Flatten(), *layers)).eval().requires_grad_(False)
    x = torch.rand(1, 1, 2, 2)
    graph = traced(model, x)
    root = relaxed(graph, region_of(x, Linf(0.5), Bounds()))
    (sigmoid,) = (i for i in graph.nonlinear if not isinstance(graph.node(i).operation, ReLU))
    index, one = graph.node(sigmoid).inputs[0], torch.ones(1, 4)
    root.bounds[index] = (-22.48 * one, -5.66 * one)
    claim = OutputProperty(torch.eye(3)[:1], torch.zeros(1))
    first = Optimised(torch.zeros(1, 1), NO_CHOICES)
    tree = Tree(root, claim, Search(), first, lambda x: torch.zeros(len(x), dtype=torch.bool))
    known = {**{i: root.bound(i) for i in graph.bounded}, index: (-6.46 * one, -5.72 * one)}
    inside = tree._relaxation(_Problems({}, known, torch.zeros(1), NO_CHOICES))
    own = Relaxation(graph, root.region, dict(known))
    for i in range(1, graph.output + 1):
        assert (inside.error_of(i) >= own.error_of(i)).all()


@pytest.mark.parametrize("seed", range(12))
def test_branch_and_bound_decides_small_networks(seed: int) -> None:
    """Against a dense grid of two-dimensional inputs, whose spacing and the gain of the network bound the error."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    for layer in (net[0], net[2]):
        layer.weight.data.mul_(2)
    model = Classifier(net).eval().requires_grad_(False)
    x, eps = torch.rand(1, 2), 0.05 + 0.03 * seed
    y = model(x).argmax(1)
    batch, threat = Batch(x, y, torch.arange(1)), ThreatModel(Linf(eps))
    proofs = BranchAndBound(timeout_s=20).ready(model, batch, threat)(batch)
    region = region_of(x, Linf(eps), Bounds())
    axes = [
        torch.linspace(float(a), float(b), 400) for a, b in zip(region.low[0], region.high[0], strict=True)
    ]
    grid = torch.tensor(list(itertools.product(*axes)))
    values = (margin_rows(y, 3, x.dtype)[0] @ model(grid).t()).amin()
    assert bool(proofs.certified) != bool(proofs.broken)
    if proofs.certified:
        assert values > 0
        assert 0 < proofs.bound <= values + 1e-4
    else:
        assert model(proofs.x_adv).argmax(1) != y
        assert threat.constraint.distance(proofs.x_adv, x) <= eps * (1 + 1e-6)


def test_a_network_that_is_linear_in_the_region_is_decided() -> None:
    """The signs of all ReLUs are known, so that a linear program decides the example."""
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2, bias=False))
    net[0].weight.data.copy_(torch.eye(8))
    net[0].bias.data.copy_(torch.tensor([10.0] * 4 + [-10.0] * 4))
    net[2].weight.data.copy_(torch.tensor([[1.0, 0, 0, 0, 0, 0, 0, 0], [0, 1.0, 0, 0, 0, 0, 0, 0]]))
    model = Classifier(net).eval().requires_grad_(False)
    x = torch.full((1, 8), 0.5)
    x[0, 0] = 0.6
    batch = Batch(x, torch.tensor([0]), torch.arange(1))
    for eps, certified in ((0.04, True), (0.06, False)):
        proofs = BranchAndBound(timeout_s=20).ready(model, batch, ThreatModel(Linf(eps)))(batch)
        assert bool(proofs.certified) == certified
        assert bool(proofs.broken) != certified


def test_a_search_that_is_out_of_time_is_unknown() -> None:
    model, x = network("dense")
    batch, threat = Batch(x, model(x).argmax(1), torch.arange(2)), ThreatModel(Linf(0.5))
    undecided = AlphaCrown().ready(model, batch, threat)(batch)
    assert not undecided.certified.all()
    proofs = BranchAndBound(timeout_s=1e-9).ready(model, batch, threat)(batch)
    assert (proofs.stopped | proofs.certified | proofs.broken).all()
    assert not (proofs.stopped & proofs.certified).any()


def test_results_do_not_depend_on_the_batch() -> None:
    model, x = network("convolutions")
    x = torch.cat((x, x.flip(0), x.roll(1, 2)))
    batch, threat = Batch(x, model(x).argmax(1), torch.arange(6)), ThreatModel(Linf(0.02))
    prover = Crown().ready(model, batch, threat)
    together = prover(batch).bound
    alone = torch.cat([prover(batch.take(torch.tensor([row]))).bound for row in range(6)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(prover(batch.take(order)).bound, together[order], atol=1e-5, rtol=1e-4)


class Branching(nn.Module):
    """A network whose operations depend on the values of its inputs."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x[:, :2]
        return x[:, 1:3]


class Hidden(nn.Module):
    """A decision by values that leave torch, on which nothing is recorded."""

    def forward(self, x: Tensor) -> Tensor:
        return -x if x.detach().numpy().max() > 0.95 else x


class Moved(nn.Module):
    """A network that exchanges the batch with a dimension of equal size during the recording."""

    def forward(self, x: Tensor) -> Tensor:
        moved = x[:, :3].transpose(0, 1)
        return (moved - moved.mean(1, keepdim=True)).transpose(0, 1)


class Sorted(nn.Module):
    """A function of several values."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sort(1).values


class StraightThrough(torch.autograd.Function):
    """A custom function."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.round()


class Rounded(nn.Module):
    """A layer that calls a custom function."""

    def forward(self, x: Tensor) -> Tensor:
        rounded: Tensor = StraightThrough.apply(x)
        return rounded


class Centred(nn.Module):
    """A network that mixes the examples of a batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (Branching(), "it reads the values of a tensor in your code"),
        (Sorted(), "return x.sort(1).values"),
        (Centred(), "examples of a batch"),
        (Hidden(), "cannot be recorded"),
        (Moved(), "examples of a batch"),
        (Rounded(), "aten.round in StraightThrough"),
    ],
    ids=["branching", "sorted", "centred", "hidden", "moved", "rounded"],
)
def test_networks_without_sound_bounds_are_refused(net: nn.Module, message: str) -> None:
    model = Classifier(net).eval()
    with pytest.raises(UsageError) as error:
        traced(model, torch.rand(4, 4))
    assert message in str(error.value)


class Calling(nn.Module):
    """A network that calls a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def test_a_refusal_names_the_line_of_a_library_that_reads_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "reading_values.py"
    library.write_text("def scaled(x):\n    return x * float(x.max())\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(tracing, "_INSTALLED", (str(tmp_path),))
    scaled = importlib.import_module("reading_values").scaled
    with pytest.raises(UsageError) as error:
        traced(Classifier(Calling(scaled)).eval(), torch.rand(4, 4))
    assert f"{library}, line 2: return x * float(x.max()), which is the code of a library" in str(error.value)
    assert f"your code calls in {__file__}" in str(error.value)


class Squeezed(nn.Module):
    """One number for each example, without a dimension for features."""

    def forward(self, x: Tensor) -> Tensor:
        return x.squeeze(1)


@pytest.mark.parametrize(
    ("net", "output"),
    [
        (nn.Sequential(nn.Linear(4, 3), nn.Softmax(1)), "probability"),
        (nn.Sequential(nn.Linear(4, 3), nn.Sigmoid()), "probability"),
        (nn.Sequential(nn.Linear(4, 1), nn.Sigmoid()), "probability"),
        (nn.Sequential(nn.Linear(4, 1), nn.Sigmoid(), Squeezed()), "probability"),
        (nn.Sequential(nn.Linear(4, 1), Squeezed(), nn.Sigmoid()), "probability"),
        (nn.Linear(4, 1), "logit"),
        (nn.Sequential(nn.Linear(4, 1), Squeezed()), "logit"),
    ],
    ids=["softmax", "sigmoids", "sigmoid", "squeezed", "sigmoid of squeezed", "logit", "squeezed logit"],
)
def test_declared_outputs_have_the_bounds_of_their_logits(net: nn.Sequential, output: OutputKind) -> None:
    generator = torch.Generator().manual_seed(0)
    model, x = (
        Classifier(net, output=output, bounds=Bounds(-1, 2)).eval(),
        torch.rand(40, 4, generator=generator),
    )
    linear = net[0] if isinstance(net, nn.Sequential) else net
    with torch.no_grad():
        linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator))
        linear.bias.copy_(-linear.weight.sum(1) / 2)
    y = model(x).argmax(1)
    batch = Batch(x, y, torch.arange(40))
    proved = Crown().ready(model, batch, ThreatModel(Linf(0.05)))(batch).certified
    weight, bias = linear.weight.detach(), linear.bias.detach()
    if len(weight) == 1:
        weight, bias = torch.cat((0 * weight, weight)), torch.cat((0 * bias, bias))
    rows = weight[y][:, None] - weight[None]
    exact = (rows @ x[:, :, None])[..., 0] + bias[y][:, None] - bias[None] - 0.05 * rows.abs().sum(2)
    robust = (exact + 1e9 * F.one_hot(y, len(bias))).amin(1) > 0
    several = isinstance(net, nn.Sequential) and isinstance(net[1], nn.Sigmoid) and len(weight) > 2
    assert not (proved & ~robust).any()
    assert proved.sum() >= 10 if several else proved.equal(robust)


def test_weights_that_are_not_finite_are_refused_by_name() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        net[2].weight[0, 1] = torch.nan
    with pytest.raises(
        TargetError, match=r"for 5 of 5 clean inputs; its weights contain NaN .* in 2\.weight"
    ):
        traced(Classifier(net).eval(), torch.rand(5, 4))


def test_a_function_of_the_user_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    from holdfast.certifiers import register
    from holdfast.certifiers.bounds import operators

    model = Classifier(torch.asinh).eval()
    x = torch.rand(2, 3)
    with pytest.raises(UsageError, match=r"aten\.asinh"):
        traced(model, x)
    monkeypatch.setitem(operators.TRANSLATIONS, "aten.asinh", None)  # restored after the test
    register("aten.asinh", torch.asinh, 1.0)
    graph = traced(model, x)
    region = region_of(x, Linf(0.3), Bounds())
    low, high = Relaxation(graph, region).bound(1)
    values = graph(points(region))
    assert (values >= low[:1]).all()
    assert (values <= high[:1]).all()
    with pytest.raises(UsageError, match="curvature is 0"):
        register("aten.asinh", torch.asinh, 0)


@pytest.mark.parametrize("constraint", [Linf(0.1), L2(0.5), L1(0.5)], ids=str)
def test_the_region_contains_every_accepted_input(constraint: Linf | L2 | L1) -> None:
    """Also those that are accepted because of the rounding of many stored values."""
    from holdfast.core.constraints import allowed

    x = torch.full((1, 3, 32, 32), 0.5)
    region = region_of(x.double(), constraint, Bounds())
    size = {"linf": 1.0, "l2": 3072**0.5, "l1": 3072.0}[constraint.name]
    for share in torch.linspace(0.99, 1.001, 400):
        x_adv = x.double() - constraint.eps * float(share) / size
        if allowed(constraint, x_adv.float(), x, Bounds())[0]:
            distance = (
                (x_adv.float().double() - x.double()).flatten(1).norm(p=region.norm or torch.inf, dim=1)
            )
            assert distance <= (region.radius if region.norm else float((region.centre - region.low).amax()))


def test_no_bound_is_proved_in_a_short_format() -> None:
    model = Classifier(nn.Sequential(nn.Linear(6, 3))).eval().bfloat16()
    batch = Batch(torch.rand(2, 6).bfloat16(), torch.tensor([0, 1]), torch.arange(2))
    with pytest.raises(UsageError, match="bfloat16"):
        Crown().ready(model, batch, ThreatModel(Linf(0.1)))
    assert gamma(2000, torch.bfloat16) == float("inf")


def test_substitution_of_a_value_that_is_the_input() -> None:
    model, x = network("dense")
    region = region_of(x, Linf(0.1), Bounds())
    lower = substitute(Relaxation(traced(model, x), region), 0, torch.eye(6)[None]).lower
    torch.testing.assert_close(lower, region.low, atol=1e-5, rtol=1e-5)
