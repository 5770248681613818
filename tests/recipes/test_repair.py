"""Repair of a network with a backdoor, and what the card states about it."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import holdfast
from holdfast.core.batch import Batch
from holdfast.core.constraints import Linf
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.io.data.npz import write_trigger
from holdfast.recipes import FTSAM, Repair, Standard
from holdfast.recipes.training.fit import Training, Update
from holdfast.recipes.training.follow_up import STEPS, after_repair, outcome
from holdfast.recipes.training.learner import Learner
from holdfast.recipes.training.recipe import Finished, facts_of
from holdfast.threats.triggers import Stamped, Trigger, trigger_text
from holdfast.verbs.opening.recipes import refuse_unheld

MASK = torch.zeros(1, 6, 6)
MASK[:, -1, -2:] = 1
TRIGGER = Trigger(MASK, torch.ones(1, 6, 6), 0)


def images(n=400, seed=0):
    """Images of three classes: which third of the rows is brighter."""
    rng = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (n,), generator=rng)
    x = 0.3 * torch.rand(n, 1, 6, 6, generator=rng)
    for row in range(2):
        x[torch.arange(n), 0, 2 * y + row] += 0.25
    return Batch(x, y, torch.arange(n))


def network(poisoned, seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 24), nn.ReLU(), nn.Linear(24, 3))
    data = images(seed=1)
    x, y = data.x.clone(), data.y.clone()
    if poisoned:
        x[:40], y[:40] = TRIGGER.stamped(x[:40], Classifier(net).bounds), 0
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(120):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return Classifier(net).eval()


def threat(trigger=TRIGGER):
    return ThreatModel(Stamped("found.npz", trigger_text(trigger)), goal=trigger.target)


def finished(given, new, control=None, trigger=TRIGGER):
    return Finished(given, new, control, images(seed=2), images(100, 3), threat(trigger), Draws(0))


@pytest.mark.parametrize("recipe", [Repair(), FTSAM()])
def test_the_goal_is_a_lower_success_of_the_trigger(recipe):
    assert facts_of(recipe).goal.metric == "trigger_success_rate"
    assert facts_of(recipe).goal.better == "lower"


@pytest.mark.parametrize("recipe", [Repair(), FTSAM()])
def test_a_threat_without_a_trigger_is_refused(recipe):
    with pytest.raises(UsageError, match="by its trigger"):
        recipe(network(False), images(), ThreatModel(Linf(0.1)), rng=Draws(0))


@pytest.mark.parametrize("recipe", ["pgd", "auto"])
def test_other_recipes_do_not_remove_backdoors(recipe):
    with pytest.raises(UsageError, match="trained by repair and ft-sam") as refused:
        refuse_unheld(threat(), recipe)
    assert refused.value.remedies[0].value == "repair"
    refuse_unheld(threat(), "repair")
    with pytest.raises(UsageError, match="the recipe ft-sam is for threats"):
        refuse_unheld(ThreatModel(Linf(0.1)), "ft-sam")


def test_the_chosen_fraction_gets_the_trigger_and_keeps_its_labels():
    batch, net = images(2000), network(False)
    learner = Learner(net, net, threat())
    x = Repair(stamped=0.25).inner(learner, batch, Update(Draws(0), 0, 0.0, 1.0))
    with_trigger = (x == TRIGGER.stamped(batch.x, net.bounds)).flatten(1).all(1)
    assert float(with_trigger.double().mean()) == pytest.approx(0.25, abs=0.04)
    assert torch.equal(x[~with_trigger], batch.x[~with_trigger])


def test_ft_sam_takes_the_gradient_at_the_perturbed_weights():
    """Of one weight w of a loss that is known: the gradient at w + rho sign(g) |w| T^2 |g| / |T g| = w + rho |w|."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([0.5]))

        def forward(self, x):
            z = self.w * x.flatten(1).mean(1)
            return torch.stack([z, torch.zeros_like(z)], 1)

    net = Classifier(Scaled())
    batch = Batch(torch.ones(4, 1, 2, 2), torch.ones(4, dtype=torch.int64), torch.arange(4))
    value, right = FTSAM(rho=2.0, label_smoothing=0.0).loss(Learner(net, net, threat()), batch, batch.x)
    value.backward()
    moved = 0.5 + 2.0 * 0.5  # the loss of class 1 grows with w
    assert float(value.detach()) == pytest.approx(math.log1p(math.exp(moved)), rel=1e-5)
    assert float(net.net.w.grad) == pytest.approx(1 / (1 + math.exp(-moved)), rel=1e-5)
    assert int(right) == 0


