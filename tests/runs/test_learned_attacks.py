"""`harden` with the recipes `policy` and `league`: cards, budgets, and runs that were stopped."""

from dataclasses import replace

import pytest

import holdfast
from holdfast.core.errors import Interrupted, UsageError
from holdfast.recipes import LeagueTraining, PolicyTraining
from holdfast.settings.grammar import seconds
from runs import fakes
from runs.test_budget import HOW, LONG_S, hardened
from runs.test_hardening import training

RECIPES = {
    "policy": {"use": "policy"},
    "league": {"use": "league", "past": 2},
}


def run(folder, name, **more):
    data = training()
    spec = {**RECIPES[name], "training": {"epochs": 3, "batch": 64, "lr": 0.01}}
    return holdfast.harden(
        fakes.network(1).requires_grad_(), (data.x, data.y), "linf:0.06", spec, suite="quick", doubts=False, sample=20,
        run=folder, **more,
    )  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_the_card_has_the_strategies_and_a_stopped_run_ends_with_the_same_bytes(tmp_path, name):
    whole = run(tmp_path / "whole", name)

    def stop(step):
        if step.stage.startswith("training") and step.done >= 2:
            raise Interrupted("stopped", signal_number=2)

    with pytest.raises(Interrupted):
        run(tmp_path / "stopped", name, progress=stop)
    resumed = run(tmp_path / "stopped", name, resume=True)
    assert resumed.weights == whole.weights
    assert set(whole.model.state_dict()) == {f"net.{name}" for name in fakes.network(1).state_dict()}
    assert resumed.card["follow_up"] == whole.card["follow_up"]
    text = (whole.write(tmp_path / "new") / "card.md").read_text()
    assert ("### Cross-play on 20 test examples, robust accuracy" in text) == (name == "league")
    assert "mean number of steps" in text
    assert holdfast.verify(tmp_path / "whole").complete


def test_a_number_of_passes_takes_the_place_of_epochs_and_not_of_a_budget(tmp_path):
    data = training()
    options = {"suite": "quick", "doubts": False, "sample": 20}
    recipe = PolicyTraining(strategy="random", passes=12.0, training=replace(HOW, epochs=99))
    found = holdfast.harden(
        fakes.network(1).requires_grad_(), (data.x, data.y), "linf:0.06", recipe, **options
    )
    assert found.card["cost"]["forwards"] == pytest.approx(12.0, abs=1.0) and found.card["epochs"] < 99
    with pytest.raises(UsageError, match=r"recipe.passes is 12, and the budget is 1min"):
        holdfast.harden(
            fakes.network(1).requires_grad_(), (data.x, data.y), "linf:0.06",
            PolicyTraining(passes=12.0), budget="1min", **options,
        )  # fmt: skip


@pytest.mark.parametrize("recipe", [PolicyTraining(), LeagueTraining(past=1)], ids=["policy", "league"])
def test_a_budget_below_an_epoch_is_refused_with_one_that_suffices(recipe):
    recipe = replace(recipe, training=replace(HOW, batch=4))
    with pytest.raises(
        UsageError, match=r"is too small for one epoch of \w+Training: .* updates of an epoch fit"
    ) as refused:
        hardened(lambda calls, now: 400, recipe, budget_s=LONG_S)
    assert seconds(str(refused.value.remedies[0].value), "budget") > LONG_S
