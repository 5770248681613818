"""The audit of privacy: the arithmetic of its bounds, its canaries, its verdicts and its errors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import nn

import holdfast
from benchmarks.forging import accepted_fields
from holdfast.audits.privacy import epsilon_from_guesses, epsilon_from_rates, p_value, planted, right_guesses
from holdfast.cli.app import run as command
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.model import Bounds
from holdfast.statistics.privacy_budget import RowBudget


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(240, 20, generator=generator)
    return x, ((x - 0.5) @ torch.randn(20, 3, generator=generator)).argmax(1)


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 128), nn.ReLU(), nn.Linear(128, 3))


def remembering(x, y, seed):
    net = make()
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net


def untrained(x, y, seed):
    return make()


def privacy(data, train, **settings):
    usual = {"epsilon": 2, "canaries": 100, "bounds": (0.0, 1.0), "device": "cpu"}
    return holdfast.audit.privacy(make(), data, train=train, **{**usual, **settings})


def test_the_bounds_are_those_of_closed_forms_and_of_the_paper():
    chance = 0.05 ** (1 / 100)
    assert epsilon_from_guesses(100, 100) == pytest.approx(np.log(chance / (1 - chance)), abs=1e-9)
    assert epsilon_from_guesses(600, 1000) == pytest.approx(0.297, abs=1e-3)
    assert epsilon_from_guesses(1000, 1000) == pytest.approx(5.81, abs=5e-3)
    assert epsilon_from_guesses(50, 100) == epsilon_from_guesses(0, 3) == 0
    low, high = 0.025 ** (1 / 1000), 1 - 0.025 ** (1 / 1000)
    assert epsilon_from_rates(1000, 1000, 0, 1000) == pytest.approx(np.log(low / high), abs=1e-9)
    assert epsilon_from_rates(0, 1000, 1000, 1000) == 0
    assert epsilon_from_rates(500, 1000, 500, 1000) == 0


def test_the_bound_decreases_with_delta_and_with_the_canaries_without_a_guess():
    without, small, more = (
        epsilon_from_guesses(95, 100, delta=delta, canaries=canaries)
        for delta, canaries in ((0.0, 0), (1e-4, 100), (1e-4, 1000))
    )
    assert without > small > more > 0
    # the term of delta by its definition: the steepest mean slope of the tail below the observed count
    tails = [p_value(right, 100, 2.0) for right in range(96)]
    slope = max((tails[95 - i] - tails[95]) / i for i in range(1, 96))
    assert p_value(95, 100, 2.0, 1e-4, 1000) == pytest.approx(tails[95] + 2 * 1000 * 1e-4 * slope)
    assert epsilon_from_guesses(100, 100, delta=0.05) == 0
    with pytest.raises(UsageError, match="right is 4"):
        epsilon_from_guesses(4, 3)


@pytest.mark.parametrize("epsilon", [1.0, 3.0])
def test_the_bound_of_randomised_response_holds(epsilon):
    right = np.random.default_rng(0).binomial(500, 1 / (1 + np.exp(-epsilon)), 200)
    bounds = np.array([epsilon_from_guesses(int(count), 500) for count in right])
    assert (bounds > epsilon).mean() <= 0.1
    assert bounds.mean() > 0.75 * epsilon


@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.parametrize("epsilon", [0.1, 1.0])
def test_the_budget_of_equal_rows_holds_for_the_gaussian_mechanism(rows, epsilon):
    """Its exact delta is known (Balle & Wang, ICML 2018), also for k rows, which change the sum k times as much."""

    def delta_of(epsilon, rows):
        a, b = (sign * rows / 2 - epsilon / rows for sign in (1, -1))
        return norm.cdf(a) - np.exp(epsilon) * norm.cdf(b)

    budget = RowBudget(epsilon, delta_of(epsilon, 1), rows)
    assert budget.group_epsilon == rows * epsilon
    assert delta_of(rows * epsilon, rows) <= budget.group_delta + 1e-12
    assert budget.group_delta <= rows * np.exp((rows - 1) * epsilon) * budget.delta + 1e-12
    assert ("no two rows are equal" in budget.sentence()) == (rows == 1)


def test_a_budget_that_guarantees_nothing_for_equal_rows_is_stated():
    for budget in (RowBudget(2.0, 1e-5, 9), RowBudget(8.0, 1e-5, 10_000)):
        assert budget.group_delta == 1 and "guarantees nothing for such a person" in budget.sentence()


def test_the_largest_number_of_equal_rows_is_stated(data):
    x, y = data[0].clone(), data[1]
    x[10:19] = x[10]
    found = privacy((x, y), untrained, epsilon=0.5)
    assert (found.facts["equal_rows"], found.facts["group_epsilon"]) == (9, 4.5)
    assert "equal rows is 9" in found.summary()["limits"][0]


@pytest.mark.parametrize("kind", ["mislabelled", "random"])
def test_canaries_are_included_by_the_seed_only(data, kind):
    x, y = data
    batch = Batch(x, y, torch.arange(len(x)))
    first, same, other = (
        planted(batch, 3, Bounds(), n=100, kind=kind, rng=Draws(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first.included, same.included) and torch.equal(first.x, same.x)
    assert not torch.equal(first.included, other.included)
    assert 30 < int(first.included.sum()) < 70
    inputs, _ = first.training
    n = int(first.included.sum())
    assert torch.equal(inputs[-n:], first.x[first.included])
    if kind == "mislabelled":
        assert len(inputs) == 140 + n
        true = {row.tobytes(): label for row, label in zip(x.numpy(), y.tolist(), strict=True)}
        assert all(true[row.tobytes()] != label for row, label in zip(first.x.numpy(), first.y, strict=True))
        assert not {row.tobytes() for row in first.x.numpy()} & {
            row.tobytes() for row in first.rest.x.numpy()
        }
    else:
        assert len(inputs) == 240 + n
        assert float(first.x.min()) >= 0 and float(first.x.max()) < 1


def test_guesses_are_those_with_the_smallest_and_the_largest_losses():
    losses, included = torch.tensor([0.1, 0.2, 1.0, 5.0, 6.0]), torch.tensor([True, False, True, False, True])
    assert right_guesses(losses, included, 4) == 2
    assert right_guesses(losses, included, 1) == 0
    assert right_guesses(torch.zeros(4), torch.tensor([True, True, False, False]), 4) == 4


def test_a_training_without_noise_is_flagged_and_one_that_learns_nothing_is_unclear(data, tmp_path):
    result = privacy(data, remembering, gates=["epsilon_lower <= 2"], run=tmp_path / "run")
    assert result.verdict == "flagged" and result.facts["epsilon_lower"] > 2
    assert result.exit_code == 1 and result.metrics["epsilon_lower"].low > 2
    again = privacy(data, remembering, gates=["epsilon_lower <= 2"], run=tmp_path / "run", resume=True)
    assert again.content == result.content
    assert not accepted_fields(tmp_path / "run", 6, tmp_path / "copy")
    nothing = privacy(data, untrained)
    assert nothing.verdict == "unclear" and "learns nothing" in nothing.summary()["reasons"][0]


def test_a_delta_of_one_over_n_is_reported(data):
    reasons = privacy(data, untrained, delta=0.005, epsilon=0.5).summary()["reasons"]
    assert any("not smaller than 1/n" in reason for reason in reasons)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"delta": 0.05}, "at most 0.00 at delta=0.05.*give delta=0.0005 if the training claims this delta"),
        ({"epsilon": 4}, "at most 3.*canaries=400, canary='random'"),
        ({"epsilon": 8}, "give canaries=25600, delta=1e-06, canary='random' if the training"),
        ({"epsilon": 20}, "too large for a test by canaries"),
        ({"canaries": 150}, "more than half of the 240 examples.*canary='random'"),
        ({"epsilon": None}, "epsilon is missing"),
        ({"train": None}, "train is missing"),
        ({"train": "net.py"}, "expected a function in a Python file"),
    ],
)
def test_settings_without_a_meaningful_result_are_refused(data, settings, message):
    with pytest.raises(UsageError, match=message):
        privacy(data, **{"train": untrained, **settings})


def test_the_training_in_a_card_of_harden_is_repeated(data, tmp_path):
    settings = {"training": {"epochs": 40, "batch": 20, "lr": 0.02, "averaging": "none", "weight_decay": 0.0}}
    card = {"recipe": "standard", "settings": settings, "threat": "linf:0.1"}
    (tmp_path / "card.json").write_text(json.dumps(card))
    found = privacy(data, str(tmp_path))
    assert found.facts["training_accuracy"] > 0.9 and found.facts["epsilon_lower"] > 0.5
    settings["training"]["optimizer"] = "optim.py:make"
    (tmp_path / "card.json").write_text(json.dumps(card))
    with pytest.raises(UsageError, match=r"optim\.py:make.*not run"):
        privacy(data, str(tmp_path))


def test_the_claim_is_that_of_a_card_of_a_private_training(data, tmp_path):
    settings = {"epsilon": 4.0, "delta": 1e-6, "training": {"epochs": 1, "batch": 20}}
    card = {"recipe": "dp-sgd", "settings": settings, "threat": "linf:0.1"}
    (tmp_path / "card.json").write_text(json.dumps(card))
    with pytest.raises(UsageError, match="at delta=1e-06, and 4 is claimed"):
        privacy(data, str(tmp_path), epsilon=None)
    with pytest.raises(UsageError, match="at delta=0.0001, and 5 is claimed"):
        privacy(data, str(tmp_path), epsilon=5, delta=1e-4)


def test_networks_of_another_shape_and_without_finite_values_are_refused(data):
    def wide(x, y, seed):
        return nn.Linear(20, 4)

    def lost(x, y, seed):
        net = make()
        net[2].bias.data[0] = torch.nan
        return net

    with pytest.raises(TargetError, match="gives 4 logits for each input; expected 3"):
        privacy(data, wide)
    with pytest.raises(TargetError, match="not finite"):
        privacy(data, lost)


def test_the_command_line_needs_consent_for_the_function_of_a_configuration(
    data, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    code = "import torch\nmake = lambda: torch.nn.Linear(20, 3)\nfit = lambda x, y, seed: make()\n"
    Path("net.py").write_text(code)
    np.savez("data.npz", x=data[0].numpy(), y=data[1].numpy())
    Path("c.yaml").write_text("schema_version: 2\naudit-privacy:\n  train: net.py:fit\n  epsilon: 2\n")
    words = ["audit", "privacy", "net.py:make", "data.npz", "-c", "c.yaml"]
    assert command(words) == 2
    assert "the configuration refers to code (train: net.py:fit)" in capsys.readouterr().err
    assert command([*words, "--train", "net.py:fit", "--canaries", "100", "-o", "report.json"]) == 0
    assert "Unclear: epsilon is at least" in capsys.readouterr().err
