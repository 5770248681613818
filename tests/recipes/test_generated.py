"""Adversarial training on generated images: the generator, its filter, files of the user, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from holdfast.core.batch import Batch
from holdfast.core.constraints import Linf
from holdfast.core.draws import Draws
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.model import Bounds
from holdfast.core.threat import ThreatModel
from holdfast.core.training import STATE, without_prefix
from holdfast.io.data.loaders import as_data
from holdfast.recipes import GeneratedData, Standard
from holdfast.recipes.generated import FileSamples, copies
from holdfast.recipes.training import fit
from holdfast.recipes.training.fit import Saving
from holdfast.recipes.training.gans import GAN
from holdfast.recipes.training.recipe import Finished
from holdfast.runs.harden.held_out import refuse_judged
from holdfast.testing import fakes
from holdfast.testing.recipes import SHORT, same

THREAT = ThreatModel(Linf(0.05))
MODEL = fakes.network(1).requires_grad_()


def data(n=26, shape=fakes.SHAPE):
    return fakes.labelled(fakes.network(shape=shape), fakes.examples(n=n, shape=shape))


def squares(n=256):
    """Images of two classes: a bright left or a bright right half, with noise."""
    rng, ids = Draws(0), torch.arange(n)
    x = 0.2 * rng.uniform(ids, 1, 8, 8)
    y = ids % 2
    x[y == 0, :, :, :4] += 0.7
    x[y == 1, :, :, 4:] += 0.7
    return Batch(x, y, ids)


@pytest.fixture
def untrained_accepted(set_limit):
    """A generator that was hardly trained counts as usable."""
    set_limit("holdfast.recipes.generated._FEW", 0.0)
    set_limit("holdfast.recipes.generated._ALIKE", 0.0)


@pytest.mark.parametrize("method", ["pgd", "trades"])
def test_training_on_samples_resumes_exactly(method, untrained_accepted):
    kept = []
    recipe = GeneratedData(steps=2, method=method, generator=0.4, confidence=0.0, training=SHORT)
    saving = replace(recipe, training=replace(SHORT, saving=Saving(2, kept.append)))
    whole = [*recipe(MODEL, data(), THREAT, rng=Draws(0))]
    assert [same(*pair) for pair in zip(saving(MODEL, data(), THREAT, rng=Draws(0)), whole, strict=True)]
    for after in (*whole[:-1], *kept):
        *_, last = recipe(MODEL, data(), THREAT, rng=Draws(0), after=after)
        assert same(last, whole[-1])
    accepted, tried = whole[-1].tensors[STATE + "counts"][0].tolist()
    assert accepted == tried > 0  # every sample has a confidence of at least 0


def test_the_generator_learns_the_classes_and_its_samples_depend_on_their_place_only():
    batch = squares()
    gan = GAN(batch.x, 2, Bounds(), Draws(0))
    for k in range(250):
        rows = Draws(k).bits(batch.ids).argsort()[:32]
        gan.update(batch.take(rows), Draws(1).at(k))
    x, is_accepted = gan.accepted(batch, Draws(2), 0.5)
    assert is_accepted.double().mean() > 0.9
    bright_left = x[:, 0, :, :4].mean((1, 2)) > x[:, 0, :, 4:].mean((1, 2))
    assert ((batch.y == 0) == bright_left)[is_accepted].double().mean() > 0.9
    assert x.min() >= 0 and x.max() <= 1
    part = gan.samples(batch.ids[5:9], batch.y[5:9], Draws(3))
    torch.testing.assert_close(part, gan.samples(batch.ids, batch.y, Draws(3))[5:9])


def test_the_state_of_a_generator_is_restored_exactly():
    batch = squares(32)
    first, second = (GAN(batch.x, 2, Bounds(), Draws(seed)) for seed in (0, 1))
    first.update(batch, Draws(0))
    second.restore({name: value.clone() for name, value in first.state().items()})
    for gan in (first, second):
        gan.update(batch, Draws(1))
    assert int(second.updates) == 2
    assert all(torch.equal(value, second.state()[name]) for name, value in first.state().items())


def test_a_collapsed_generator_stops_the_training_except_when_updates_are_only_timed():
    recipe = GeneratedData(steps=1, generator=0.0, training=SHORT)
    with pytest.raises(
        TargetError, match="after 0 updates the generator gives too few usable images: the class"
    ):
        [*recipe(MODEL, data(), THREAT, rng=Draws(0))]
    with pytest.raises(TargetError, match="two samples of a class are . % as far apart as two real images"):
        [*replace(recipe, confidence=0.0)(MODEL, data(), THREAT, rng=Draws(0))]
    assert [*replace(recipe, training=replace(SHORT, trial=True))(MODEL, data(), THREAT, rng=Draws(0))]


def test_without_generated_images_it_is_adversarial_training_on_the_real_ones(untrained_accepted):
    threat = ThreatModel(Linf(0.0))
    recipe = GeneratedData(share=0.0, generator=0.0, clean=0.0, training=SHORT)
    one = [*recipe(MODEL, data(), threat, rng=Draws(0))][-1]
    other = [*Standard(training=SHORT)(MODEL, data(), threat, rng=Draws(0))][-1]
    for name, value in other.tensors.items():
        torch.testing.assert_close(value, one.tensors[name])


def test_trades_is_chosen_for_as_many_epochs_as_auto_requires():
    def is_trades(epochs, channels, method="auto"):
        how = fit.Training(epochs=epochs)
        return GeneratedData(method=method, training=how)._is_trades(data(shape=(channels, 4, 4)))

    assert [is_trades(*case) for case in ((59, 1), (60, 1), (29, 3), (30, 3))] == [False, True, False, True]
    assert is_trades(1, 1, "trades") and not is_trades(100, 1, "pgd")


def test_images_of_a_file_replace_images_of_their_class(tmp_path):
    batch, path = data(), tmp_path / "generated.npz"
    more = data(80)
    np.savez(path, x=more.x.flip(3).numpy(), y=more.y.numpy())
    recipe = GeneratedData(samples=str(path), steps=1, training=SHORT)
    images = recipe.further_examples(MODEL)
    source = FileSamples.of(images, batch)
    x, is_accepted = source.accepted(batch, Draws(0), 1.0)
    assert is_accepted.all()
    rows = [(images.x == each).flatten(1).all(1).nonzero()[0, 0] for each in x]
    assert torch.equal(images.y[torch.stack(rows)], batch.y)
    *_, last = recipe(MODEL, batch, THREAT, rng=Draws(0))
    accepted, tried = last.tensors[STATE + "counts"][0].tolist()
    assert 0.5 < tried / (3 * 24) < 0.9 and accepted == tried
    assert "gan.updates" not in without_prefix(last.tensors, STATE)
    state = without_prefix(last.tensors, STATE)
    entry, note = recipe.follow_up(Finished(MODEL, MODEL, None, batch, data(9), THREAT, Draws(0), state))
    assert entry["copies"]["generated"] == 80 and f"replaced {accepted} of the {tried} images" in note


def test_a_file_with_other_images_or_without_a_class_or_with_test_images_is_refused():
    batch = data()
    with pytest.raises(
        UsageError, match=r"generated images have shape \(3, 5, 5\), and the training examples"
    ):
        FileSamples.of(data(shape=(3, 5, 5)), batch)
    with pytest.raises(
        UsageError, match="no generated image is of class 1, which the training examples have"
    ):
        FileSamples.of(batch.take(batch.y != 1), batch)
    with pytest.raises(UsageError, match="1 of 26 generated examples are also test examples") as refused:
        refuse_judged(batch, as_data(batch.x[3:4], batch.y[3:4]), batch.first(0))
    assert refused.value.remedies[0].argument == "recipe.samples"
    others = as_data(data(50).x[40:], data(50).y[40:])
    refuse_judged(batch, others, data(50).take(torch.arange(30, 40)))
    with pytest.raises(UsageError, match="2 of 26 generated examples are also held-out examples"):
        refuse_judged(batch, others, batch.first(2))
    with pytest.raises(UsageError, match="26 of 26 generated examples are also test examples") as refused:
        refuse_judged(batch, as_data(batch.x, batch.y), batch.first(0))
    assert refused.value.remedies[0].argument == "recipe.samples"
    with pytest.raises(UsageError, match="is for images"):
        GeneratedData()(MODEL, Batch(batch.x.flatten(1), batch.y, batch.ids), THREAT, rng=Draws(0))


def test_the_card_compares_samples_with_training_and_test_examples(untrained_accepted):
    recipe = GeneratedData(steps=1, generator=0.5, confidence=0.0, training=SHORT)
    *_, last = recipe(MODEL, data(), THREAT, rng=Draws(0))
    state = without_prefix(last.tensors, STATE)
    finished = Finished(MODEL, MODEL, None, data(), data(9), THREAT, Draws(0), state)
    entry, note = recipe.follow_up(finished)
    assert entry["generator_updates"] == 5 and entry["copies"]["generated"] == 26
    assert "the median distance to the nearest training example" in note
    before = replace(finished, state={**state, "counts": torch.zeros(1, 2, dtype=torch.int64)})
    entry, note = recipe.follow_up(before)
    assert "copies" not in entry and note.endswith("the network was trained on real images only")


def test_copies_are_nearer_to_training_examples_than_test_examples():
    training, test = data(60), fakes.examples(seed=3, n=20)
    found = copies(training.take(torch.arange(7)), test, training, Draws(0))
    assert found["median_generated"] == pytest.approx(0, abs=1e-3) and found["nearer"] == 1.0
    assert found["median_test"] > 0.5 and (found["generated"], found["test"]) == (7, 20)
    assert copies(test, test, training, Draws(0))["nearer"] <= 0.1


def test_a_copied_image_has_a_distance_of_exactly_zero():
    found = copies(data().first(9), data(60).take(torch.arange(30, 60)), data(), Draws(0))
    assert found["median_generated"] == 0 and found["nearer"] == 1
