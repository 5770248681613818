"""RayS: labels are enough, every query counts, and the rays only get shorter."""

import torch

from holdfast.attacks import RayS
from holdfast.core.batch import Batch
from holdfast.core.constraints import Linf
from holdfast.core.draws import Draws
from holdfast.core.meter import Metered
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.testing.fakes import examples, labelled, linear_problem, network

RNG = Draws(3)
FREE = ThreatModel(Linf(torch.inf), access="labels")


def distances(queries, seed=0, **settings):
    model, batch = linear_problem(seed, classes=2)
    x_adv = RayS(queries=queries, **settings)(Metered(model, batch, FREE), batch, FREE, rng=RNG)
    return (
        torch.where((x_adv != batch.x).flatten(1).any(1), Linf().distance(x_adv, batch.x), torch.inf),
        model,
        batch,
    )


def test_more_queries_come_nearer_to_the_exact_distance():
    few, some, many = (distances(queries)[0] for queries in (10, 60, 500))
    assert (some <= few).all() and (many <= some).all() and (many < few).any()
    _, model, batch = distances(1)
    exact = model.distance(batch.x, batch.y, Linf())
    assert (many <= 1.01 * exact).all() and (many >= 0.999 * exact).all()


def test_only_labels_are_queried_within_the_budget():
    model = network(0)
    batch = labelled(model, examples(0, n=12))
    for queries in (1, 7, 40):
        threat = ThreatModel(Linf(torch.inf), access="labels", queries=queries)
        metered = Metered(model, batch, threat)
        RayS()(metered, batch, threat, rng=RNG)  # BudgetSpent would be raised by one query too many
        assert metered.spent.queries.max() == queries
    metered = Metered(model, batch, FREE)
    RayS(queries=25)(metered, batch, FREE, rng=RNG)
    assert metered.spent.queries.max() == 25 and not metered.spent.backwards.any()


def test_an_example_leaves_once_it_is_broken_inside_eps():
    _, model, batch = distances(1)
    wide = ThreatModel(Linf(0.9), access="labels")
    metered = Metered(model, batch, wide)
    RayS(queries=500)(metered, batch, wide, rng=RNG)
    assert (metered.spent.first_success > 0).all()
    assert torch.equal(metered.spent.queries, metered.spent.first_success)


def test_signs_are_drawn_anew_where_no_block_breaks_the_model():
    weights = torch.tensor([1.0, -1.0] * 6)
    model = Classifier(
        lambda x: (x - 0.5) @ torch.stack((weights, 0 * weights), 1) + torch.tensor([1.5, 0.0])
    )
    batch = Batch(torch.full((5, 12), 0.5), torch.zeros(5, dtype=torch.int64), torch.arange(5))
    x_adv = RayS(queries=400)(Metered(model, batch, FREE), batch, FREE, rng=RNG)
    assert (model(x_adv).argmax(1) == 1).all()
    some = batch.take(torch.tensor([3, 1]))
    assert torch.equal(RayS(queries=400)(Metered(model, some, FREE), some, FREE, rng=RNG), x_adv[[3, 1]])


def test_a_search_that_ends_early_moves_on_sooner():
    rough, fine = distances(40, precision=0.2)[0], distances(400, precision=0.2)[0]
    assert (fine <= rough).all() and (fine < 0.9 * rough).any()
