"""Attacks that begin with the stored adversarial examples of an earlier run."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import holdfast
from holdfast.attacks import PGD
from holdfast.cli.app import run
from holdfast.core.errors import UsageError

N = 40
X = torch.rand(N, 6, generator=torch.Generator().manual_seed(1))
ATTACKS = [PGD(steps=5), PGD(steps=5, restarts=2)]


def network(shift=0.0):
    """A network of two layers, whose weights are moved by up to `shift`."""
    rng = torch.Generator().manual_seed(2)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    with torch.no_grad():
        for weights in net.parameters():
            weights.copy_(torch.randn(weights.shape, generator=rng))
        for weights in net.parameters():
            weights.add_(shift * (2 * torch.rand(weights.shape, generator=rng) - 1))
    return net


with torch.no_grad():
    Y = network()(X).argmax(1)


def assess(shift=0.0, threat="linf:0.3", x=X, y=Y, attacks=ATTACKS, **settings):
    return holdfast.assess(network(shift), (x, y), threat, attacks, **settings)


def broken_ids(result):
    evidence = result.evidence
    return set(evidence["id"][evidence["success"] & evidence["correct"]].tolist())


@pytest.fixture(scope="module")
def earlier():
    result = assess(save_adversarial=True)
    assert 5 < len(broken_ids(result)) < N - 5
    return result


BLIND = {"threat": "linf:0.3,access=scores,queries=20", "attacks": ["square"]}


@pytest.mark.parametrize("threat", ["linf:0.3", "linf:0.2", "linf:0.4", BLIND["threat"]])
@pytest.mark.parametrize("full", [False, True])
def test_a_baseline_breaks_no_fewer_examples_and_leaves_the_draws_of_the_other_attacks(earlier, threat, full):
    attacks = ATTACKS
    if "scores" in threat:
        attacks, earlier = ["square"], assess(**BLIND, save_adversarial=True)
    fresh, based = (assess(0.05, threat, attacks=attacks, baseline=run, full=full) for run in (None, earlier))
    first, *others = based.attacks
    assert first.name == "Baseline" and first.stage == "0-baseline"
    assert [each.stage for each in others] == [each.stage for each in fresh.attacks]
    assert broken_ids(fresh) <= broken_ids(based)
    untouched = ~based.evidence["success"]
    for name in ("adversarial_prediction", "distance_linf", "right_probability"):
        if name in fresh.evidence:
            assert torch.equal(based.evidence[name][untouched], fresh.evidence[name][untouched])


def test_on_the_same_model_each_stored_input_breaks_its_example_with_one_query(earlier):
    based = assess(baseline=earlier)
    reuse = based.attacks[0].reuse
    assert reuse.tried == reuse.transferred == reuse.broke == reuse.queries == len(broken_ids(earlier))
    broken = earlier.evidence["success"] & earlier.evidence["correct"]
    assert reuse.earlier_queries == int(earlier.evidence["queries"][broken].sum())
    assert broken_ids(based) == broken_ids(earlier)
    assert based["regression"].value == 0


def test_examples_are_found_by_their_inputs_and_not_by_their_places(earlier):
    order = torch.arange(N - 1, 9, -1)
    based = holdfast.assess(network(), (X[order], Y[order]), "linf:0.3", ATTACKS, baseline=earlier)
    stored = {N - 1 - id_ for id_ in broken_ids(earlier) if id_ > 9}
    assert based.attacks[0].reuse.transferred == len(stored)
    assert stored <= broken_ids(based)


def test_unusable_baselines_are_refused_or_only_compared_with(earlier):
    empty = assess()
    with pytest.raises(
        UsageError,
        match="stores no adversarial examples of its suite; a run with save_adversarial stores them",
    ):
        assess(0.05, baseline=empty)
    for threat, attacks, message in (
        ("l2:0.1", ATTACKS, "is a run under linf:0.3, and the threat is l2:0.1"),
        ("linf", "minimum-norm", "the suite searches for the smallest change"),
    ):
        with pytest.raises(UsageError, match=message):
            assess(0.05, threat, attacks=attacks, baseline=earlier)
    gated = assess(0.05, baseline=empty, gates=["regression <= 1 vs baseline"])
    assert any("no attack begins with the baseline" in note for note in gated.evidence.notes)
    assert [each.name for each in gated.attacks] == ["PGD", "PGD"]


def test_examples_of_an_attacker_with_more_access_are_refused(earlier):
    few = assess(threat="linf:0.3,access=scores,queries=30", attacks=["square"], save_adversarial=True)
    for baseline, threat, message in (
        (
            earlier,
            BLIND["threat"],
            "whose attacks had access to gradients, which the threat linf:0.3,access=scores",
        ),
        (few, BLIND["threat"], "whose attacks had 30 queries"),
        (earlier, "linf:0.3,queries=900", "whose attacks had any number of queries"),
    ):
        with pytest.raises(UsageError, match=message):
            assess(threat=threat, attacks=BLIND["attacks"], baseline=baseline)
    assert assess(baseline=few).attacks[0].reuse.tried  # of an attacker with less access


def test_a_baseline_of_other_data_is_refused_before_the_clean_pass(earlier):
    steps = []
    with pytest.raises(UsageError, match=r"of \d+ inputs of data in memory; none .* among the 1 example of"):
        assess(x=X[:1] * 0.5, y=Y[:1], baseline=earlier, progress=steps.append)
    assert not steps


def test_a_run_is_resumed_after_its_baseline_was_judged_again(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    earlier = assess(save_adversarial=True, run=first)
    based = assess(0.05, baseline=str(first), run=second)
    assess(save_adversarial=True, run=first, resume=True, gates=["robust_accuracy >= 0.5"])
    assert holdfast.verify(first).head != earlier.about["hashes"]["chain"]
    assert assess(0.05, baseline=str(first), run=second, resume=True).attacks == based.attacks


@pytest.mark.slow
def test_the_command_resumes_verifies_and_reports_with_a_baseline(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["assess", "mnist-cnn", "mnist-mini", "-n", "30", "--suite", "quick", "--no-doubts"]
    assert run([*words, "-t", "linf:0.1", "--save-adversarial", "--run", "a"]) == 0
    based = [*words, "-t", "linf:0.11", "--baseline", "a", "-o", "b.json", "-o", "b.md", "-o", "b.html"]
    assert run([*based, "--run", "b"]) == 0
    said = capsys.readouterr().out
    content = json.loads(Path("b.json").read_text())
    stored = content["attacks"][0]["baseline"]
    assert stored["tried"] == stored["broke"] > 0 and stored["queries"] < stored["earlier_queries"]
    line = "the stored adversarial examples of the earlier run broke"
    assert all(line in text for text in (said, Path("b.md").read_text(), Path("b.html").read_text()))
    assert content["attacks"][0]["settings"]["contents"]
    assert run(["verify", "b"]) == 0
    assert run([*based, "--run", "b", "--resume"]) == 0
    assert run([*words, "-t", "linf:0.11", "--run", "b", "--resume"]) != 0  # the plan is another one
    assert run([*based, "--run", "c", "--workers", "2", "-o", "c.json"]) == 0
    measured = json.loads(Path("c.json").read_text())
    assert measured["metrics"] == content["metrics"]
    assert measured["attacks"][0]["baseline"] == stored
