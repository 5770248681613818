"""APGD: its cost, its targets, its stages, and what it does where gradients fail."""

import math

import pytest
import torch
from torch import nn

from holdfast.attacks import APGD
from holdfast.attacks.parts.ascent import Climb, surface
from holdfast.attacks.parts.losses import cross_entropy, dlr, likeliest, margin_loss
from holdfast.core.batch import Batch
from holdfast.core.constraints import L1, L2, Linf, allowed
from holdfast.core.draws import Draws
from holdfast.core.meter import Metered, margin
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.testing.fakes import Constant, examples, labelled, linear_problem, network

RNG = Draws(3)


# aimed at every class, for the loss of a single one has no other summit on a linear model
AIMED = [APGD(loss=loss, targets=3) for loss in (cross_entropy, dlr, margin_loss)]


@pytest.mark.parametrize(
    "attack",
    [*AIMED, APGD(loss=dlr, targets=3, shrink=True)],
    ids=["cross-entropy", "dlr", "margin", "shrinking"],
)
@pytest.mark.parametrize("norm", [Linf, L2, L1])
def test_breaks_a_linear_model_beyond_the_exact_distance_and_only_there(attack, norm):
    model, batch = linear_problem(1, classes=4, features=60)
    exact = model.distance(batch.x, batch.y, norm())
    eps = exact[exact < math.inf].median().item()
    threat = ThreatModel(norm(eps))
    x_adv = attack(model, batch, threat, rng=RNG)
    assert allowed(threat.constraint, x_adv, batch.x, model.bounds).all()
    broken = margin(model(x_adv), batch) <= 0
    assert not broken[exact > 1.001 * eps].any()
    assert broken[exact < (0.8 if norm is L1 else 0.95) * eps].all()


def test_a_standing_example_costs_one_forward_more_than_its_steps():
    model = network()
    batch = labelled(model, examples())
    threat = ThreatModel(Linf(1e-6))
    for attack, starts in ((APGD(steps=7), 1), (APGD(loss=dlr, steps=7, targets=2, restarts=3), 6)):
        metered = Metered(model, batch, threat)
        attack(metered, batch, threat, rng=RNG)
        ranking = 1 if attack.targets else 0
        assert (metered.spent.queries == starts * 8 + ranking).all()
        assert (metered.spent.backwards == starts * 7).all()


def test_the_draws_of_a_random_model_are_all_counted():
    model, batch = network(), examples()
    threat = ThreatModel(Linf(1e-6))
    batch = labelled(model, batch)
    metered = Metered(model, batch, threat)
    APGD(steps=3, draws=5)(metered, batch, threat, rng=RNG)
    assert (metered.spent.queries == 20).all()
    assert (metered.spent.backwards == 15).all()


@pytest.mark.parametrize("wrong, breaks", [(2, False), (3, True)])
def test_more_than_half_of_the_draws_must_be_wrong(wrong, breaks):
    calls = iter(range(10**6))

    class Fickle(nn.Module):
        def forward(self, x):
            sign = -1.0 if next(calls) % 4 < wrong else 1.0
            return torch.stack((x.sum(1) * 0 + sign, x.sum(1) * 0), dim=1)

    model, batch = (
        Classifier(Fickle()),
        Batch(torch.full((2, 3), 0.5), torch.zeros(2).long(), torch.arange(2)),
    )
    start = batch.x.clone()
    _, height = Climb(cross_entropy, steps=1, draws=4)(model, batch, None, start, Linf(0.1))
    assert (height <= 0).all() == breaks


def test_a_broken_example_leaves():
    model = network()
    batch = labelled(model, examples())
    threat = ThreatModel(Linf(0.5))
    metered = Metered(model, batch, threat)
    x_adv = APGD(steps=50)(metered, batch, threat, rng=RNG)
    broken = margin(model(x_adv), batch) <= 0
    assert broken.any()
    assert (metered.spent.queries[broken] == metered.spent.first_success[broken]).all()


@pytest.mark.parametrize("classes", [2, 3, 4, 8, 1000])
def test_there_are_at_most_as_many_targets_as_wrong_classes(classes):
    model = network(classes=classes)
    batch = labelled(model, examples(n=3))
    metered = Metered(model, batch, threat := ThreatModel(Linf(1e-7)))
    APGD(loss=dlr, steps=2, targets=9)(metered, batch, threat, rng=RNG)
    assert (metered.spent.queries == 1 + 3 * min(classes - 1, 9)).all()


def test_targets_are_ranked_by_the_clean_logits():
    logits = torch.tensor([[5.0, 1.0, 3.0, 2.0], [0.0, 9.0, 8.0, 8.5]])
    assert likeliest(logits, torch.tensor([0, 1]), 2).tolist() == [[2, 3], [3, 2]]
    assert likeliest(logits, torch.tensor([0, 1]), 9).shape == (2, 3)


@pytest.mark.parametrize("attack", [APGD(), APGD(loss=dlr, targets=3)], ids=["apgd", "apgd-t"])
def test_a_goal_is_what_it_aims_at(attack):
    model = network()
    batch = labelled(model, examples(n=12))
    batch = batch.towards((batch.y + 1) % 4)
    x_adv = attack(model, batch, ThreatModel(Linf(0.9)), rng=RNG)
    assert (model(x_adv).argmax(1) == batch.target).double().mean() > 0.9


def test_shrinking_balls_end_inside_the_last():
    model = network()
    batch = labelled(model, examples())
    for steps in (1, 2, 10):
        x_adv = APGD(steps=steps, shrink=True)(model, batch, ThreatModel(L1(0.3)), rng=RNG)
        assert allowed(L1(0.3), x_adv, batch.x, model.bounds).all()
        assert (x_adv != batch.x).any()


@pytest.mark.parametrize("norm", [Linf, L2, L1])
def test_it_starts_on_the_surface(norm):
    batch = examples().at(torch.full((21, 3, 4, 4), 0.5, dtype=torch.float64))
    start = surface(batch, norm(0.1), network().bounds, RNG)
    torch.testing.assert_close(norm().distance(start, batch.x), torch.full((21,), 0.1, dtype=torch.float64))


class RootOfDistance(nn.Module):
    """Its gradient is infinite at the points where the clean inputs are."""

    def forward(self, x):
        return torch.stack((0.1 - (x - x.detach()).flatten(1).abs().sum(1).sqrt(), x.flatten(1)[:, 0]), dim=1)


@pytest.mark.parametrize("net", [RootOfDistance(), Constant((1.0, 0.0, 0.0))])
@pytest.mark.parametrize("norm", [Linf, L2, L1])
def test_gradients_that_are_no_numbers_stay_out(net, norm):
    model, batch = Classifier(net), examples(n=4)
    x_adv = APGD(steps=5)(model, batch, ThreatModel(norm(0.05)), rng=RNG)
    assert allowed(norm(0.05), x_adv, batch.x, model.bounds).all()


def test_results_of_an_example_do_not_depend_on_its_batch():
    model = network()
    batch = labelled(model, examples())
    threat, attack = ThreatModel(L2(0.4)), APGD(loss=dlr, steps=12, targets=2)
    whole = attack(model, batch, threat, rng=RNG)
    rows = torch.tensor([11, 2, 5])
    torch.testing.assert_close(attack(model, batch.take(rows), threat, rng=RNG), whole[rows])
