"""Laws of every recipe, for `pytest.mark.parametrize`, which also apply to recipes of other packages."""

from dataclasses import replace

import torch

from holdfast.core.batch import Batch
from holdfast.core.checkpoint import WEIGHTS, Checkpoint
from holdfast.core.constraints import Linf
from holdfast.core.draws import Draws
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.ops.fit import Training
from holdfast.ops.recipe import Recipe, trained_as
from holdfast.testing.fakes import examples, labelled, network

SHORT = Training(epochs=3, batch=8, optimizer="sgd", lr=0.05, schedule="cosine", average=0.9)
"""settings of a training that changes the weights measurably within a fraction of a second"""


def _problem(seed: int = 0) -> tuple[Classifier, Batch]:
    """Return a network, and examples labelled by another network that agrees with it on most of them."""
    teacher, student, stranger = network(seed), network(seed), network(seed + 1)
    with torch.no_grad():
        for weight, other in zip(student.parameters(), stranger.parameters(), strict=True):
            weight.lerp_(other, 0.3)
    return student.requires_grad_(), labelled(teacher, examples(seed, n=26))


def _run(
    recipe: Recipe, model: Classifier, data: Batch, eps: float, seed: int = 0, after: Checkpoint | None = None
) -> list[Checkpoint]:
    return list(trained_as(recipe, SHORT)(model, data, _threat(eps), rng=Draws(seed), after=after))


_SURROGATE = network(5)


def _threat(eps: float) -> ThreatModel:
    return ThreatModel(Linf(eps), surrogates=(_SURROGATE,))


def same(one: Checkpoint, other: Checkpoint) -> bool:
    """Return whether two checkpoints are bitwise equal."""
    names = one.tensors.keys() == other.tensors.keys()
    return names and all(torch.equal(value, other.tensors[name]) for name, value in one.tensors.items())


def leaves_the_model_alone(recipe: Recipe) -> None:
    """Check that weights, mode and `requires_grad` of the given model do not change, and that the new model differs
    from it.
    """
    model, data = _problem()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, y = data.x.clone(), data.y.clone()
    last = _run(recipe, model, data, 0.05)[-1]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training and all(weight.requires_grad for weight in model.parameters())
    assert all(weight.grad is None for weight in model.parameters())
    assert torch.equal(data.x, x) and torch.equal(data.y, y)
    assert any(not torch.equal(last.tensors[WEIGHTS + name], value) for name, value in before.items())


def repeats_itself(recipe: Recipe) -> None:
    """Check that equal seeds give equal weights, and different seeds different ones."""
    model, data = _problem()
    one, again, other = (_run(recipe, model, data, 0.05, seed)[-1] for seed in (0, 0, 1))
    assert same(one, again)
    assert not same(one, other)


def goes_on_exactly(recipe: Recipe) -> None:
    """Check that training resumed from any checkpoint is bitwise equal to training without interruption."""
    model, data = _problem()
    whole = _run(recipe, model, data, 0.05)
    assert [checkpoint.epoch for checkpoint in whole] == [1, 2, 3]
    for stopped in whole[:-1]:
        rest = _run(recipe, model, data, 0.05, after=stopped)
        assert [checkpoint.epoch for checkpoint in rest] == list(range(stopped.epoch + 1, 4))
        assert all(same(one, other) for one, other in zip(rest, whole[stopped.epoch :], strict=True))


def draws_from_its_own_seed(recipe: Recipe) -> None:
    """Check that torch's own generator does not affect the result and is not changed."""
    model, data = _problem()
    torch.manual_seed(1)
    one = _run(recipe, model, data, 0.05)[-1]
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    other = _run(recipe, model, data, 0.05)[-1]
    assert same(one, other)
    torch.manual_seed(1)
    assert torch.equal(state, torch.random.get_rng_state())


def learns(recipe: Recipe) -> None:
    """Check that the loss decreases from the first to the last epoch, and that the new model is correct on more
    examples.
    """
    model, data = _problem()
    longer = replace(SHORT, epochs=12)
    found = list(trained_as(recipe, longer)(model, data, _threat(0.01), rng=Draws(0)))
    assert found[-1].measured["loss"] < found[0].measured["loss"]
    with torch.no_grad():
        before = (model(data.x).argmax(1) == data.y).sum()
        found[-1].put_into(model)
        assert (model(data.x).argmax(1) == data.y).sum() > before


RECIPE_LAWS = (
    leaves_the_model_alone,
    repeats_itself,
    goes_on_exactly,
    draws_from_its_own_seed,
    learns,
)
"""all laws of recipes"""
