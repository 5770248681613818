"""Hypernetwork of the benchmarks: its sets fit the model and depend on the random numbers alone."""

import pytest
import torch

from benchmarks.hypernetwork import Diversified
from holdfast.core.draws import Draws
from holdfast.rotation import put, weights_of
from rotation.problem import THREAT, examples, network


@pytest.mark.parametrize("diversity", ["none", "outputs", "transfer"])
def test_generated_sets_fit_the_model_and_depend_on_the_random_numbers_alone(diversity):
    model, data = network(), examples()
    before = weights_of(model)
    settings = Diversified(sets=2, batch=8, updates=3, diversity=diversity)
    first, second = (settings(model, data, THREAT, rng=Draws(0)).drawn(2, Draws(1)) for _ in range(2))
    for name, value in first.tensors.items():
        assert torch.equal(value, second.tensors[name]), name
    logits = [put(model, first.one(k))(data.x) for k in range(2)]
    assert not torch.allclose(*logits)
    assert all(torch.equal(value, before[name]) for name, value in weights_of(model).items())


def test_settings_without_seconds_are_planned_as_they_are():
    settings = Diversified(updates=3)
    assert settings.planned(network(), examples(), THREAT, rng=Draws(0)) is settings


def test_a_budget_that_the_trial_updates_exceed_leaves_one_update():
    settings = Diversified(sets=2, batch=8, seconds=1e-6)
    planned = settings.planned(network(), examples(), THREAT, rng=Draws(0))
    assert (planned.updates, planned.seconds) == (1, None)
