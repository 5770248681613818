"""Thieves: whatever they hold, their examples are allowed ones, made to the end, and the same alone as among others."""

import pytest
import torch

from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.rotation.collecting import trained_from_fresh_weights
from holdfast.rotation.steps.alternatives import ATTACKS, Sampled, TransferAttacker
from rotation.problem import THREAT, accuracy, examples, task

EPS = THREAT.constraint.eps


@pytest.fixture(scope="module")
def models():
    return [trained_from_fresh_weights(task(), Draws(100 + seed)) for seed in (0, 1)]


@pytest.fixture(scope="module")
def made(models):
    """What a thief of both makes."""
    return TransferAttacker().crafted(models, examples(5, 60), THREAT, rng=Draws(1))


@pytest.mark.slow
def test_every_attack_leaves_examples_that_may_be_and_stops_at_no_success(models, made):
    batch = examples(5, 60)
    with torch.no_grad():
        wrong = torch.stack([model(batch.x).argmax(1) != batch.y for model in models]).any(0)
    assert list(made) == list(ATTACKS) and wrong.any()
    for x_adv in made.values():
        assert x_adv.shape == batch.x.shape and bool(((x_adv >= 0) & (x_adv <= 1)).all())
        moved = (x_adv - batch.x).abs().flatten(1).amax(1)
        assert (moved <= EPS + 1e-6).all()
        assert (moved[wrong] > 0.99 * EPS).all()  # what is wrong already is taken as far as the rest


def test_a_row_is_made_as_it_would_be_alone(models, made):
    rows = torch.tensor([7, 31])
    again = TransferAttacker().crafted(models, examples(5, 60).take(rows), THREAT, rng=Draws(1))
    for name, x_adv in again.items():
        torch.testing.assert_close(x_adv, made[name][rows], msg=name)


def test_what_is_made_on_one_turns_it_and_carries_to_another(models):
    batch = examples(6, 200)
    one, other = models
    for name, x_adv in TransferAttacker().crafted([one], batch, THREAT, rng=Draws(1)).items():
        assert accuracy(one, batch.at(x_adv)) < 0.4, name
        assert accuracy(other, batch.at(x_adv)) < accuracy(other, batch) - 0.1, name


def test_noisy_copies_leave_the_weights_alone_and_differ_from_them(models):
    before = [value.clone() for value in models[0].parameters()]
    attacker = TransferAttacker({"SWAG": Sampled(), "calm": Sampled(spread=1e-9), "MI": ATTACKS["MI"]})
    found = attacker.crafted(models[:1], examples(5, 60), THREAT, rng=Draws(1))
    assert all(torch.equal(old, new) for old, new in zip(before, models[0].parameters(), strict=True))
    torch.testing.assert_close(found["calm"], found["MI"], atol=0.02, rtol=0)
    assert not torch.allclose(found["SWAG"], found["MI"], atol=0.02)


def test_an_attacker_without_stolen_sets_is_refused():
    with pytest.raises(UsageError, match="give at least one model"):
        TransferAttacker().crafted([], examples(5, 60), THREAT, rng=Draws(1))
