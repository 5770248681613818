"""Distances and Lipschitz constants of single examples against exact ones, and slices of a known boundary."""

import math

import pytest
import torch
from torch import nn

from holdfast.certifiers.boundary_geometry import (
    SIDE,
    beside,
    boundary_geometry,
    boundary_slices,
    certified_distance,
    lipschitz_from_above,
    lipschitz_from_below,
    local_lipschitz,
)
from holdfast.certifiers.bounds.crown import relaxed
from holdfast.certifiers.bounds.graph import region_of
from holdfast.certifiers.bounds.tracing import traced
from holdfast.certifiers.provers import Crown
from holdfast.core.batch import Batch
from holdfast.core.constraints import L1, L2, Linf
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Bounds, Classifier
from holdfast.core.threat import ThreatModel
from holdfast.testing.fakes import examples, labelled, linear_problem, network, relu_problem
from holdfast.threats.transformations import Patch

NORMS = (Linf, L2, L1)
DUAL = {Linf: 1, L2: 2, L1: math.inf}


def image_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.LeakyReLU(0.1),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, stride=2),
        nn.GELU(),
        nn.Hardtanh(-0.2, 0.3),
        nn.Flatten(),
        nn.Linear(16, 6),
        nn.ReLU(),
        nn.Linear(6, 3),
    ).double()


