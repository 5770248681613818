"""The verdict on a hardening, the gate on it, and a training that is stopped after a collapse."""

import json
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from holdfast.core.constraints import Linf
from holdfast.core.errors import Interrupted, TargetError, UsageError
from holdfast.core.estimate import Goal
from holdfast.gates.grammar import parse
from holdfast.recipes import PGDTraining
from holdfast.reports.card import checkpoint_text, help_sentence, verdict_sentence
from holdfast.reports.write import rendered
from holdfast.runs.documents.stored_runs import open_run
from holdfast.runs.harden.candidates import collapsed
from holdfast.runs.harden.checkpoints import Point
from holdfast.runs.harden.harden import harden
from holdfast.runs.harden.hardened import advice
from holdfast.verbs.reports import report, verify
from runs import fakes
from runs.test_hardening import HOW, JUDGE, RECIPE, trainable, training, wish
from store.test_foreign import rewritten

GATED = replace(JUDGE, gates=(parse("improved"),))


def curve(*shares):
    """A training curve by the clean accuracy and the share of the most predicted class after each epoch."""
    return tuple(
        Point(k, 1.0, 0.5, 0.1, 64, clean, 0.1, 1.0, 1.0, most_predicted=largest)
        for k, (clean, largest) in enumerate(shares, 1)
    )


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ([(0.1, 1.0), (0.1, 1.0), (0.1, 1.0)], False),
        ([(0.1, 1.0), (0.8, 0.2)], False),
        ([(0.8, 0.2), (0.1, 1.0)], True),
        ([(0.8, 0.2), (0.12, 0.97)], False),
        ([(0.15, 0.6), (0.1, 1.0)], False),
        ([(0.93, 0.88), (0.9, 1.0)], True),
    ],
    ids=["never learned", "learned late", "collapsed", "two classes", "was hardly better", "unequal classes"],
)
def test_a_network_collapsed_if_it_is_constant_and_an_earlier_epoch_was_clearly_better(shares, expected):
    assert collapsed(curve(*shares)) == expected


@pytest.mark.parametrize(
    ("shares", "start", "expected"),
    [
        ([(0.1, 1.0)], 0.9, False),
        ([(0.1, 1.0), (0.1, 1.0)], 0.9, True),
        ([(0.3, 0.6), (0.1, 1.0)], 0.9, False),
        ([(0.1, 1.0), (0.1, 1.0)], 0.15, False),
    ],
    ids=["warm-up", "collapsed", "first constant epoch", "given model at chance"],
)
def test_a_network_worse_than_the_given_one_collapsed_if_it_is_constant_for_two_epochs(
    shares, start, expected
):
    assert collapsed(curve(*shares), start) == expected


@pytest.mark.parametrize(("clean", "largest", "expected"), [(0.994, 0.992, False), (0.99, 1.0, True)])
def test_a_network_that_recognises_a_rare_class_is_not_constant(clean, largest, expected):
    earlier, last = curve((0.996, 0.988), (clean, largest))
    assert collapsed((earlier, replace(last, class_share=0.99))) == expected


@dataclass(frozen=True)
class Collapsing(PGDTraining):
    """Adversarial training whose network predicts one class from an epoch on."""

    since: int = 2

    def __call__(self, model, data, threat, *, rng, after=None):
        for checkpoint in super().__call__(model, data, threat, rng=rng, after=after):
            bias = 100.0 * torch.eye(fakes.CLASSES, dtype=torch.float64)[0]
            constant = {
                key: bias.clone() if value.shape == bias.shape else value
                for key, value in checkpoint.tensors.items()
            }
            yield checkpoint if checkpoint.epoch < self.since else replace(checkpoint, tensors=constant)


def test_a_collapse_ends_the_training_and_the_checkpoint_before_it_is_returned(tmp_path):
    asked = wish(Collapsing(steps=1, training=replace(HOW, epochs=9)), assessment=GATED)

    def stop(step):
        if step.stage.startswith("training") and step.done == 2:
            raise Interrupted("stopped", signal_number=2)

    whole = harden(trainable(0), training(), fakes.data(), asked, run=tmp_path / "whole")
    assert [point.epoch for point in whole.curve] == [1, 2]
    assert (whole.card["ended_by"], whole.card["chosen"]["epoch"]) == ("collapse", 1)
    assert "in epoch 2 the network collapsed to one class, which it predicts for 100.0 %" in whole.notes[-1]
    assert (
        "stopped early because the network collapsed"
        in (whole.write(tmp_path / "made") / "card.md").read_text()
    )
    with pytest.raises(Interrupted):
        harden(trainable(0), training(), fakes.data(), asked, run=tmp_path / "r", progress=stop)
    again = harden(trainable(0), training(), fakes.data(), asked, run=tmp_path / "r", resume=True)
    assert again.weights == whole.weights
    assert (tmp_path / "r" / "chain.jsonl").read_bytes() == (tmp_path / "whole" / "chain.jsonl").read_bytes()


