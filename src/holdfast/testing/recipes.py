"""Tests of properties that every recipe must have, for `pytest.mark.parametrize`. They also apply to recipes of other
packages.
"""

import math
from dataclasses import replace
from operator import itemgetter

import torch
from torch import nn
from torch.utils.data import TensorDataset

from holdfast.core.batch import Batch, TrainingData
from holdfast.core.constraints import Linf
from holdfast.core.draws import Draws
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.training import WEIGHTS, Checkpoint
from holdfast.io.data.loaders import Source
from holdfast.io.data.streamed import Streamed
from holdfast.io.models.composed import with_denoiser
from holdfast.recipes import Denoising, MaskedPatches
from holdfast.recipes.training.fit import Training, drawing
from holdfast.recipes.training.recipe import Recipe, facts_of, trained_as
from holdfast.testing.fakes import SHAPE, examples, labelled, network
from holdfast.threats.transformations import Patch
from holdfast.threats.triggers import Stamped, Trigger, trigger_text

SHORT = Training(epochs=3, batch=8, optimizer="sgd", lr=0.05, schedule="cosine", average=0.9)
"""settings of a training that changes the weights measurably within a fraction of a second"""


def _problem(recipe: Recipe, seed: int = 0) -> tuple[Classifier, Batch]:
    """Return a network, and examples labelled by another network that agrees with it on most of them. For a recipe that
    trains a denoiser the network has one.
    """
    teacher, student, stranger = network(seed), network(seed), network(Draws(seed).at("stranger").seed)
    with torch.no_grad():
        for weight, foreign in zip(student.parameters(), stranger.parameters(), strict=True):
            weight.lerp_(foreign, 0.3)
    student.requires_grad_()
    if isinstance(recipe, Denoising):
        assert isinstance(student.net, nn.Module)
        with drawing(Draws(seed).at("denoiser")):
            student.net = with_denoiser(student.net, {"channels": SHAPE[0], "width": 4, "depth": 2}).eval()
    return student, labelled(teacher, examples(seed, n=26))


def _run(
    recipe: Recipe,
    model: Classifier,
    data: TrainingData,
    eps: float,
    seed: int = 0,
    after: Checkpoint | None = None,
) -> list[Checkpoint]:
    return list(trained_as(recipe, SHORT)(model, data, threat_for(recipe, eps), rng=Draws(seed), after=after))


_SURROGATE = network(5)
_TRIGGER = Trigger((torch.arange(math.prod(SHAPE)).view(SHAPE) < 4).double(), torch.ones(SHAPE), 0)


def threat_for(recipe: Recipe, eps: float) -> ThreatModel:
    """Return the threat model of the laws for a recipe: a ball, or a trigger or a patch if the recipe is for those."""
    if isinstance(recipe, MaskedPatches):
        return ThreatModel(Patch(2, 2))
    if facts_of(recipe).goal.metric == "trigger_success_rate":
        return ThreatModel(Stamped("trigger.npz", trigger_text(_TRIGGER)), goal=0)
    return ThreatModel(Linf(eps), surrogates=(_SURROGATE,))


def same(first: Checkpoint, second: Checkpoint) -> bool:
    """Return whether all tensors of two checkpoints are bitwise equal."""
    names = first.tensors.keys() == second.tensors.keys()
    return names and all(torch.equal(value, second.tensors[name]) for name, value in first.tensors.items())


def does_not_change_the_model(recipe: Recipe) -> None:
    """Check that a recipe does not change weights, mode and `requires_grad` of the given model, and that the new model
    differs from it.
    """
    model, data = _problem(recipe)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [weight.requires_grad for weight in model.parameters()]
    x, y = data.x.clone(), data.y.clone()
    last = _run(recipe, model, data, 0.05)[-1]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training and [weight.requires_grad for weight in model.parameters()] == gradients
    assert all(weight.grad is None for weight in model.parameters())
    assert torch.equal(data.x, x) and torch.equal(data.y, y)
    assert any(not torch.equal(last.tensors[WEIGHTS + name], value) for name, value in before.items())


def is_reproducible(recipe: Recipe) -> None:
    """Check that a recipe trains equal weights from equal seeds, whether the examples are in memory or are read by
    index, and different weights from different seeds.
    """
    model, data = _problem(recipe)
    first, of_other_seed = (_run(recipe, model, data, 0.05, seed)[-1] for seed in (0, 1))
    repeated = _run(recipe, model, _by_index(data), 0.05)[-1]
    assert same(first, repeated)
    assert not same(first, of_other_seed)


def _by_index(data: Batch) -> Streamed:
    """Return the same examples, whose inputs are read when they are used."""
    source = Source(TensorDataset(data.x))
    places = tuple(range(len(data)))
    return Streamed(source, itemgetter(0), places, data.y, data.ids, data.fingerprints(), data.example_shape)


def resumes_exactly(recipe: Recipe) -> None:
    """Check that a training that is resumed from any of its checkpoints ends bitwise equal to a training without
    interruption.
    """
    model, data = _problem(recipe)
    uninterrupted = _run(recipe, model, data, 0.05)
    assert [checkpoint.epoch for checkpoint in uninterrupted] == [1, 2, 3]
    for stopped in uninterrupted[:-1]:
        resumed = _run(recipe, model, data, 0.05, after=stopped)
        assert [checkpoint.epoch for checkpoint in resumed] == list(range(stopped.epoch + 1, 4))
        assert all(
            same(checkpoint, expected)
            for checkpoint, expected in zip(resumed, uninterrupted[stopped.epoch :], strict=True)
        )


def does_not_use_global_randomness(recipe: Recipe) -> None:
    """Check that the result of a recipe does not depend on the global random generator of PyTorch, and that the recipe
    does not change its state.
    """
    model, data = _problem(recipe)
    torch.manual_seed(1)
    first = _run(recipe, model, data, 0.05)[-1]
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    second = _run(recipe, model, data, 0.05)[-1]
    assert same(first, second)
    torch.manual_seed(1)
    assert torch.equal(state, torch.random.get_rng_state())


def learns(recipe: Recipe) -> None:
    """Check that training with a recipe lowers the loss from the first to the last epoch, and that the new model
    classifies more examples correctly.
    """
    model, data = _problem(recipe)
    longer = replace(SHORT, epochs=12)
    checkpoints = list(trained_as(recipe, longer)(model, data, threat_for(recipe, 0.01), rng=Draws(0)))
    assert checkpoints[-1].measured["loss"] < checkpoints[0].measured["loss"]
    with torch.no_grad():
        n_correct_before = (model(data.x).argmax(1) == data.y).sum()
        new = facts_of(recipe).network(model)
        checkpoints[-1].put_into(new)
        assert (new(data.x).argmax(1) == data.y).sum() > n_correct_before


RECIPE_LAWS = (
    does_not_change_the_model,
    is_reproducible,
    resumes_exactly,
    does_not_use_global_randomness,
    learns,
)
"""all laws of recipes"""
