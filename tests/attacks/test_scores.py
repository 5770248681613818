"""Attacks on scores: what they draw, the gradients they estimate, their bases, and what they change."""

import pytest
import torch

from holdfast.attacks import NES, SPSA, ZOO, Bandits, SimBA, SparseRS
from holdfast.attacks.parts.losses import Best
from holdfast.attacks.parts.random_search import distinct_positions
from holdfast.attacks.parts.substitutes import estimated_slope, gaussian, rademacher
from holdfast.core.batch import Batch
from holdfast.core.constraints import L0, L2, Linf, allowed
from holdfast.core.draws import Draws
from holdfast.core.meter import Metered
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.corruptions.images import cosines
from holdfast.testing.fakes import Constant, examples, labelled, linear_problem, network

RNG = Draws(4)


@pytest.mark.parametrize("k, m", [(1, 1), (3, 3), (2, 7), (5, 40)])
def test_distinct_positions_differ_and_each_is_as_likely(k, m):
    found = distinct_positions(RNG.uniform(torch.arange(4000), k + 1), m)
    assert found.shape == (4000, k)
    assert ((found >= 0) & (found < m)).all()
    assert all(len(set(row)) == k for row in found.tolist())
    share = found.flatten().bincount(minlength=m) / 4000
    assert (share - k / m).abs().max() < 5 * (k / m / 4000) ** 0.5


@pytest.mark.parametrize("noise", [gaussian, rademacher])
@pytest.mark.parametrize("shape", [(7,), (3, 5, 5)])
def test_noise_has_mean_zero_and_size_one_and_is_each_examples_own(noise, shape):
    ids, like = torch.arange(2000), torch.zeros(2000, *shape, dtype=torch.float64)
    drawn = noise(RNG, ids, like)
    assert drawn.shape == like.shape
    assert drawn.dtype == like.dtype
    flat = drawn.flatten(1)
    torch.testing.assert_close(flat.T @ flat / 2000, torch.eye(flat.shape[1]).double(), atol=0.13, rtol=0)
    assert flat.mean(0).abs().max() < 0.1
    assert torch.equal(noise(RNG, ids[5:9], like[5:9]), drawn[5:9])


@pytest.mark.parametrize("noise", [gaussian, rademacher])
def test_the_estimate_points_along_the_gradient(noise):
    oracle, batch = linear_problem(0, classes=2)
    model, best = oracle.classifier(), Best(batch)
    x = torch.full_like(batch.x, 0.5)
    found = estimated_slope(model, batch, x, Linf(1.0), best, noise, pairs=400, size=1e-3, rng=RNG)
    weight = oracle.weight[1 - batch.y] - oracle.weight[batch.y]
    assert (torch.cosine_similarity(found, weight.to(found)) > 0.9).all()


def test_a_queried_point_counts_only_inside_the_ball():
    model = Constant((0.0, 1.0))
    batch = Batch(torch.full((3, 4), 0.5), torch.zeros(3, dtype=torch.int64), torch.arange(3))
    for eps, kept in ((1.0, True), (1e-3, False)):
        best = Best(batch)
        estimated_slope(
            Classifier(model), batch, batch.x, Linf(eps), best, rademacher, pairs=2, size=0.1, rng=RNG
        )
        assert ((best.margin < 0).all()) == kept


def test_cosines_are_orthonormal_and_begin_with_the_mean():
    waves = cosines(9, torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(waves @ waves.T, torch.eye(9).double())
    assert (waves[0] == waves[0, 0]).all()


@pytest.mark.parametrize("per, eps", [("value", 5), ("pixel", 3), ("pixel", 100)])
def test_sparse_rs_changes_as_many_places_as_allowed_to_sides_of_the_box(per, eps):
    model = network(0)
    batch = labelled(model, examples(0, n=8))
    threat = ThreatModel(L0(eps, per), queries=40)
    x_adv = SparseRS()(model, batch, threat, rng=RNG)
    assert allowed(threat.constraint, x_adv, batch.x, model.bounds).all()
    changed = x_adv != batch.x
    assert ((x_adv == 0) | (x_adv == 1))[changed].all()
    assert (threat.constraint.distance(x_adv, batch.x) > 0).all()


@pytest.mark.parametrize("queries", [1, 2, 3, 10, 60])
@pytest.mark.parametrize(
    "attack, norm",
    [(NES(pairs=4), Linf), (SPSA(pairs=4), L2), (Bandits(), Linf), (SimBA(), Linf), (ZOO(coordinates=3), L2),
     (SparseRS(), L0)],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_surviving_examples_get_nearly_all_queries_and_never_more(attack, norm, queries):
    batch = Batch(torch.full((3, 3, 4, 4), 0.5), torch.zeros(3, dtype=torch.int64), torch.arange(3))
    model = Classifier(Constant((1.0, 0.0)))
    threat = ThreatModel(norm(1.0), queries=queries, access="scores")
    metered = Metered(model, batch, threat)
    attack(metered, batch, threat, rng=RNG)
    assert queries - 2 <= int(metered.spent.queries.min()) <= int(metered.spent.queries.max()) <= queries
