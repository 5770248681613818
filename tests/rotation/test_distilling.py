"""Distilled examples: inputs that look like one and have, on what leaked, the features of another."""

import pytest
import torch
from torch import nn

from holdfast.core.constraints import L1, L2, Linf, allowed
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.rotation import Distilled, Immunise
from holdfast.rotation.collecting import trained_from_fresh_weights
from holdfast.rotation.immunising import watched
from hooks import hooks_of
from rotation.problem import THREAT, accuracy, examples, network, task

DISTILLED = Distilled(examples=300)


@pytest.fixture(scope="module")
def seeds():
    return [trained_from_fresh_weights(task(), Draws(0).at(run)) for run in range(2)]


def features(model, x):
    """What the last layer is given, or the logits."""
    with watched(model) as found, torch.no_grad():
        return found.or_logits(model(x))


def apart(model, made, data):
    """How far the features of examples are from those of the inputs that they were made towards; before, and after."""
    wanted = features(model, data.x[Draws(1).at("others").integers(made.ids, len(data))])
    return [(features(model, x) - wanted).square().flatten(1).sum(1) for x in (data.x[made.ids], made.x)]


@pytest.mark.parametrize("constraint", [Linf(0.1), L2(0.5), L1(3.0)], ids=repr)
def test_they_stay_in_their_ball_and_come_near_the_features_of_another(seeds, constraint):
    data, model = examples(), seeds[0]
    made = DISTILLED([model], data, ThreatModel(constraint), rng=Draws(1))
    known = data.take(made.ids)  # whose ids are their places
    assert len(set(made.ids.tolist())) == len(made) == 300
    assert torch.equal(known.y, made.y), "the label is that of what an example looks like"
    assert allowed(constraint.resized(1.25 * constraint.eps), made.x, known.x, model.bounds).all()
    assert not allowed(constraint, made.x, known.x, model.bounds).all()
    before, after = apart(model, made, data)
    assert (after < before).float().mean() > 0.8, "those that were near at first may be passed by"
    assert after.mean() < 0.8 * before.mean()


def test_each_example_is_compared_with_one_of_the_exposed_sets(seeds):
    data = examples()
    made = DISTILLED(seeds, data, THREAT, rng=Draws(1))
    own, other = (
        after[:150].sum() / before[:150].sum() for before, after in (apart(one, made, data) for one in seeds)
    )
    assert own < other, "the first half was made on the first"
    assert len(Distilled(examples=1)(seeds, data, THREAT, rng=Draws(1))) == 1


def test_the_same_draws_make_the_same_and_the_sets_stay_as_they_are():
    data, model = examples(), trained_from_fresh_weights(task(norm=True), Draws(1)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made, again, other = (DISTILLED([model], data, THREAT, rng=Draws(seed)) for seed in (1, 1, 2))
    assert torch.equal(made.x, again.x)
    assert not torch.equal(made.ids, other.ids)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.grad is None for value in model.parameters())
    assert not hooks_of(model)


def test_without_a_set_or_an_eps_there_is_nothing_to_make(seeds):
    with pytest.raises(UsageError, match="no parameter set was given to immunise against"):
        DISTILLED([], examples(), THREAT, rng=Draws(1))
    with pytest.raises(UsageError, match="Distilled searches for any change within eps, and the threat"):
        DISTILLED(seeds, examples(), ThreatModel(Linf(float("inf"))), rng=Draws(1))


def test_a_set_can_be_trained_on_them(seeds):
    job = task()
    how = Immunise(share=0.5, crafting=DISTILLED)
    made = how(seeds[1], seeds[:1], job.recipe, job.data, THREAT, rng=Draws(1))
    assert not torch.equal(made.net[0].weight, seeds[1].net[0].weight)
    assert accuracy(made, examples(5)) > 0.9


# --- the features


def test_they_are_what_the_last_layer_is_given_in_the_latest_pass():
    model, data = network(), examples(n=16)
    with watched(model) as found:
        for x in (data.x, data.x[:3]):
            torch.testing.assert_close(found.or_logits(model(x)), model.net[:-1](x))


class EachApart(nn.Module):
    """Shows its last layer one example at a time."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(64, 5), nn.Linear(5, 4)

    def forward(self, x):
        return torch.cat([self.last(one[None]) for one in self.first(x.flatten(1))])


def test_a_layer_that_sees_a_part_of_the_batch_is_none():
    data = examples(n=16)
    torch.testing.assert_close(features(Classifier(EachApart()), data.x), data.x.flatten(1))


@pytest.mark.parametrize("net", [lambda x: x[..., :2].flatten(1)[:, :4], nn.Flatten()])
def test_a_network_without_layers_has_its_logits(net):
    data, model = examples(n=64), Classifier(net)
    assert torch.equal(features(model, data.x), model(data.x))
    made = DISTILLED([model], data, THREAT, rng=Draws(1))
    before, after = apart(model, made, data)
    assert after.mean() < before.mean()


def test_no_hook_is_left_where_something_fails():
    model = network()
    with pytest.raises(ZeroDivisionError), watched(model):
        raise ZeroDivisionError
    assert not hooks_of(model)
