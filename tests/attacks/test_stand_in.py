"""StandIn breaks models without any gradient by what it learns from their answers."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from holdfast.attacks import Square, StandIn
from holdfast.attacks.costs import most_queries
from holdfast.attacks.parts.substitutes import SmallNetwork, network_for, soft_targets
from holdfast.attacks.stand_in import LEAST_PASSES
from holdfast.core.batch import Batch
from holdfast.core.constraints import L0, L1, L2, Linf, allowed
from holdfast.core.draws import Draws
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.meter import Metered, margin
from holdfast.core.model import Bounds, Classifier
from holdfast.core.threat import ThreatModel
from holdfast.testing.fakes import Constant, NaNBeyond, examples, labelled, network


class Labels(nn.Module):
    """The nearest of four prototypes of a network's outputs, as a label and computed without torch's gradients."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        outputs = self.net(x.detach()).numpy()
        return F.one_hot(torch.from_numpy(outputs.argmax(1)), outputs.shape[1]).double()


def problem(net=None, *, n=24, eps=0.25, constraint=None, access="scores"):
    model = Classifier(net or Labels(network(0).net)).eval().requires_grad_(False)
    batch = labelled(model, examples(n=n))
    return model, batch, ThreatModel(constraint or Linf(eps), access=access)


def surviving(model, batch, x_adv):
    with torch.no_grad():
        return float((margin(model(x_adv), batch) > 0).double().mean())


@pytest.mark.parametrize(
    ("constraint", "left_by_search"),
    [(Linf(0.25), 0.6), (L2(1.3), 0.6), (L1(7.0), 0.2)],
    ids=["linf", "l2", "l1"],
)
def test_it_breaks_a_model_that_gives_labels_alone(constraint, left_by_search):
    model, batch, threat = problem(constraint=constraint)
    searched = Square(queries=300)(model, batch, threat, rng=Draws(0))
    x_adv = StandIn(passes=300)(model, batch, threat, rng=Draws(0))
    assert allowed(constraint, x_adv, batch.x, model.bounds).all()
    assert surviving(model, batch, searched) >= left_by_search
    assert surviving(model, batch, x_adv) <= 0.15


def test_labels_access_is_enough():
    model, batch, threat = problem(network(0).net, access="labels")
    metered = Metered(model, batch, threat)
    x_adv = StandIn(passes=200)(metered, batch, threat, rng=Draws(0))
    assert surviving(model, batch, x_adv) <= 0.2
    assert int(metered.spent.backwards.max()) == 0


@pytest.mark.parametrize("passes", [1, LEAST_PASSES - 1, LEAST_PASSES])
def test_it_uses_no_more_queries_than_its_setting(passes):
    model, batch, threat = problem(eps=0.01)
    metered, attack = Metered(model, batch, threat), StandIn(passes=passes)
    attack(metered, batch, threat, rng=Draws(0))
    assert int(metered.spent.queries.max()) <= passes == most_queries(attack, threat)


def test_too_few_queries_to_train_search_from_random_points():
    model, batch, threat = problem(network(0).net)
    few = StandIn(passes=LEAST_PASSES - 1)
    assert few.searches
    assert not StandIn(passes=LEAST_PASSES).searches
    searched = Square(queries=few.passes)(model, batch, threat, rng=Draws(0).at("search"))
    assert torch.equal(few(model, batch, threat, rng=Draws(0)), searched)


def test_a_successful_query_is_returned_and_runs_agree():
    model, batch, threat = problem(eps=0.12)
    metered = Metered(model, batch, threat)
    x_adv = StandIn(passes=70)(metered, batch, threat, rng=Draws(0))
    with torch.no_grad():
        assert not (margin(model(x_adv), batch) > 0)[metered.spent.first_success > 0].any()
    assert torch.equal(x_adv, StandIn(passes=70)(model, batch, threat, rng=Draws(0)))


def test_a_target_class_is_reached():
    model, batch, threat = problem(eps=0.5)
    aimed = batch.towards((batch.y + 1) % 4)
    x_adv = StandIn(passes=200)(model, aimed, replace(threat, goal=1), rng=Draws(0))
    assert surviving(model, aimed, x_adv) <= 0.4


@pytest.mark.parametrize("name", ["constant", "NaN", "NaN farther out"])
def test_an_unusual_model_is_attacked_inside_the_ball(name):
    batch = labelled(network(0), examples(n=6))
    net = {
        "constant": Constant((3.0, 1.0, 1.0, 0.0)),
        "NaN": Constant((float("nan"),) * 4),
        "NaN farther out": NaNBeyond(network(0), batch.x, 0.02),
    }[name]
    model, threat = Classifier(net).eval(), ThreatModel(Linf(0.1), access="scores")
    x_adv = StandIn(passes=80)(model, batch, threat, rng=Draws(0))
    assert x_adv.isfinite().all()
    assert allowed(threat.constraint, x_adv, batch.x, model.bounds).all()


def test_a_single_example_and_an_empty_batch_are_attacked():
    model, batch, threat = problem()
    for n in (0, 1):
        part = batch.first(n)
        assert StandIn(passes=80)(model, part, threat, rng=Draws(0)).shape == part.x.shape


def test_l0_and_a_missing_eps_are_refused():
    for constraint in (L0(2), Linf()):
        model, batch, threat = problem(constraint=constraint)
        with pytest.raises(UsageError, match="StandIn"):
            StandIn()(model, batch, threat, rng=Draws(0))


def test_an_error_of_the_model_far_from_the_data_is_raised():
    class Raising(nn.Module):
        def forward(self, x):
            if (x - 0.5).abs().max() > 0.49:
                raise ValueError("out of range")
            return network(0).net(x)

    batch = Batch(
        torch.full((3, 3, 4, 4), 0.5, dtype=torch.float64), torch.zeros(3, dtype=torch.int64), torch.arange(3)
    )
    with pytest.raises(TargetError, match="out of range"):
        StandIn(passes=100)(
            Classifier(Raising()), batch, ThreatModel(Linf(0.5), access="scores"), rng=Draws(0)
        )


@pytest.mark.parametrize("shape", [(24,), (2, 12), (1, 5, 7), (3, 64, 64), (4, 6000), (2, 3, 4, 5)])
def test_a_network_fits_inputs_of_every_shape(shape):
    assert network_for(shape, 5)(torch.rand(2, *shape)).shape == (2, 5)


def test_a_small_network_learns_answers_of_any_scale_and_ignores_nan():
    x = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))
    for scale in (1e-4, 1.0, 1e4):
        answers = scale * torch.stack((x[:, 0], x[:, 1], torch.zeros(400)), 1)
        answers[:3] = torch.nan
        learned = SmallNetwork(x, 3, Bounds(), Draws(0))
        learned.add(x, answers)
        learned.train(200)
        right = learned(x[3:]).argmax(1) == answers[3:].argmax(1)
        assert right.double().mean() >= 0.95


def test_targets_are_probabilities_that_agree_with_the_labels():
    targets = soft_targets(torch.tensor([[0.0, 1.0, 0.0], [5.0, 4.0, 0.0]]))
    assert torch.allclose(targets.sum(1), torch.ones(2))
    assert targets.argmax(1).tolist() == [1, 0]
    assert targets[1, 1] > targets[1, 2]
