"""Immunising: what leaked breaks less of what comes after, and every recipe takes the term."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from holdfast import recipes
from holdfast.attacks import PGD
from holdfast.core.constraints import Linf
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.recipes.training.fit import Training, fit
from holdfast.recipes.training.losses import Immunity
from holdfast.rotation import Crafting, Immunise, chain, loaded
from holdfast.rotation.collecting import trained_from_fresh_weights
from rotation.problem import THREAT, accuracy, examples, network, task

CRAFTING = Crafting(examples=300)


@pytest.fixture(scope="module")
def seeds():
    return [trained_from_fresh_weights(task(), Draws(0).at(run)) for run in range(2)]


def broken(target: Classifier, source: Classifier, eps: float) -> float:
    """Share of unseen inputs, right at first, that examples made on `source` turn wrong in `target`."""
    held = examples(5)
    threat = replace(THREAT, constraint=THREAT.constraint.resized(eps))
    x_adv = PGD(steps=20)(source, held, threat, rng=Draws(3))
    with torch.no_grad():
        right = target(held.x).argmax(1) == held.y
        return (target(x_adv).argmax(1) != held.y)[right].float().mean().item()


@pytest.mark.slow
def test_an_exposed_set_breaks_fewer_than_before(seeds):
    old, fresh = seeds
    job = task()

    def immunised(weight):
        how = Immunise(share=1.0, weight=weight, lr=5e-3, crafting=Crafting(examples=512))
        return how(fresh, [old], job.recipe, job.data, THREAT, rng=Draws(1))

    made, again, without = immunised(1.0), immunised(1.0), immunised(1e-9)
    assert torch.equal(again.net[0].weight, made.net[0].weight)
    assert not made.training
    assert broken(made, old, 0.1) < 0.8 * broken(fresh, old, 0.1)
    assert broken(made, old, 0.1) < 0.8 * broken(without, old, 0.1)  # and that is not for training on
    assert accuracy(made, examples(5)) > accuracy(fresh, examples(5)) - 0.03
    assert not torch.equal(fresh.net[0].weight, made.net[0].weight)


def test_examples_are_made_of_training_inputs_within_their_ball_and_shared_out(seeds):
    data = examples()
    made = CRAFTING(seeds, data, THREAT, rng=Draws(1))
    assert len(made) == 300
    assert len(set(made.ids.tolist())) == 300
    known = data.take(made.ids)  # whose ids are their places
    assert torch.equal(known.y, made.y)
    assert (made.x - known.x).abs().max() <= 0.125 + 1e-6
    assert (made.x - known.x).abs().max() > 0.12
    assert made.x.min() >= 0
    assert made.x.max() <= 1
    half = made.take(torch.arange(150))
    with torch.no_grad():
        own, other = ((model(half.x).argmax(1) != half.y).float().mean() for model in seeds)
    assert own > other  # the first half was made on the first
    few = Crafting(examples=1)(seeds, data, THREAT, rng=Draws(1))
    assert len(few) == 1  # fewer than there are sets
    with pytest.raises(
        UsageError, match="Crafting searches for any change within eps, and the threat model linf has no"
    ):
        CRAFTING(seeds, data, ThreatModel(Linf(float("inf"))), rng=Draws(1))
    with pytest.raises(UsageError, match="no parameter set was given to immunise against"):
        CRAFTING([], data, THREAT, rng=Draws(1))


@pytest.mark.slow
def test_the_served_model_is_frozen_and_can_be_used_in_trainings():
    job = task(norm=True)
    served = loaded(job.model, trained_from_fresh_weights(job, Draws(1)).net.state_dict(), "served")
    exposed = trained_from_fresh_weights(job, Draws(2)).train()
    before = exposed.net[1].running_mean.clone()
    how = Immunise(share=0.2, crafting=Crafting(examples=60))
    made = how(served, [exposed], job.recipe, job.data, THREAT, rng=Draws(1))
    assert not torch.equal(made.net[0].weight, served.net[0].weight)
    assert not next(served.parameters()).requires_grad
    assert torch.equal(exposed.net[1].running_mean, before)
    assert accuracy(made, examples(5)) > 0.9


def test_the_term_is_the_weighted_cross_entropy_of_drawn_examples():
    model, data = network(), examples(n=40)
    term = Immunity(data, weight=0.25, batch=16)
    value = term(model, Draws(4))
    rows = Draws(4).at("immunity").integers(torch.arange(16), 40)
    torch.testing.assert_close(value, 0.25 * F.cross_entropy(model(data.x[rows]), data.y[rows]))
    assert not torch.equal(term(model, Draws(5)), value)
    assert Training(immunity=term) == Training(immunity=term) != Training(immunity=Immunity(data))
    assert len(repr(Training(immunity=term))) < 1_000


def test_a_training_adds_it_to_its_own_loss():
    data, found = examples(n=64), {}
    for immunity in (None, Immunity(examples(3, n=32))):
        model = network().requires_grad_()
        how = Training(epochs=1, batch=64, averaging="none", immunity=immunity)
        only = fit(
            model,
            data,
            lambda batch, turn: batch.x,
            lambda batch, x, model=model: (F.cross_entropy(model(x), batch.y), torch.zeros(())),
            how,
            rng=Draws(0),
        )
        found[immunity] = next(iter(only)).measured["loss"]
    (bare, own), term = found.items(), Immunity(examples(3, n=32))
    added = term(network(), Draws(0).at(0, 0))
    assert own[1] == pytest.approx(bare[1] + added.item(), rel=1e-5)


@pytest.mark.parametrize(
    "kind", [recipes.TRADES, recipes.PGDTraining, recipes.SingleStep, recipes.ATTA, recipes.VAT]
)
def test_every_recipe_takes_it(kind):
    data, ends = examples(n=64), []
    for immunity in (None, Immunity(examples(3, n=32))):
        recipe = kind(training=Training(epochs=1, batch=16, immunity=immunity))
        (only,) = recipe(network().requires_grad_(), data, THREAT, rng=Draws(0))
        assert all(value.isfinite().all() for value in only.tensors.values())
        ends.append(only.tensors["weights.net.0.weight"])
    assert not torch.equal(*ends)


def test_a_chain_remembers_its_last_sets(seeds):
    job = task(robust=True)
    short = Immunise(share=0.2, crafting=Crafting(examples=60))
    line = chain(seeds[0], 3, short, job.recipe, job.data, THREAT, remembered=2, rng=Draws(2))
    assert len(line) == 4
    assert line[0] is seeds[0]
    last = short(line[2], line[1:3], job.recipe, job.data, THREAT, rng=Draws(2).at("rotation", 2))
    assert torch.equal(last.net[0].weight, line[3].net[0].weight)
