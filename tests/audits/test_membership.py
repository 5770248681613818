"""The audit of membership: its scores, rates, reference networks and controls, its verdicts and its errors."""

import json
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import holdfast
from benchmarks.forging import accepted_fields, forged, is_accepted
from holdfast.audits import membership_references
from holdfast.audits.membership_references import (
    LARGEST,
    ReferenceTraining,
    batched,
    halves,
    others,
    scaled_logit,
    signals_of,
    trained_signals,
)
from holdfast.cli.app import run as command
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.errors import HoldfastError, QueriesSpent, TargetError, UsageError
from servers import Server
from servers import examples as served_examples
from servers import network as served_network

FEATURES, CLASSES = 20, 4


def examples(n, seed=0):
    """Inputs with noisy labels, which a network can only remember."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, FEATURES, generator=generator)
    weights = torch.randn(FEATURES, CLASSES, generator=torch.Generator().manual_seed(99))
    return x, ((x - 0.5) @ weights + torch.randn(n, CLASSES, generator=generator)).argmax(1)


def make():
    return nn.Sequential(nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, CLASSES))


def fit(x, y, seed):
    net = make()
    optimizer = torch.optim.Adam(net.parameters(), 0.03)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net


def untrained(x, y, seed):
    return make()


def membership(model, data, **settings):
    return holdfast.audit.membership(model, data, **{"device": "cpu", "fpr": 0.05, **settings})


def drawn(networks, n=2000, seed=0):
    """Signals of networks whose members have higher ones, with halves; and those of one more network."""
    rng, ids = Draws(seed), torch.arange(n)
    inside = halves(ids, networks + 2, rng)
    difficulty = 2 * rng.at("difficulty").normal(ids, dtype=torch.float64)
    noise = rng.at("noise").normal(ids, networks + 2, dtype=torch.float64).T
    signals = difficulty + noise + 2 * inside
    return signals[0], signals[2:], inside[2:], inside[0]


def test_the_signal_is_the_logit_of_the_probability_and_finite():
    logits = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 2, 0, 1])
    p = logits.double().softmax(-1).gather(-1, y.expand(2, 5)[..., None])[..., 0]
    assert torch.allclose(scaled_logit(logits, y), torch.logit(p))
    sure = torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]])
    assert scaled_logit(sure, torch.tensor([0, 0])).tolist() == [LARGEST, -LARGEST]


def test_halves_are_balanced_and_complementary_and_do_not_depend_on_the_order():
    ids = torch.arange(101)
    inside = halves(ids, 6, Draws(1))
    assert (inside.sum(0) == 3).all()
    assert (inside[0] == ~inside[1]).all()
    assert not (inside[0] == inside[2]).all()
    order = torch.randperm(101)
    assert (halves(ids[order], 6, Draws(1)) == inside[:, order]).all()
    assert others(3, 6) == [0, 1, 4, 5]


def test_the_scores_are_those_of_their_formulas():
    target, references, inside, _ = drawn(64)
    x = 7
    mean, sd = references[:, x][inside[:, x]].mean(), references[:, x][inside[:, x]].std(correction=0)
    out, sd_out = references[:, x][~inside[:, x]].mean(), references[:, x][~inside[:, x]].std(correction=0)
    expected = stats.norm.logpdf(target[x], mean, sd) - stats.norm.logpdf(target[x], out, sd_out)
    assert float(membership_references.lira_online(target, references, inside)[x]) == pytest.approx(expected)
    assert float(membership_references.lira_offline(target, references, inside)[x]) == pytest.approx(
        float((target[x] - out) / sd_out)
    )
    p = references[:, x].sigmoid()
    ratio = target[x].sigmoid() / ((1.3 * p[~inside[:, x]].mean() + 0.7) / 2)
    plain = membership_references.rmia(target, references, inside, converted=False)
    assert float(plain[x].exp()) == pytest.approx(float(ratio))
    few = membership_references.lira_online(target, references[:4], inside[:4])
    overall = [references[:4][mask].std(correction=0) for mask in (inside[:4], ~inside[:4])]
    means = [references[:4, x][mask[:, x]].mean() for mask in (inside[:4], ~inside[:4])]
    densities = [stats.norm.logpdf(target[x], m, s) for m, s in zip(means, overall, strict=True)]
    assert float(few[x]) == pytest.approx(densities[0] - densities[1])


def test_the_predictive_distribution_is_a_student_t():
    x, freedom, location, scale = (torch.tensor(v, dtype=torch.float64) for v in (1.5, 7.0, 0.3, 2.0))
    assert float(membership_references._student(x, freedom, location, scale)) == pytest.approx(
        stats.t.logpdf(1.5, 7, 0.3, 2)
    )


@pytest.mark.parametrize("networks", [2, 4, 16])
def test_members_are_found_with_few_references(networks):
    target, references, inside, member = drawn(networks)
    ours = membership_references.tpr(membership_references.bavaria(target, references, inside), member, 0.05)
    alone = membership_references.tpr(membership_references.loss(target), member, 0.05)
    lira = membership_references.tpr(
        membership_references.lira_online(target, references, inside), member, 0.05
    )
    assert ours > lira - 0.01
    assert ours > alone + 0.15


def test_a_network_without_references_is_scored_by_its_labels_and_its_tail():
    right = torch.tensor([True, False, True])
    assert membership_references.labels_only(right, None, None).tolist() == [1.0, 0.0, 1.0]
    references = torch.tensor([[True, True, False], [False, True, True]])
    inside = torch.tensor([[True, False, True], [False, True, False]])
    assert membership_references.labels_only(right, references, inside).tolist() == [1.0, -1.0, 0.0]
    members, others_ = torch.arange(100.0), torch.tensor([-3.0, -2.0, 50.0, 60.0])
    assert membership_references.tail_estimate(members, others_, 0.01) == 0.5


def test_a_balanced_design_reveals_members_only_through_the_complement():
    inside = halves(torch.arange(400), 8, Draws(0))
    counts = inside[[k for k in range(8) if k != 0]].sum(0).double()
    assert membership_references.auc(-counts, inside[0]) == 1.0
    assert membership_references.auc(-inside[others(0, 8)].sum(0).double(), inside[0]) == 0.5


def test_rates_count_ties_against_the_attacker():
    score = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    member = torch.tensor([True, True, True, True, False, False, False, False])
    assert membership_references.tpr(score, member, 0.1) == 0.0
    assert membership_references.tpr(score, member, 0.25) == 0.75
    assert membership_references.auc(score, member) == pytest.approx((3 * 3 + 3 * 0.5 + 3 * 0.5) / 16)
    assert membership_references.tpr(torch.zeros(8), member, 0.25) == 0.0


def test_the_interval_of_one_network_contains_the_true_rate():
    exact, fpr = 1 - stats.norm.cdf(stats.norm.ppf(0.99) - 1), 0.01
    contained = 0
    for seed in range(60):
        values = Draws(seed).normal(torch.arange(2400), dtype=torch.float64)
        member = torch.arange(2400) < 1200
        estimate = membership_references.tpr_of_one(values + member, member, fpr)
        assert estimate.low <= estimate.value <= estimate.high
        contained += estimate.low <= exact <= estimate.high
    assert contained >= 57


def test_a_rate_with_fewer_than_ten_false_positives_is_refused():
    membership_references.refuse_few(0.01, 1000)
    with pytest.raises(UsageError, match=r"expects 1 false positives among 1,000 .* 10,000 non-members"):
        membership_references.refuse_few(0.001, 1000)
    with pytest.raises(UsageError, match="give fpr=0.05"):
        membership_references.refuse_few(0.01, 200)


def test_networks_are_trained_as_one_as_they_are_alone():
    torch.manual_seed(0)
    x, y = examples(60)
    nets = [make() for _ in range(4)]
    inside = halves(torch.arange(60), 4, Draws(0))
    how, draws = ReferenceTraining(epochs=3, batch=8), [Draws(k) for k in range(4)]
    assert batched(nets, x)
    together = trained_signals(deepcopy(nets), x, y, inside, how, draws)
    for k in range(4):
        alone = trained_signals([nets[k]], x, y, inside[k : k + 1], how, draws[k : k + 1])
        assert torch.allclose(together.scaled_logit[k], alone.scaled_logit[0], atol=1e-4)
    assert not torch.allclose(together.scaled_logit[0], signals_of(make()(x), y).scaled_logit[0], atol=0.1)


def test_networks_with_a_state_are_trained_one_after_another():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(FEATURES, CLASSES)

        def forward(self, x):
            return self.linear(x) if x.sum() > 0 else self.linear(-x)

    x, y = examples(40)
    inside = halves(torch.arange(40), 2, Draws(0))
    for kind in (lambda: nn.Sequential(nn.Linear(FEATURES, CLASSES), nn.BatchNorm1d(CLASSES)), Branching):
        nets = [kind(), kind()]
        assert not batched(nets, x)
        signals = trained_signals(nets, x, y, inside, ReferenceTraining(1), [Draws(0), Draws(1)])
        assert signals.scaled_logit.shape == (2, 40)


@pytest.mark.slow
def test_a_training_that_remembers_is_flagged_and_one_that_does_not_is_not():
    data = examples(1200)
    result = membership(make(), data, train=fit, references=8)
    facts = result.facts
    assert result.verdict == "flagged"
    assert facts["targets"] == 8 and facts["references_of_each_target"] == 6
    assert facts["attack"] == "BaVarIA" and facts["tpr"] > 0.08
    assert 0.45 < facts["null_auc"] < 0.55 and 0.45 < facts["blind_auc"] < 0.55
    assert facts["accuracy_members"] > facts["accuracy_non_members"] + 0.1
    assert not result.metrics  # at 1 % there are too few non-members
    (curve,) = result.summary()["curves"]
    assert [line["name"] for line in curve["lines"]] == ["BaVarIA", "loss", "chance"]
    honest = membership(make(), data, train=untrained, references=4)
    assert honest.verdict == "not flagged" and 0.45 < honest.facts["attacks"]["BaVarIA"]["auc"] < 0.55


@pytest.mark.slow
def test_this_model_is_compared_with_non_members_without_and_with_references():
    members, outside = examples(1000), examples(1000, seed=1)
    net = fit(*members, 0)
    alone = membership(
        net, members, non_members=outside, fpr=0.01, gates=["membership_tpr_at_1_percent <= 0.5"]
    )
    assert alone.facts["attack"] == "loss" and alone.facts["networks"] == 0
    assert (alone.verdict, alone.exit_code) in (("flagged", 0), ("unclear", 4))
    assert alone.facts["tail_estimate"] > alone.facts["tpr"]
    informed = membership(net, members, non_members=outside, references=6, train=fit)
    assert informed.verdict == "flagged" and informed.facts["attack"] == "BaVarIA"
    assert informed.facts["attacks"]["BaVarIA"]["tpr"] > informed.facts["attacks"]["loss"]["tpr"]


def test_non_members_of_another_kind_make_the_result_unclear():
    members, (x, y) = examples(400), examples(400, seed=1)
    result = membership(fit(*members, 0), members, non_members=(x * 0.8, y))
    assert result.verdict == "unclear"
    assert "differ in kind" in result.summary()["reasons"][0]
    assert str(result) == "Unclear: members and non-members differ in kind, so that no rate is stated"


def test_the_table_has_a_column_for_the_chosen_rate_and_only_examples_that_are_found():
    result = membership(make_once(), examples(400), non_members=examples(400, 1), fpr=0.07).summary()
    assert "TPR at 7 % FPR" in result["tables"][0]["headings"]
    assert "each target has 400 members and 400 non-members" in result["reasons"]
    exposed = [table for table in result["tables"] if table["title"].startswith("Most exposed")]
    assert all(row[2] == "100 %" for table in exposed for row in table["rows"])

    def constant(x):
        return torch.zeros(len(x), CLASSES) + torch.tensor([1.0, 0.0, 0.0, 0.0])

    nothing = membership(constant, examples(400), non_members=examples(400, 1)).summary()
    assert not any(table["title"].startswith("Most exposed") for table in nothing["tables"])


@pytest.mark.slow
def test_the_training_of_a_hardened_folder_is_repeated(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (x, y), (x_test, y_test) = examples(800), examples(100, 1)
    np.savez("data.npz", x_train=x.numpy(), y_train=y.numpy(), x_test=x_test.numpy(), y_test=y_test.numpy())
    Path("net.py").write_text(WORKED)
    harden = [
        "harden",
        "net.py:make",
        "data.npz",
        "--recipe",
        "standard",
        "--threat",
        "linf:0.01",
        "-n",
        "50",
    ]
    assert command([*harden, "--set", "recipe.training.epochs=2", "--no-doubts", "-o", "hard/"]) in (0, 1)
    audit = ["audit", "membership", "net.py:make", "data.npz", "--train", "hard/", "--references", "4"]
    assert command([*audit, "--fpr", "0.1", "-o", "report.json"]) == 0
    report = json.loads(Path("report.json").read_text())
    assert report["config"]["settings"]["train"]["name"].endswith("card.json")
    assert report["facts"]["members"] == report["facts"]["non_members"] == 400
    assert any("800 examples of the split train are audited" in note for note in report["notes"])


def test_a_gate_of_an_unclear_audit_is_unclear():
    members, (x, y) = examples(1000), examples(1000, seed=1)
    result = membership(
        make(), members, non_members=(x * 0.8, y), fpr=0.01, gates=["membership_tpr_at_1_percent <= 0.9"]
    )
    assert result.exit_code == 4


def test_overlaps_copies_and_other_shapes_are_handled():
    members, (x, y) = examples(400), examples(400, seed=1)
    x[5] = members[0][3]
    with pytest.raises(
        UsageError, match=r"1 of the 400 non-members are also among the members, such as row 5 \(row 3"
    ):
        membership(make(), members, non_members=(x, y))
    with pytest.raises(HoldfastError, match="10"):
        membership(make(), members, non_members=(x[:, :10], y))
    twice = tuple(torch.cat((part, part[:7])) for part in members)
    result = membership(make(), twice, train=untrained, references=4)
    assert "7 examples are copies" in " ".join(result.summary()["notes"])
    assert result.facts["members"] == 200


def test_requests_that_cannot_be_measured_are_refused():
    data = examples(400)
    with pytest.raises(UsageError, match="a model alone does not show") as alone:
        membership(make(), data)
    assert [remedy.argument for remedy in alone.value.remedies] == ["non_members", "references"]
    with pytest.raises(UsageError, match="references is 2; expected an even number of at least 4"):
        membership(make(), data, references=2)
    with pytest.raises(UsageError, match="references is 5"):
        membership(make(), data, non_members=examples(400, 1), references=5)
    with pytest.raises(UsageError, match="fpr is 0.01"):
        membership(make(), data, references=4, fpr=0.01)
    with pytest.raises(UsageError, match="1,000 non-members"):
        membership(make(), data, references=4, gates=["membership_tpr_at_1_percent <= 0.05"])


def test_a_training_function_that_ignores_its_seed_or_returns_another_network():
    data = examples(400)

    def stubborn(x, y, seed):
        torch.manual_seed(3)
        return fit(x, y, seed)

    result = membership(make(), data, train=stubborn, references=4)
    assert any("returns the same network for two seeds" in text for text in result.summary()["limits"])
    with pytest.raises(TargetError, match="gives 3 logits for each input; expected 4"):
        membership(make(), data, train=lambda x, y, seed: nn.Linear(FEATURES, 3), references=4)


class Rounded(nn.Module):
    """Probabilities with four decimals, or the predicted label alone."""

    def __init__(self, net, *, labels=False):
        super().__init__()
        self.net, self.labels = net, labels

    def forward(self, x):
        p = self.net(x).softmax(1)
        return nn.functional.one_hot(p.argmax(1), CLASSES).float() if self.labels else p.round(decimals=4)


def test_rounded_probabilities_and_labels_are_noticed():
    members, outside = examples(400), examples(400, seed=1)
    net = fit(*members, 0)
    rounded = membership(
        holdfast.open_model(Rounded(net), model_output="probability"), members, non_members=outside
    )
    assert rounded.facts["rounded"] and any("rounding" in text for text in rounded.summary()["limits"])
    assert not membership(net, members, non_members=outside).facts["rounded"]
    labels = membership(Rounded(net, labels=True), members, non_members=outside)
    assert labels.facts["labels_only"] and labels.facts["attack"] == "label only"
    assert any("gives labels only" in text for text in labels.summary()["limits"])


def test_a_procedure_whose_networks_give_labels_or_undeclared_probabilities_is_noticed():
    def given(kind):
        return lambda x, y, seed: kind(fit(x, y, seed))

    labels = membership(
        make(), examples(400), train=given(lambda net: Rounded(net, labels=True)), references=4
    )
    assert labels.facts["labels_only"] and labels.facts["attack"] == "label only"
    assert not labels.facts["rounded"] and not labels.facts["undeclared_probabilities"]
    softmax = given(lambda net: nn.Sequential(net, nn.Softmax(1)))
    scaled = membership(make(), examples(400), train=softmax, references=4)
    assert scaled.facts["undeclared_probabilities"] and not scaled.facts["labels_only"]
    model = holdfast.open_model(nn.Sequential(make(), nn.Softmax(1)), model_output="probability")
    declared = membership(model, examples(400), train=softmax, references=4)
    assert not declared.facts["undeclared_probabilities"]


def test_a_stopped_audit_does_not_train_its_networks_again(tmp_path):
    data, trained, most = examples(400), [], [18]

    def counted(x, y, seed):
        if len(x) == 200:
            if len(trained) == most[0]:
                raise KeyboardInterrupt
            trained.append(seed)
        return untrained(x, y, seed)

    settings = {"train": counted, "references": 18}
    whole = membership(make_once(), data, **settings)
    assert len(set(trained)) == 18
    trained.clear()
    most[0] = 17
    with pytest.raises(KeyboardInterrupt):
        membership(make_once(), data, run=tmp_path / "run", **settings)
    trained.clear()
    resumed = membership(make_once(), data, run=tmp_path / "run", resume=True, **settings)
    assert len(trained) == 2
    assert resumed.facts == whole.facts


def make_once():
    torch.manual_seed(0)
    return make()


def test_the_command_writes_reports_with_the_most_exposed_images(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x, y = examples(400)
    images = torch.cat((x, x), 1)[:, :36].reshape(400, 1, 6, 6)
    np.savez("data.npz", x=images.numpy(), y=y.numpy(), half=np.arange(400) % 2)
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(36, 4))\n"
        "def fit(x, y, seed):\n    return make()\n"
    )
    arguments = ["audit", "membership", "net.py:make", "data.npz", "--references", "4", "--fpr", "0.1"]
    arguments += ["--train", "net.py:fit", "--groups", "half"]
    assert command([*arguments, "--run", "r", "-o", "report.html", "-o", "report.md"]) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "The most exposed training examples" in page and '<path class="line line-1"' in page
    assert "Groups" in page
    capsys.readouterr()
    assert command(["verify", "r"]) == 0
    assert not accepted_fields(Path("r"), 6, Path("copy"))
    assert command(["report", "r", "-o", "again.md"]) == 0
    assert (tmp_path / "again.md").read_text() == (tmp_path / "report.md").read_text()
    assert command([*arguments[:4]]) == 2
    assert "--non-members" in capsys.readouterr().err


def test_the_blind_classifier_finds_labels_spreads_and_nothing():
    x, y = examples(1200)
    member = torch.arange(1200) < 600

    def auc(x, y):
        batch = Batch(x, y, torch.arange(1200))
        return membership_references.auc(
            membership_references.blind_scores(batch, member, CLASSES, Draws(0)), member
        )

    assert 0.45 < auc(x, y) < 0.55
    assert auc(torch.where(member[:, None], x, 0.5 + (x - 0.5) * 0.6), y) > 0.7
    assert auc(x, torch.where(member, y, y.clamp_max(2))) > 0.55


def test_a_server_answers_each_row_once_and_needs_a_function_for_references(tmp_path):
    (x, y), (other_x, _) = served_examples(300), served_examples(300, seed=1)
    data, outside = (x[2:], y[2:]), (other_x, served_network(other_x).argmax(1))
    with Server() as server:
        model = holdfast.open_model(server.url(), allow_hosts=[server.host])
        settings = {"non_members": outside, "run": tmp_path / "run", "fpr": 0.1}
        with pytest.raises(UsageError, match="model is behind a server") as refused:
            membership(model, data, **{**settings, "references": 4})
        assert [remedy.argument for remedy in refused.value.remedies] == ["train"]
        limited = holdfast.open_model(server.url(), allow_hosts=[server.host], max_queries=400)
        with pytest.raises(QueriesSpent):
            membership(limited, data, **settings)
        assert len(server.rows) <= 400
        result = membership(model, data, resume=True, **settings)
        assert len(server.rows) == result.facts["rows_sent"]
        assert len(server.rows) < 598 + 300
        finding = json.loads((tmp_path / "run" / "finding.json").read_text())
        changed = forged(finding, ("facts", "rows_sent"), 0)
        assert not is_accepted(tmp_path / "run", changed, tmp_path / "copy")
    assert result.verdict == "unclear"


WORKED = """
import torch
from torch import nn