def test_a_collapse_in_the_first_epoch_ends_the_training_and_the_card_states_that_the_model_is_constant():
    recipe = Collapsing(steps=1, training=replace(HOW, epochs=9), since=1)
    found = harden(trainable(0), training(), fakes.data(), wish(recipe))
    assert [point.epoch for point in found.curve] == [1, 2]
    assert found.card["ended_by"] == "collapse"
    assert "the new model is such a constant prediction too" in found.notes[-1]
    message = found.after.summary()["training"]["message"]  # the verdict comes first if no gate was set
    assert str(found.after).startswith(f"– {message}")
    assert rendered(found.after.report, ".md").startswith(f"## – {found.verdict.capitalize()}: ")


@dataclass(frozen=True)
class Wanting(PGDTraining):
    """Adversarial training with another goal."""

    goal: ClassVar[Goal] = Goal("clean_accuracy", "lower")


@dataclass(frozen=True)
class Unknown(PGDTraining):
    """Adversarial training with a goal that cannot be measured."""

    goal: ClassVar[Goal] = Goal("beauty")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "recipe", "verdict", "code"),
    [
        (1, RECIPE, "improved", 0),
        (0, RECIPE, "no difference shown", 4),
        (1, Wanting(2, training=HOW), "worse", 1),
    ],
)
def test_the_gate_passes_if_and_only_if_the_new_model_is_better(seed, recipe, verdict, code, tmp_path):
    run = tmp_path / "r"
    found = harden(trainable(seed), training(), fakes.data(), wish(recipe, assessment=GATED), run=run)
    assert (found.verdict, found.after.exit_code) == (verdict, code)
    assert str(found.after).partition("  ")[2].startswith(found.after.summary()["training"]["message"])
    again = open_run(run)
    assert (again.exit_code, str(again)) == (code, str(found.after))
    assert again.summary()["training"]["verdict"] == verdict
    assert verdict.capitalize() in (found.write(tmp_path / "made") / "card.md").read_text().splitlines()[2]
    (gate,) = found.after.gates
    assert gate.estimate.n == fakes.N
    without = harden(trainable(seed), training(), fakes.data(), wish(recipe))
    assert (without.verdict, without.after.exit_code) == (verdict, 0)


def test_a_goal_that_is_not_known_is_refused_before_the_training():
    with pytest.raises(
        UsageError, match="declares the goal 'beauty'.*one of robust_accuracy, clean_accuracy"
    ):
        harden(trainable(), training(), fakes.data(), wish(Unknown(training=HOW)))


def test_a_gate_that_contradicts_the_measurements_is_refused(tmp_path):
    run = tmp_path / "r"
    harden(trainable(), training(), fakes.data(), wish(assessment=GATED), run=run)

    def change(content):
        content["gates"][0]["compared"]["value"] += 0.1

    rewritten(run / "after", "verdict.json", change)
    head = json.loads((run / "after" / "chain.jsonl").read_text().splitlines()[-1])["digest"]
    rewritten(run, "after.json", lambda content: content.update(chain=head))
    for reader in (report, verify):
        with pytest.raises(
            TargetError, match=r"after/verdict\.json' states another judgement of the gate 'improved'"
        ):
            reader(run)


CARD = {
    "verdict": "no difference shown",
    "change": {"metric": "robust_accuracy", "before": 0.0, "after": 0.008, "value": 0.008, "low": -0.001}
    | {"high": 0.017, "n": 500, "better": "higher"},
    "recipe": "pgd",
    "epochs": 0.559,
    "ended_by": "budget",
    "settings": {"training": {"lr": 0.004, "warmup": 0.25}},
    "plan": {"budget_s": 60, "planning_s": 2.0, "attempts": [{"recipe": "pgd", "epoch_s": 66.0}]},
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {},
            (
                "What may help: 10 epochs instead of 0.559 (a budget of about 11.0 min), the recipe fgsm-rs or a "
                "smaller eps (0.15)."
            ),
        ),
        ({"epochs": 40, "change": CARD["change"] | {"after": 0.4}}, "What may help: the recipe trades."),
        ({"verdict": "improved"}, ""),
        ({"change": CARD["change"] | {"before": 1.0, "after": 1.0}}, ""),
        ({"recipe": "prune", "epochs": 40, "change": CARD["change"] | {"after": 0.4}}, ""),
        (
            {"recipe": "sabr", "ended_by": "patience", "change": CARD["change"] | {"after": 0.4}},
            "What may help: the recipe pgd.",
        ),
        (
            {"ended_by": "collapse"},
            (
                "The network collapsed to one class. What may help: a smaller learning rate (0.001), a longer "
                "warm-up (0.5 of the training) or a smaller eps (0.15)."
            ),
        ),
        (
            {
                "plan": {"budget_s": None, "attempts": CARD["plan"]["attempts"]},
                "change": CARD["change"] | {"metric": "f1"},
            },
            "What may help: 10 epochs instead of 0.559.",
        ),
    ],
)
def test_remedies_follow_from_the_card(changes, expected):
    card = {**CARD, **changes}
    assert help_sentence({**card, "advice": advice(card, Linf(0.3))}) == expected


def test_the_verdict_states_both_values_and_a_checkpoint_states_its_epochs():
    assert verdict_sentence(CARD) == (
        "No difference shown: robust accuracy is 0.8 % after the training and was 0.0 % before it (+0.8 points, 95 % "
        "interval −0.1 to +1.7, n = 500)."
    )
    assert checkpoint_text({"epoch": 1, "part": 1.0}, 1.44) == "after 1 of 1.44 epochs"
