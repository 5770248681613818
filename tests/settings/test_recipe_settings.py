"""Settings of recipes as files and flags say them."""

from dataclasses import dataclass, field

import pytest
from torch import nn

from holdfast.core.constraints import L1, L2, Linf
from holdfast.core.errors import TargetError, UsageError
from holdfast.recipes import TRADES, MultiNormTraining
from holdfast.recipes.training.fit import Training
from holdfast.rotation import Crafting, Immunise
from holdfast.settings.grammar import parse_pairs
from holdfast.verbs.configuration import read_settings
from holdfast.verbs.opening.recipes import _checked, build_recipe, built, candidates, settings_of, trained_by
from holdfast.verbs.settings import Harden


def told(*sets):
    return build_recipe(read_settings(None, {}, ["recipe.use=multi-norm", *sets], kind=Harden).recipe)


def test_constraints_are_named_as_threats_are_in_a_flag_and_in_a_list(tmp_path):
    expected = MultiNormTraining(others=(L2(1.5), L1(10.0)), method="max")
    assert told("recipe.others=l2:1.5,l1:10", "recipe.method=max") == expected
    file = tmp_path / "holdfast.yaml"
    file.write_text("harden:\n  recipe: {use: multi-norm, method: max, others: ['l2:3/2', 'l1:10']}\n")
    assert build_recipe(read_settings(file, {}, kind=Harden).recipe) == expected
    assert told("recipe.others=l2:1.5").others == (L2(1.5),)
    assert told("recipe.others=[linf:8/255, l1:3]").others == (Linf(8 / 255), L1(3.0))


def test_a_part_that_may_be_any_has_the_settings_of_its_usual_one():
    said = {"weight": 0.25, "crafting": {"steps": "3"}}
    made = built(Immunise, said, "immunise", "immunise")
    assert made == Immunise(weight=0.25, crafting=Crafting(steps=3))
    with pytest.raises(UsageError, match="it has parts, .*give crafting.examples=VALUE in immunise"):
        built(Immunise, {"crafting": 3}, "immunise", "immunise")


def test_settings_are_written_as_they_are_read():
    recipe = MultiNormTraining(others=(L2(1.5), Linf(8 / 255), L1(3.0)))
    said = settings_of(recipe)
    assert said["others"][0] == "l2:1.5"
    assert build_recipe({"use": "multi-norm", **said}) == recipe


@pytest.mark.parametrize(
    "value, said",
    [
        ("l3:1", "has no known norm"),
        ("l2", "others has 'l2'; expected a norm and a size"),
        ("l2:-1", "it must be 0"),
        ("l2:1,l0:3px", "others contains L0.* multi-norm trains under linf, l2 and l1; give others="),
        ("corruptions:3", "expected a norm and a size"),
        ("3", "others is 3; expected norms and sizes"),
        ("{l2: 1}", "expected norms and sizes"),
    ],
)
def test_what_is_no_constraint_is_refused(value, said):
    with pytest.raises(UsageError, match=said):
        told(f"recipe.others={value}")


@pytest.mark.parametrize(
    "setting, said",
    [
        ("averaging=sma", "averaging"),
        ("cutmix=2", "cutmix"),
        ("patience=-1", "patience"),
        ("attack_statistics=train", "attack_statistics"),
    ],
)
def test_options_of_the_loop_are_checked(setting, said):
    with pytest.raises(UsageError, match=said):
        told("recipe.others=l2:1", f"recipe.training.{setting}")


def test_options_of_the_loop_are_set():
    sets = parse_pairs(["use=trades", "label_smoothing=0.1"], "--set")
    recipe = build_recipe({**sets, "training": {"averaging": "swa", "tail": "1/2", "patience": 3}})
    assert recipe == TRADES(label_smoothing=0.1, training=recipe.training)
    assert (recipe.training.averaging, recipe.training.tail, recipe.training.patience) == ("swa", 0.5, 3)


def test_settings_of_a_part_that_are_not_given_keep_the_value_of_the_recipe():
    @dataclass(frozen=True)
    class Slow:
        training: Training = field(default_factory=lambda: Training(lr=0.02))

    assert _checked(Slow, {"training": {"epochs": 3}}, "slow", "recipe") == {
        "training": Training(epochs=3, lr=0.02)
    }


@pytest.mark.parametrize(
    "shape, processes, names",
    [
        ((1, 28, 28), "1", ["fgsm-rs", "atta", "trades"]),
        (
            (1, 28, 28),
            "2",
            ["fgsm-rs", "pgd", "trades"],
        ),  # what is kept of each example is kept by one process
        ((3, 32, 32), "2", ["n-fgsm", "pgd", "trades"]),
        ((20,), "1", ["n-fgsm", "pgd", "trades"]),
    ],
)
def test_auto_chooses_among_recipes_that_the_processes_can_train(shape, processes, names, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", processes)
    found = candidates({"use": "auto"}, nn.Linear(1, 1), shape)
    assert [one.name for one in found] == names


def test_auto_takes_the_rate_of_sgd_for_batch_norm_unless_another_optimiser_is_named():
    net = nn.Sequential(nn.BatchNorm1d(20))

    def rates(**training):
        found = candidates({"use": "auto", "training": training}, net, (20,))
        return {(one.recipe.training.optimizer, one.recipe.training.lr) for one in found}

    assert rates() == rates(optimizer="sgd") == {("sgd", 0.1)}
    assert rates(optimizer="adamw") == {("adamw", 0.003)}
    assert rates(lr=0.05) == {("sgd", 0.05)}


def test_auto_mirrors_nothing_and_takes_a_recipe_that_can_mix_images_where_they_are_mixed():
    def chosen(shape, **training):
        return candidates({"use": "auto", "training": training}, nn.Linear(1, 1), shape)

    assert {one.recipe.training.augment for one in chosen((3, 32, 32))} == {"shift"}
    for training, middle in (
        ({"cutmix": 0.5}, "pgd"),
        ({"augment": "shift"}, "atta"),
        ({"augment": "none"}, "atta"),
    ):
        assert [one.name for one in chosen((1, 28, 28), **training)] == ["fgsm-rs", middle, "trades"]


@pytest.mark.parametrize(
    "card",
    [
        "[" * 5000,
        '{"recipe": 5, "settings": {}}',
        '{"recipe": "standard", "settings": []}',
        '{"recipe": "standard", "settings": {"training": [1]}}',
    ],
)
def test_a_card_of_another_form_is_refused(tmp_path, card):
    (tmp_path / "w.pt").write_bytes(b"")
    (tmp_path / "card.json").write_text(card)
    with pytest.raises(TargetError, match="is not the card of a hardened model"):
        trained_by(str(tmp_path / "w.pt"))


def test_a_card_that_names_no_recipe_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match="the card names the recipe 'standrad', .*; did you mean 'standard'"):
        build_recipe({"use": "standrad"})