@pytest.mark.parametrize("norm", NORMS)
def test_no_gradient_in_a_region_exceeds_the_local_lipschitz_constant(norm):
    net, x = image_net().requires_grad_(False), torch.rand(3, 2, 10, 10, dtype=torch.float64)
    rows = torch.eye(3, dtype=torch.float64).expand(3, 3, 3)
    batch = Batch(x, torch.zeros(3, dtype=torch.int64), torch.arange(3))
    for eps in (1e-7, 0.02, 0.2):
        constraint = norm(eps)
        constants = local_lipschitz(
            relaxed(traced(net, x), region_of(x, constraint, Bounds())), rows, constraint
        )
        for sample in range(10):
            point = constraint.sample(batch, Bounds(), Draws(0).at(sample)) if sample else x
            for row in range(3):
                jacobian = torch.autograd.functional.jacobian(net, point[row : row + 1]).reshape(3, -1)
                sizes = torch.linalg.vector_norm(jacobian, DUAL[norm], dim=1)
                assert (sizes <= constants[row] * (1 + 1e-9)).all()
                if eps == 1e-7 and not sample:  # a region without kinks: the gradient itself
                    torch.testing.assert_close(constants[row], sizes, rtol=1e-3, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_certified_distances_are_at_most_the_exact_ones(norm):
    for oracle, batch in (linear_problem(1, n=6), relu_problem(1)):
        model, exact = (
            oracle.classifier().requires_grad_(False),
            oracle.distance(batch.x, batch.y, norm(1.0)),
        )
        most = 1.3 * exact.clamp(max=1.0)
        distance = certified_distance(Crown(), model, batch, norm(), most, steps=10)
        assert (distance <= exact).all()
        if len(batch) == 6 and norm is Linf:  # other balls are relaxed where the bounds cut them
            assert (distance >= exact - most / 2**9 - 1e-6).all()


def test_a_misclassified_example_has_the_distance_0():
    oracle, batch = linear_problem(0, n=3)
    wrong = batch.labelled((batch.y + 1) % 3)
    assert (certified_distance(Crown(), oracle.classifier(), wrong, Linf(), torch.ones(3)) == 0).all()


@pytest.mark.parametrize("norm", NORMS)
def test_lipschitz_constants_of_a_linear_model_are_exact_from_both_sides(norm):
    oracle, batch = linear_problem(0, n=4)
    model, rivals, radius = oracle.classifier(), (batch.y + 1) % 3, torch.full((4,), 0.1).double()
    exact = torch.linalg.vector_norm(
        oracle.weight[batch.y] - oracle.weight[rivals], DUAL[norm], dim=1
    ).double()
    above = lipschitz_from_above(traced(model, batch.x), model, batch, norm(), radius, rivals)
    below = lipschitz_from_below(model, batch, norm(), radius, rivals, samples=3, rng=Draws(0))
    torch.testing.assert_close(below, exact, rtol=1e-9, atol=0)
    torch.testing.assert_close(above, exact, rtol=1e-9, atol=0)
    assert (above >= exact).all()


def test_a_slice_shows_a_known_boundary():
    net = nn.Linear(2, 2).double()
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
        net.bias.copy_(torch.tensor([0.0, -0.6]))  # class 1 where the first value exceeds 0.6
    model, x = Classifier(net), torch.tensor([[0.4, 0.9]], dtype=torch.float64)
    across, up = torch.tensor([[0.2, 0.0]]).double(), torch.tensor([[0.0, 0.2]]).double()
    (grid,) = boundary_slices(model, x, across, up, bounds=Bounds(), side=9, reach=2.0)
    right = torch.arange(9) > 6  # s = 1 is a tie
    inside = torch.tensor([False] * 3 + [True] * 6)  # t = 0.5 reaches the bound
    predicted = torch.where(grid < 0, -1 - grid, grid)
    assert (predicted[:, right] == 1).all() and (predicted[:, torch.arange(9) < 6] == 0).all()
    assert ((grid >= 0).all(1) == inside).all()


def test_the_second_direction_is_orthogonal_and_as_long():
    torch.manual_seed(0)
    first, second = torch.randn(3, 2, 4).double(), torch.randn(3, 2, 4).double()
    second[2] = -2 * first[2]
    up = beside(first, second)
    assert ((up * first).flatten(1).sum(1).abs() < 1e-12).all()
    torch.testing.assert_close(up.flatten(1).norm(dim=1)[:2], first.flatten(1).norm(dim=1)[:2])
    assert (up[2] == 0).all()


def geometry(model, batch, threat, n):
    first = batch.take(torch.arange(n))
    return boundary_geometry(model, first.at(first.x.float()), threat, 0)


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_the_geometry_of_an_example_orders_what_is_proved_and_what_is_found(norm):
    oracle, batch = linear_problem(0, n=5, dtype=torch.float32)
    batch = batch.labelled(torch.where(torch.arange(5) == 3, (batch.y + 1) % 3, batch.y))
    model = oracle.classifier()
    table = geometry(model, batch, ThreatModel(norm(0.05)), 4)
    columns, exact = table.columns, oracle.distance(batch.x, batch.y, norm(1.0))[:4]
    assert len(table) == 4 and columns["slice_random"].shape == (4, SIDE, SIDE)
    assert (columns["lower"] <= exact * (1 + 1e-6) + 1e-9).all()
    assert (columns["upper"] >= exact * (1 - 1e-5)).all()
    assert (columns["upper"] <= 1.1 * exact + 1e-6).all()
    assert columns["lower"][3] == columns["upper"][3] == 0
    assert (columns["lipschitz_below"] <= columns["lipschitz_above"] * (1 + 1e-5)).all()
    middle = columns["slice_attacks"][:, SIDE // 2, SIDE // 2]
    assert (middle.long() == columns["prediction"]).all()
    # the adversarial example is at s = 1, and one step further is misclassified for certain
    beyond = columns["slice_attacks"][:3, SIDE // 2, 31].long()
    assert (torch.where(beyond < 0, -1 - beyond, beyond) != columns["y"][:3]).all()
    again = geometry(model, batch, ThreatModel(norm(0.05)), 2).columns
    assert all(torch.equal(values, columns[name][:2]) for name, values in again.items())


@pytest.mark.slow
def test_the_geometry_without_sound_bounds_is_that_of_attacks():
    class Sorted(nn.Module):
        def forward(self, x):
            return x.flatten(1).sort(1).values[:, :3]

    batch = labelled(Classifier(Sorted()), examples(n=2, shape=(4,), dtype=torch.float32))
    for norm in (Linf, L2):
        columns = geometry(Classifier(Sorted()).eval(), batch, ThreatModel(norm(0.1)), 2).columns
        assert columns["lower"].isnan().all() and columns["lipschitz_above"].isnan().all()
        assert (columns["lipschitz_below"] > 0).all()


@pytest.mark.slow
def test_the_geometry_under_a_norm_without_eps_uses_the_attacked_distance():
    model = network(0).float()
    batch = labelled(model, examples(n=2, dtype=torch.float32))
    columns = geometry(model, batch, ThreatModel(L2()), 2).columns
    assert torch.equal(columns["radius"], columns["upper"])
    assert (columns["lower"] > 0).all() and (columns["lower"] <= columns["upper"]).all()


def test_what_has_no_geometry_is_refused():
    model = network(0).float()
    data = labelled(model, examples(n=2, dtype=torch.float32))
    with pytest.raises(UsageError, match="balls of linf, l2 and l1 without a target class"):
        geometry(model, data, ThreatModel(Patch(2, 2)), 2)
    with pytest.raises(UsageError, match="goal=1"):
        geometry(model, data, ThreatModel(Linf(0.1), goal=1), 2)