def make():
    return nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 4))


def fit(x, y, seed):
    net = make()
    optimizer = torch.optim.SGD(net.parameters(), 0.5)
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net
"""


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """A folder with data and code, as the current one, and a function that audits there and returns what is stored."""
    monkeypatch.chdir(tmp_path)
    x, y = examples(400)
    np.savez("data.npz", x=x.numpy(), y=y.numpy())
    Path("net.py").write_text(WORKED)

    def audited(run, *more, run_command=command):
        arguments = ["audit", "membership", "net.py:make", "data.npz", "--fpr", "0.1", "--run", run, *more]
        assert run_command(arguments) == 0
        assert command(["verify", run]) == 0
        return {
            path.name: path.read_bytes()
            for path in sorted(Path(run).rglob("*"))
            if path.suffix in (".safetensors", ".json")
            and path.name in ("networks.safetensors", "finding.json")
        }

    return audited


def test_two_workers_leave_the_bytes_of_one_process(in_folder):
    references = ["--references", "4", "--train", "net.py:fit"]
    alone = in_folder("alone", *references)
    assert len(alone) == 2
    assert in_folder("two", *references, "--workers", "2") == alone


def in_a_process(arguments):
    """The exit code of a command in a process of its own. Ray decides once in a process whether it has a token, and
    tests of another file use a cluster without one.
    """
    return subprocess.run([sys.executable, "-P", "-m", "holdfast", *arguments], check=False).returncode


@pytest.mark.long
@pytest.mark.slow
def test_a_worker_and_a_cluster_leave_the_bytes_of_one_process(in_folder):
    pytest.importorskip("ray", reason='Ray is not installed: pip install "holdfast-ml[scale]"')
    references = ["--references", "10", "--epochs", "2"]
    alone = in_folder("alone", *references)
    assert in_folder("one", *references, "--workers", "1") == alone
    assert (
        in_folder("cluster", *references, "--workers", "2", "--on", "ray", run_command=in_a_process) == alone
    )


def test_the_training_of_networks_reports_its_progress():
    steps = []
    settings = {"references": 10, "epochs": 3, "fpr": 0.1, "progress": steps.append}
    membership(make_once(), examples(400), **settings)
    done = [step.done for step in steps if step.stage == "networks"]
    assert done == sorted(done) and done[-1] == 30 == steps[0].of
    assert {8, 16, 24, 26, 28} <= set(done)


def test_workers_without_networks_to_train_are_refused():
    with pytest.raises(UsageError, match="none are trained") as refused:
        membership(make(), examples(400), non_members=examples(400, 1), workers=2)
    assert [remedy.argument for remedy in refused.value.remedies] == ["references", "workers"]
