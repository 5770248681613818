"""A learned policy of augmentations, and a search of settings: what they choose, and what they refuse."""

from dataclasses import replace

import pytest
import torch

from holdfast.core.batch import UNLABELLED
from holdfast.core.constraints import Linf
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.threat import ThreatModel
from holdfast.core.training import STATE, without_prefix
from holdfast.recipes import AugmentPolicy, Tuning, augment_policy, tuning
from holdfast.recipes.augment_policy import AUGMENTATIONS
from holdfast.recipes.training.fit import Saving
from holdfast.recipes.training.recipe import EVERY, Finished, reserved
from holdfast.testing import fakes
from holdfast.testing.recipes import SHORT, same

THREAT = ThreatModel(Linf(0.05))
MODEL = fakes.network(1).requires_grad_()


def data(n=26):
    return fakes.labelled(fakes.network(), fakes.examples(n=n))


def finished(last):
    state = without_prefix(last.tensors, STATE)
    return Finished(MODEL, MODEL, None, data(), data(9), THREAT, Draws(0), state)


def test_the_policy_prefers_the_augmentation_after_which_more_is_robust(monkeypatch):
    current = []

    def rewarded(learner, examples):
        current.append(int(learner.state["current"]))
        return 0.9 if current[-1] == 2 else 0.3

    monkeypatch.setattr(augment_policy, "robust_share", rewarded)
    recipe = AugmentPolicy(period=1, steps=1, rate=0.3, training=replace(SHORT, epochs=80))
    *_, last = recipe(MODEL, data(), THREAT, rng=Draws(0))
    found, note = recipe.follow_up(finished(last))
    entry = found["policy"]
    probabilities = {name: each["probability"] for name, each in entry.items()}
    assert max(probabilities, key=probabilities.get) == "shift 2" and probabilities["shift 2"] > 0.5
    assert sum(probabilities.values()) == pytest.approx(1)
    assert sum(each["updates"] for each in entry.values()) == 80 * 3 and len(entry) == len(AUGMENTATIONS)
    assert "the policy augments by shift 2 with a probability of" in note


def test_the_entropy_bonus_spreads_the_policy():
    spread = []
    for entropy in (0.0, 5.0):
        state = {
            "preferences": torch.tensor([[2.0, *[0.0] * (len(AUGMENTATIONS) - 1)]]).double(),
            "current": torch.tensor([0]),
            "baseline": torch.tensor([[0.5, 0.26]]).double(),
        }
        AugmentPolicy(entropy=entropy)._learn(state, 0.5)
        spread.append(float(state["preferences"].softmax(1).max()))
        assert state["baseline"][0].tolist() == pytest.approx([0.5, 0.258])
    assert spread[1] < spread[0]


def test_a_policy_resumes_within_an_epoch():
    kept = []
    recipe = AugmentPolicy(period=2, steps=1, training=replace(SHORT, saving=Saving(1, kept.append)))
    *_, whole = recipe(MODEL, data(), THREAT, rng=Draws(0))
    for after in kept:
        *_, last = recipe(MODEL, data(), THREAT, rng=Draws(0), after=after)
        assert same(last, whole)


@pytest.mark.parametrize("setting", [{"augment": "shift"}, {"cutmix": 0.5}])
def test_a_policy_with_another_augmentation_is_refused(setting):
    with pytest.raises(UsageError, match="augment-policy learns which augmentation is used"):
        AugmentPolicy(training=replace(SHORT, **setting))(MODEL, data(), THREAT, rng=Draws(0))


def test_the_search_keeps_the_better_half_of_each_round(monkeypatch):
    lengths = []

    def scored(self, k, n_updates, *more):
        lengths.append(n_updates)
        return 1 - abs(k - tuning._USUAL) / 100 if k != tuning._USUAL else 0.0

    monkeypatch.setattr(Tuning, "_score", scored)
    recipe = Tuning(search=0.5, candidates=4, training=replace(SHORT, epochs=24))
    *_, last = recipe(MODEL, data(), THREAT, rng=Draws(0))
    entry, note = recipe.follow_up(finished(last))
    assert lengths == [4] * 4 + [9] * 2  # half of 72 updates in two rounds
    assert [len(each["robust"]) for each in entry["compared"]].count(2) == 2
    best = max(entry["compared"], key=lambda each: each["robust"][-1] if len(each["robust"]) == 2 else 0)
    assert entry["chosen"] == {name: best[name] for name in entry["chosen"]}
    assert entry["compared"][0]["robust"] == [0.0]  # the usual settings were dropped
    assert note.startswith("of 4 settings, the search chose reach ")


def test_the_chosen_settings_are_those_of_the_training_and_are_not_searched_again(monkeypatch):
    recipe = Tuning(steps=1, search=0.9, candidates=3, training=SHORT)
    checkpoints = [*recipe(MODEL, data(), THREAT, rng=Draws(0))]
    monkeypatch.setattr(Tuning, "_searched", None)
    *_, last = recipe(MODEL, data(), THREAT, rng=Draws(0), after=checkpoints[0])
    assert same(last, checkpoints[-1])
    assert [*replace(recipe, training=replace(SHORT, trial=True))(MODEL, data(), THREAT, rng=Draws(0))]


def test_an_optimiser_of_the_user_is_refused_by_the_search():
    how = replace(SHORT, optimizer=lambda weights: torch.optim.SGD(weights, 0.1))
    with pytest.raises(UsageError, match="tune searches the weight decay"):
        Tuning(training=how)(MODEL, data(), THREAT, rng=Draws(0))


def test_reserved_examples_have_labels_and_are_not_trained_on():
    batch = data(60)
    batch = batch.labelled(torch.where(batch.ids % 2 == 0, batch.y, UNLABELLED))
    rest, held_out = reserved(batch, Draws(0))
    assert len(held_out) == 6 and len(rest) == 54 and (held_out.y != UNLABELLED).all()
    assert not set(rest.ids.tolist()) & set(held_out.ids.tolist())
    assert [len(part) for part in reserved(data(EVERY - 1), Draws(0))] == [EVERY - 1] * 2