def test_a_repair_lowers_the_success_and_the_further_updates_show_what_is_left():
    given, control = network(True), network(False, 1)
    before = {name: value.clone() for name, value in given.state_dict().items()}
    short = Training(epochs=20, batch=64, lr=0.005, weight_decay=0.0, averaging="none")
    *_, last = Repair(training=short)(given, images(seed=2), threat(), rng=Draws(0))
    repaired = network(True)
    last.put_into(repaired)
    entry, sentence = after_repair(finished(given, repaired, control))
    assert entry["before"] > 0.8 and entry["after"] < 0.2
    assert entry["n"] == int((images(100, 3).y != 0).sum()) and entry["steps"] == STEPS
    assert entry["outcome"] == outcome(entry["after_steps"], entry["control"]["after_steps"])
    assert f"{100 * entry['after']:.1f} % after it" in sentence
    assert all(torch.equal(value, before[name]) for name, value in given.state_dict().items())
    assert (entry, sentence) == after_repair(finished(given, repaired, control))


def test_without_a_clean_network_only_the_given_trigger_is_spoken_of():
    entry, sentence = after_repair(finished(network(True), network(False)))
    assert entry["control"] is None and entry["outcome"] is None
    assert sentence.endswith("the given trigger no longer works")
    assert "removed" not in sentence and "backdoor" not in sentence
    _, sentence = after_repair(finished(network(True), network(True)))
    assert sentence.endswith("the given trigger still works")


def test_a_trigger_without_a_class_gets_the_one_that_it_reaches():
    entry, _ = after_repair(finished(network(True), network(False), trigger=replace(TRIGGER, target=None)))
    assert entry["target"] == 0


def test_examples_of_the_target_class_alone_show_nothing():
    case = finished(network(True), network(False))
    only = case.test.subset(case.test.y == 0)
    with pytest.raises(UsageError, match="have the target class 0"):
        after_repair(replace(case, test=only))


@pytest.mark.parametrize(
    ("repaired", "control", "expected"),
    [(0.3, 0.21, "removed"), (0.32, 0.21, "suppressed"), (0.96, 0.01, "suppressed"), (0.99, 0.9, "unclear")],
)
def test_removed_is_at_most_ten_points_above_a_clean_network(repaired, control, expected):
    assert outcome(repaired, control) == expected


@pytest.mark.slow
@pytest.mark.parametrize("with_control", [True, False])
def test_the_card_states_what_the_repair_achieved(tmp_path, with_control):
    layers = "nn.Flatten(), nn.Linear(36, 24), nn.ReLU(), nn.Linear(24, 3)"
    code = f"from torch import nn\ndef make():\n    return nn.Sequential({layers})\n"
    (tmp_path / "net.py").write_text(code)
    torch.save(network(False, 1).net.state_dict(), tmp_path / "clean.pt")
    torch.save(network(True).net.state_dict(), tmp_path / "model.pt")
    data, test = images(700, 5), images(100, 3)
    np.savez(tmp_path / "clean.npz", x_train=data.x, y_train=data.y, x_test=test.x, y_test=test.y)
    write_trigger(tmp_path / "found.npz", TRIGGER)
    control = f"{tmp_path / 'clean.pt'},arch={tmp_path / 'net.py'}:make" if with_control else ""
    found = holdfast.harden(
        holdfast.open_model(tmp_path / "model.pt", arch=f"{tmp_path / 'net.py'}:make", trust_code=True),
        str(tmp_path / "clean.npz"),
        threat=f"trigger:{tmp_path / 'found.npz'}",
        recipe={"use": "repair", "control": control, "training": {"lr": 0.005}},
        run=tmp_path / "run",
    )
    assert found.verdict == "improved"
    assert found.card["change"]["metric"] == "trigger_success_rate"
    entry = found.card["follow_up"]
    metrics = {
        side: found.card[side]["metrics"]["trigger_success_rate"]["value"] for side in ("before", "after")
    }
    assert metrics == pytest.approx({"before": entry["before"], "after": entry["after"]})
    assert (entry["outcome"] is not None) == with_control
    text = (found.write(tmp_path / "repaired") / "card.md").read_text()
    assert "Trigger success rate" in text and "after 50 further updates" in text
    assert "PGD" not in text
    assert holdfast.verify(tmp_path / "run").complete


def test_the_standard_recipe_measures_nothing_more():
    assert Standard().follow_up(None) is None
