"""What a run measures, refuses, and says on the way."""

import math
import sys
from dataclasses import replace

import pandas as pd
import pytest
import torch

from holdfast.attacks import APGD, DDN, FMN, PGD
from holdfast.attacks.parts.losses import dlr
from holdfast.core.constraints import L0, L1, L2, Linf, extent
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.evidence import Evidence
from holdfast.core.model import Bounds, Classifier
from holdfast.core.threat import ThreatModel
from holdfast.doubts.probing import doubt_tests
from holdfast.gates.grammar import parse
from holdfast.io.data.loaders import as_data
from holdfast.metrics.comparisons import basis
from holdfast.runs.assess.assess import assess
from holdfast.runs.assess.request import DescribedModel
from holdfast.runs.documents.stored_runs import Comparison, new_folder, open_run, runs_in
from holdfast.runs.harness.measure import measure
from holdfast.runs.harness.stage import Member
from runs.fakes import CLASSES, FAST, FEATURES, SMALLEST, THOROUGH, N, data, network, order, settled, subject
from runs.stored import WEAK


def uniform(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(5))


def same(one: Evidence, other: Evidence):
    for name in ("columns", "gallery", "transfer"):
        mine, theirs = getattr(one, name), getattr(other, name)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    for name in (
        "threat",
        "suite",
        "attacks",
        "seed",
        "doubts",
        "model",
        "data",
        "notes",
        "cost",
        "doubts_cost",
        "surrogates",
    ):
        assert getattr(one, name) == getattr(other, name), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "asked",
    [
        order(doubts="all"),
        order(FAST, suite="", attacked=False),
        order(threat=ThreatModel(Linf(0.06), goal=1), attacked=False),
        order(SMALLEST, threat=ThreatModel(L2(math.inf)), smallest=True, attacked=False),
        order(threat=ThreatModel(L0(2, "value"), access="gradients", queries=50)),
        order(doubts="none", curve=(SMALLEST,), full=True, keep_adversarial=True),
        order(time_budget_s=1e-9),
    ],
    ids=["suite", "list", "targeted", "smallest", "budget", "full", "no-time"],
)
def test_stored_values_are_read_back_exactly(tmp_path, asked):
    if asked.plan.threat.goal is not None:
        asked = replace(asked, gates=())
    if asked.plan.smallest:
        asked = replace(asked, gates=(parse("robust_accuracy@0.3 >= 0.1"),))
    kept = assess(subject(), data(), asked, run=tmp_path / "run")
    back = open_run(tmp_path / "run")
    same(kept.evidence, back.evidence)
    assert back.gates == kept.gates
    assert back.exit_code == kept.exit_code
    assert back.summary() == kept.summary()


def test_a_run_finds_what_the_harness_finds():
    shared = [data().read(0, N)]
    direct = measure(subject().model, shared, [FAST.attack], ThreatModel(Linf(0.06)), seed=3)
    run = assess(subject(), data(), order(FAST, attacked=False)).evidence
    assert torch.equal(run["success"], direct["success"])
    torch.testing.assert_close(run["distance_l2"], direct["distance_l2"])


def test_the_model_is_unchanged_afterwards():
    net = network().train()
    given = subject(net)
    given.model.train()
    assess(given, data(), order())
    assert all(module.training for module in net.modules())
    assert all(weight.requires_grad for weight in net.parameters())


@pytest.mark.slow
def test_progress_increases_and_ends_complete():
    steps = []
    result = assess(
        subject(), data(), order(doubts="all", shard_size=15, batch_size=4), progress=steps.append
    )
    places = [(step.place, step.done) for step in steps]
    assert places == sorted(places)
    for name in ("clean", "1-pgd", "2-pgd-again", "fixed-pgd"):
        last = [step for step in steps if step.stage == name][-1]
        assert (last.done, last.of, last.seen) == (N, N, N)
    surviving = int((result.evidence["correct"] & ~result.evidence["suite_success"]).sum())
    assert steps[-1].surviving == surviving
    assert steps[-1].place == steps[-1].of_stages == 5
    bounds = [step.surviving / step.n for step in steps if step.seen == step.n]
    assert bounds == sorted(bounds, reverse=True)
    assert (
        len({step.surviving for step in steps if step.stage == "1-pgd"}) > 1 + 3
    )  # also within its three shards
    assert result.metrics["robust_accuracy"].value <= bounds[-1]


def test_no_bound_of_the_robust_accuracy_is_shown_for_a_targeted_attack():
    steps = []
    asked = order(threat=ThreatModel(Linf(0.06), goal=0), gates=("targeted_success_rate <= 1",))
    assess(subject(), data(), asked, progress=steps.append)
    assert {step.n for step in steps} == {None}


def test_an_expired_time_is_reported_and_raises_a_doubt(tmp_path):
    asked = order(
        time_budget_s=1e-9, doubts="all", gates=("robust_accuracy >= 0.01", "clean_accuracy >= 0.1")
    )
    result = assess(subject(), data(), asked, run=tmp_path / "run")
    meaning = "a longer run may break more, so robust accuracy is an upper bound"
    assert f"time ran out: PGD and PGD-again finished none; {meaning}" in result.evidence.notes
    passed = (
        "time ran out: the pass of PGD-40 on every example was not finished, so entropy, margin, precision"
    )
    assert any(note.startswith(passed) for note in result.evidence.notes)
    assert "attacked_prediction" not in result.evidence
    assert {d.name: d.state for d in result.doubts}["not-exhausted"] == "raised"
    assert [gate.verdict for gate in result.gates] == ["unclear", "unclear"]
    assert result.exit_code == 4
    again = assess(subject(), data(), asked, run=tmp_path / "run", resume=True)
    assert again.exit_code == 4
    same(again.evidence, result.evidence)


def test_a_finished_run_that_is_reported_again_without_its_gates_keeps_its_verdict(tmp_path):
    failed = assess(subject(), data(), order(FAST, gates=("robust_accuracy >= 0.99",)), run=tmp_path / "run")
    again = assess(subject(), data(), order(FAST, gates=()), run=tmp_path / "run", resume=True)
    assert again.exit_code == failed.exit_code == open_run(tmp_path / "run").exit_code == 1
    assert again.gates == failed.gates
    answered = order(FAST, gates=(), accepted={"not-exhausted": "seen"})
    assert assess(subject(), data(), answered, run=tmp_path / "run", resume=True).exit_code == 1
    kept = open_run(tmp_path / "run")
    assert (kept.exit_code, dict(kept.accepted_doubts)) == (1, {"not-exhausted": "seen"})
    other = assess(
        subject(), data(), order(FAST, gates=("clean_accuracy >= 0.1",)), run=tmp_path / "run", resume=True
    )
    assert other.exit_code == open_run(tmp_path / "run").exit_code == 0


def test_a_run_whose_model_or_threat_was_altered_is_not_reported(tmp_path):
    assess(subject(), data(), order(FAST), run=tmp_path / "run")
    named = tmp_path / "run" / "run.json"
    named.write_text(named.read_text().replace("0.06", "0.6"))
    with pytest.raises(TargetError, match="run.json' is not what the chain recorded; restore it from a copy"):
        open_run(tmp_path / "run")


def test_time_that_runs_out_midway_keeps_what_was_found(clock):
    def progress(step):
        if step.stage == "1-pgd" and step.done >= 15:
            clock.now = 1e6

    result = assess(subject(), data(), order(time_budget_s=1000.0, shard_size=15), progress=progress)
    tried = result.evidence["queries"] > 0
    assert tried[:15].any() and not tried[15:].any()
    (told,) = (note for note in result.evidence.notes if "PGD finished" in note)
    assert told.startswith(
        "time ran out: PGD finished 15 of 40 examples, PGD-again finished none; a longer run"
    )
    assert result.evidence["distance_linf"][15:][result.evidence["correct"][15:]].isinf().all()


def test_time_that_runs_out_inside_an_attack_stops_it_there(tmp_path, clock):
    calls = []

    class Slow(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            calls.append(len(x))
            if len(calls) == 12:
                clock.now = 1e6
            return self.inner(x)

    long = Member("PGD", PGD(steps=50, drop=False))
    asked = order(long, suite="", attacked=False, time_budget_s=1000.0)
    result = assess(subject(Slow()), data(), asked, run=tmp_path / "run")
    assert len(calls) <= 14
    assert any("PGD finished none" in note for note in result.evidence.notes)
    assert not result.evidence["success"].any()
    clock.now = 0.0
    same(
        assess(subject(network()), data(), asked, run=tmp_path / "run", resume=True).evidence, result.evidence
    )


@pytest.mark.parametrize(
    "x, says",
    [
        (uniform(4, FEATURES).double() * 200 + 50, "divide them by 255"),
        (uniform(4, FEATURES).double() * 4 - 2, "data_normalised=.*bounds="),
        (
            uniform(4, FEATURES).double() * 1000 + 300,
            "give bounds=.* use the limits of your training",
        ),
        (torch.full((4, FEATURES), math.nan).double(), "NaN or infinity, first in row 0"),
    ],
)
def test_inputs_outside_the_bounds_are_refused_with_the_range_seen(x, says):
    with pytest.raises(TargetError, match=says):
        assess(subject(), Raw(x, torch.zeros(4, dtype=torch.int64)), order())


def test_inputs_are_looked_at_in_every_shard():
    x = uniform(N, FEATURES).double()
    x[-1, 0] = 3.0
    with pytest.raises(TargetError, match="range from .* to 3, outside the bounds 0 to 1"):
        assess(subject(), Raw(x, torch.zeros(N, dtype=torch.int64)), order())


@pytest.mark.parametrize(
    "y, says", [(CLASSES, "appear to count from 1: subtract 1"), (99, "check the label column"), (-1, "")]
)
def test_labels_that_are_no_classes_are_refused(y, says):
    labels = torch.tensor([1, 1, 2, y] if y == CLASSES else [0, 1, 2, y])
    with pytest.raises(
        TargetError, match=rf"labels of raw range from .* but the model has 4 classes \(0 to 3\).*{says}"
    ):
        assess(subject(), Raw(uniform(4, FEATURES).double(), labels), order())


def test_no_example_is_refused():
    with pytest.raises(TargetError, match="is empty; at least one example is needed"):
        assess(subject(), Raw(uniform(0, FEATURES), torch.zeros(0)), order())


@pytest.mark.parametrize(
    "norm, farthest", [(Linf, 1.0), (L2, math.sqrt(FEATURES)), (L1, FEATURES), (L0, FEATURES)]
)
def test_an_eps_beyond_the_box_is_refused(norm, farthest):
    x = uniform(1, FEATURES)
    assert extent(norm(), x, Bounds()) == pytest.approx(farthest)
    with pytest.raises(UsageError, match="no two inputs inside the bounds are further apart than"):
        assess(subject(), data(), order(FAST, threat=ThreatModel(norm(1.01 * farthest))))


def test_the_extent_states_bounds_of_each_feature_and_of_pixels():
    bounds = Bounds(torch.zeros(FEATURES), torch.arange(FEATURES).float())
    x = uniform(1, FEATURES)
    assert extent(Linf(), x, bounds) == FEATURES - 1
    assert extent(L1(), x, bounds) == FEATURES * (FEATURES - 1) / 2
    assert extent(L0(per="pixel"), uniform(1, 3, 5, 5), Bounds()) == 25


def test_a_goal_that_is_no_class_is_refused():
    with pytest.raises(UsageError, match="the target class is 7, but the model has 4 classes"):
        assess(subject(), data(), order(threat=ThreatModel(Linf(0.06), goal=7)))


def test_an_eps_of_nothing_is_clean_accuracy():
    result = assess(subject(), data(), order(threat=ThreatModel(Linf(0.0)), doubts="all"))
    assert result.metrics["robust_accuracy"] == result.metrics["clean_accuracy"]


def test_an_attack_that_needs_more_than_is_given_is_refused_by_name():
    scores_only = DescribedModel(Classifier(network(), access="scores"), "a" * 64)
    with pytest.raises(UsageError, match="PGD needs gradients, and the model gives scores only"):
        assess(scores_only, data(), order())


def test_one_example_is_enough():
    result = assess(subject(), data(1), order(doubts="all"))
    assert len(result.evidence) == 1


def test_a_dead_model_is_no_crash():
    """A constant: everything is a tie, and every tie counts against it."""
    dead = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(FEATURES, CLASSES).double())
    torch.nn.init.zeros_(dead[1].weight)
    torch.nn.init.zeros_(dead[1].bias)
    result = assess(subject(dead), data(), order(doubts="all"))
    assert result.metrics["clean_accuracy"].value == 0


class Wild(torch.nn.Module):
    """Answers NaN to every third input."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x):
        return torch.where((x[:, :1] * 100).long() % 3 == 0, torch.nan, self.net(x))


@pytest.mark.slow
def test_an_answer_that_is_no_number_is_broken_and_doubted():
    result = assess(subject(Wild()), data(), order(doubts="all"))
    assert {d.name: d.state for d in result.doubts}["nan"] == "raised"
    assert not (result.evidence["correct"] & result.evidence["nan"]).any()


class Noisy(torch.nn.Module):
    """Another answer each time."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x):
        return self.net(x) + 0.3 * torch.randn(len(x), CLASSES, dtype=x.dtype)


@pytest.mark.slow
def test_a_randomised_model_is_measured_the_same_twice(tmp_path):
    state = torch.random.get_rng_state()
    first = assess(subject(Noisy()), data(), order(), run=tmp_path / "run").evidence
    second = assess(subject(Noisy()), data(), order()).evidence
    assert first.model["randomised"]
    assert "right_probability" in first
    assert all(torch.equal(first[name], second[name]) for name in first.columns)
    same(first, open_run(tmp_path / "run").evidence)
    assert len(state) == len(torch.random.get_rng_state())


class Raw:
    """Data that nobody checked."""

    name, classes, digest = "raw", None, "d" * 64

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def read(self, start, stop):
        from holdfast.core.batch import Batch

        rows = slice(start, stop)
        return Batch(self.x[rows], self.y[rows], torch.arange(len(self.x))[rows])


class Lazy(Raw):
    """Data that counts what it holds at once."""

    most = 0

    def read(self, start, stop):
        self.most = max(self.most, stop - start)
        return super().read(start, stop)


def test_data_is_read_shard_by_shard():
    whole = data().read(0, N)
    lazy = Lazy(whole.x, whole.y)
    assess(subject(), lazy, order(shard_size=10, doubts="all"))
    assert lazy.most == 10


@pytest.mark.slow
def test_a_result_answers_for_itself(tmp_path):
    result = assess(subject(), data(), order(FAST, THOROUGH, doubts="all"))
    assert 0 < result.metrics["robust_accuracy"].value < result.metrics["clean_accuracy"].value < 1
    assert [record.name for record in result.attacks] == ["PGD", "PGD-again"]
    assert result.worst_case.keys() >= {"id", "y", "success", "broken_by", "distance_linf", "queries"}
    assert result.gate("robust_accuracy >= 1").verdict == "fail"
    assert result.gate("robust_accuracy <= 1").estimate == result.metrics["robust_accuracy"]
    assert "PGD-again" in result.table
    assert f"<caption>{result.table.splitlines()[0]}</caption>" in result._repr_html_()
    assert result.to_html(tmp_path / "a.html").read_text().startswith("<!doctype html>")
    assert result.to_json(tmp_path / "a.json") == (tmp_path / "a.json").read_text()
    assert len(result.write(tmp_path / "a.csv").read_text().splitlines()) == N + 1
    with pytest.raises(UsageError, match="does not end in .html"):
        result.to_html(tmp_path / "a.txt")


def test_a_result_is_read_like_a_mapping_of_metrics():
    result = assess(subject(), data(), order(FAST))
    assert result["robust_accuracy"] is result.metrics["robust_accuracy"]
    assert float(result["robust_accuracy"]) == result.metrics["robust_accuracy"].value
    assert list(dict(result)) == list(result.metrics) and "worst_class" in result and "mce" not in result
    with pytest.raises(
        KeyError, match="there is no metric 'robust_acuracy'; did you mean 'robust_accuracy'.*has"
    ):
        result["robust_acuracy"]


def test_a_data_frame_holds_what_the_columns_and_the_csv_hold(tmp_path):
    result = assess(subject(), data(), order(FAST, THOROUGH))
    found, evidence = result.to_pandas(), result.evidence
    assert found.index.name == "id" and found.index.tolist() == evidence["id"].tolist()
    one_a_row = {name for name, values in evidence.columns.items() if values.dim() == 1}
    assert set(found.columns) == one_a_row - {"id"} | {"digest", "robust"}
    assert found["robust"].mean() == float(result["robust_accuracy"])
    written = pd.read_csv(result.write(tmp_path / "a.csv"), index_col="id")
    assert written["robust"].equals(found["robust"])
    assert written["clean_prediction"].equals(found["prediction"])
    stages = {each.stage: each.name for each in (*evidence.attacks, *evidence.passes)}
    assert written["broken_by"].map(stages).fillna("").equals(found["broken_by"].fillna(""))


def test_without_pandas_a_data_frame_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UsageError, match="to_pandas.. needs pandas.*pip install pandas"):
        assess(subject(), data(), order(FAST)).to_pandas()


def test_the_curve_begins_at_clean_accuracy_and_goes_through_that_at_every_eps():
    asked = order(FAST)
    plan = replace(asked.plan, curve=(Member("FMN", FMN(steps=10)),))
    result = assess(subject(), data(), replace(asked, plan=plan))
    curve = result.curve
    assert (curve.eps[0], curve.accuracy[0]) == (0.0, float(result["clean_accuracy"]))
    assert len({len(curve), *map(len, (curve.eps, curve.accuracy, curve.low, curve.high))}) == 1
    for at, value, low, high in zip(curve.eps, curve.accuracy, curve.low, curve.high, strict=True):
        assert low <= value <= high
        estimate = (
            result.gate(f"robust_accuracy @ {at!r} >= 0.5").estimate if at else result["clean_accuracy"]
        )
        assert (value, low, high) == pytest.approx((estimate.value, estimate.low, estimate.high))
    with pytest.raises(UsageError, match="curve"):
        assess(subject(), data(), order(FAST)).curve  # noqa: B018


def test_a_notebook_shows_gates_doubts_with_what_to_do_and_examples():
    def soft():
        return subject(torch.nn.Sequential(network(), torch.nn.Softmax(1)))

    result = assess(soft(), data(), order(gates=("robust_accuracy >= 0.01",)))
    result.gate("clean_accuracy >= 0.999")
    shown = result._repr_html_()
    for said in (
        "? gate <strong>unclear</strong>: requires at least 1 % robust",
        "at least 99.9 % clean accuracy",
        "Advice: Return",
    ):
        assert said in shown
    assert shown.count("broken examples") == 1
    assert result.exit_code == 4 and len(result.summary()["gates"]) == 1


@pytest.mark.slow
def test_an_accepted_doubt_is_shown_beside_the_verdict(tmp_path):
    def soft():
        return subject(torch.nn.Sequential(network(), torch.nn.Softmax(1)))

    doubted = assess(soft(), data(), order(gates=("robust_accuracy >= 0.01",)))
    assert "probabilities" in [d.name for d in doubted.doubts if d.state == "raised"]
    assert doubted.exit_code == 4
    why = {"probabilities": "the product shows them"}
    accepted = assess(
        soft(), data(), order(gates=("robust_accuracy >= 0.01",), accepted=why), run=tmp_path / "run"
    )
    assert accepted.exit_code == 0
    assert open_run(tmp_path / "run").accepted_doubts == why


@pytest.mark.slow
def test_runs_are_listed_finished_or_not(tmp_path):
    assess(subject(), data(), order(), run=tmp_path / "a")

    def progress(step):
        if step.stage == "2-pgd-again":
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        assess(subject(), data(), order(), run=tmp_path / "b", progress=progress)
    (tmp_path / "c").mkdir()
    entries = {entry.path.name: entry for entry in runs_in(tmp_path)}
    assert entries.keys() == {"a", "b"}
    assert entries["a"].finished and entries["a"].stages_done == entries["a"].stages == 5
    assert not entries["b"].finished and entries["b"].stages_done == 2
    assert entries["a"].threat == "linf:0.06"
    assert entries["a"].robust == open_run(tmp_path / "a").metrics["robust_accuracy"].value
    assert entries["b"].robust is None
    assert runs_in(tmp_path / "nowhere") == []
    with pytest.raises(TargetError, match="is not finished; give run=.*resume=True"):
        open_run(tmp_path / "b")
    with pytest.raises(TargetError, match="is not a run folder"):
        open_run(tmp_path / "c")
    with pytest.raises(TargetError, match="there is no folder .*nowhere"):
        open_run(tmp_path / "nowhere")


def test_runs_without_robust_accuracy_are_listed_too(tmp_path):
    targeted = order(threat=ThreatModel(Linf(0.06), goal=1), attacked=False, gates=())
    smallest = order(SMALLEST, threat=ThreatModel(L2(math.inf)), smallest=True, attacked=False, gates=())
    for name, asked in (("targeted", targeted), ("smallest", smallest)):
        assess(subject(), data(), asked, run=tmp_path / name)
    found = {entry.path.name: (entry.finished, entry.robust) for entry in runs_in(tmp_path)}
    assert found == {"targeted": (True, None), "smallest": (True, None)}


def test_a_new_folder_is_not_there_yet(tmp_path):
    from datetime import UTC, datetime

    now = datetime(2026, 11, 20, 9, 12, 33, tzinfo=UTC)
    first = new_folder("assess", "1a2b3c4d", parent=tmp_path, now=now)
    assert first.name == "20261120-091233-assess-1a2b3c"
    first.mkdir()
    assert (
        new_folder("assess", "1a2b3c4d", parent=tmp_path, now=now).name == "20261120-091233-assess-1a2b3c-2"
    )


@pytest.mark.parametrize("classes, notes", [(2, 2), (3, 2), (4, 1), (10, 0)])
def test_too_few_classes_for_a_loss_or_for_targets_are_reported(classes, notes):
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(FEATURES, classes).double())
    examples = as_data(uniform(6, FEATURES).double(), torch.arange(6) % 2)
    asked = order(Member("APGD-T", APGD(loss=dlr, steps=2, targets=9)), suite="", attacked=False)
    (record,) = assess(subject(net), examples, asked).attacks
    assert len(record.notes) == notes
    assert ("DLR needs 4 classes" in " ".join(record.notes)) == (classes < 4)


@pytest.mark.parametrize(
    "gate, changes, way_out",
    [
        ("robust_margin >= 0.1", {}, "curve=True"),
        ("robust_accuracy@0.01 >= 0.1", {}, "curve=True"),
        ("attacked_f1 >= 0.1", {"suite": "", "attacked": False}, "suite='standard'"),
        ("targeted_success_rate <= 0.1", {}, "goal"),
    ],
)
def test_a_gate_that_nothing_will_answer_is_refused_before_anything_is_measured(
    tmp_path, gate, changes, way_out
):
    steps = []
    with pytest.raises(UsageError, match=f"gate '{gate}' cannot be judged.*{way_out}"):
        assess(
            subject(), data(), order(gates=(gate,), **changes), run=tmp_path / "run", progress=steps.append
        )
    assert not steps and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("gate", "goal"), [("targeted_success_rate <= 1", 0), ("mean_perturbation_linf <= 1", None)]
)
def test_a_gate_does_not_depend_on_the_first_examples(gate, goal):
    batch = data().read(0, N)
    prediction = network()(batch.x).argmax(1)
    rows = prediction.argsort(stable=True)
    x, y = batch.x[rows], prediction[rows]
    if goal is None:
        y[:8] = (y[:8] + 1) % CLASSES
    examples = as_data(x, y)
    assert assess(subject(), examples, order(threat=ThreatModel(Linf(0.06), goal=goal), gates=(gate,))).gates


def test_every_metric_that_a_run_brings_may_be_gated():
    asked = order(curve=(SMALLEST,))
    brought = assess(subject(), data(), asked).metrics
    gates = tuple(f"{name} >= 0" for name in brought)
    assert len(assess(subject(), data(), order(curve=(SMALLEST,), gates=gates)).gates) == len(brought) > 20


def test_every_successful_input_is_stored_on_request(tmp_path):
    given, asked = subject(), order(keep_adversarial=True)
    result = assess(given, data(), asked, run=tmp_path / "run")
    found = result.adversarial
    assert torch.equal(found["id"], result.evidence["id"][result.evidence["success"]])
    clean = data().read(0, N)
    assert (given.model(found["x"]).argmax(1) != clean.y[found["id"]]).all()
    assert (found["x"] - clean.x[found["id"]]).abs().max() <= 0.06 * (1 + 1e-6) + 1e-7
    assert torch.equal(open_run(tmp_path / "run").adversarial["x"], found["x"])
    assert not assess(given, data(), order()).adversarial


@pytest.mark.slow
def test_every_adversarial_example_counts_is_named_and_kept(tmp_path):
    """What probes, the fixed pass and the curve broke is part of every number; the suite's own number is kept."""
    given, asked = subject(), order(WEAK, doubts="all", curve=(SMALLEST,), keep_adversarial=True)
    result = assess(given, data(), asked, run=tmp_path / "run")
    evidence, summary = result.evidence, result.summary()
    passes = [each.stage for each in evidence.passes]
    assert passes[:2] == ["fixed-pgd", "curve-1-fmn"] and {"probe-margin", "probe-again"} < set(passes)
    assert "probe-whole-box" not in passes
    assert evidence.passes[1].settings["steps"] == SMALLEST.attack.steps
    (fresh,) = (each for each in evidence.passes if each.stage == "probe-again")
    assert [attack["reach"] for attack in fresh.settings["attacks"]] == [WEAK.attack.reach]
    robust, suite = (result.metrics[name].value for name in ("robust_accuracy", "suite_robust_accuracy"))
    missed = evidence["success"] & ~evidence["suite_success"]
    assert int(missed.sum()) == sum(each.broke for each in evidence.passes) == round((suite - robust) * N) > 0
    assert (evidence["broken_by"][missed] >= len(evidence.attacks)).all()
    assert f"{100 * robust:.1f} % of {N} examples" in str(result)
    assert f"; fake@1: {100 * suite:.1f} %" in str(result)
    assert result.gate(f"robust_accuracy >= {suite - 0.01}").estimate.value == robust
    kept, clean = result.adversarial, data().read(0, N)
    assert torch.equal(kept["id"], evidence["id"][evidence["success"]])
    assert (given.model(kept["x"]).argmax(1) != clean.y[kept["id"]]).all()
    assert (kept["x"] - clean.x[kept["id"]]).abs().max() <= 0.06 * (1 + 1e-6) + 1e-7
    names = {each["name"] for each in summary["passes"]}
    assert any(example["broken_by"] in names for example in summary["examples"])
    reopened = open_run(tmp_path / "run")
    assert reopened.metrics == result.metrics and reopened.evidence.passes == evidence.passes
    assert torch.equal(reopened.adversarial["x"], kept["x"])


@pytest.mark.slow
def test_a_run_that_is_killed_before_its_doubts_are_recorded_finds_the_same(tmp_path, monkeypatch):
    asked = order(WEAK, doubts="all", keep_adversarial=True)
    whole = assess(subject(), data(), asked, run=tmp_path / "whole")

    def killed(self, kind, content):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("holdfast.runs.store.folder.RunFolder.record", killed)
        with pytest.raises(KeyboardInterrupt):
            assess(subject(), data(), asked, run=tmp_path / "cut")
    assert (tmp_path / "cut/found.safetensors").exists()
    again = assess(subject(), data(), asked, run=tmp_path / "cut", resume=True)
    assert again.metrics == whole.metrics
    assert settled(tmp_path / "cut") == settled(tmp_path / "whole")


@pytest.mark.slow
def test_comparisons_count_every_pass_only_where_both_runs_made_the_same():
    few, more = (
        assess(subject(), data(), order(WEAK, doubts=doubts, attacked=False)) for doubts in ("free", "all")
    )
    assert few.metrics["robust_accuracy"].value > more.metrics["robust_accuracy"].value
    assert Comparison(few, more).regression.value == 0
    assert (basis(few.evidence, more.evidence), basis(more.evidence, more.evidence)) == (
        "suite only",
        "every pass",
    )
    other = assess(subject(), data(), order(Member("PGD", PGD(steps=2)), doubts="all", attacked=False))
    assert basis(other.evidence, more.evidence) == "suite only"
    gated = order(WEAK, doubts="all", attacked=False, gates=("regression <= 0.01 vs baseline",))
    for baseline, scope in ((few, "suite only"), (more, "every pass")):
        judged = assess(subject(), data(), replace(gated, baseline=baseline.evidence))
        assert judged.gates[0].scope == judged.summary()["gates"][0]["scope"] == scope
        assert judged.gates[0].estimate.value == 0
        assert ("own robust accuracies" in judged.summary()["gates"][0]["message"]) is (scope == "suite only")


@pytest.mark.parametrize("goal", [None, 2])
def test_what_a_pass_broke_beyond_the_query_budget_or_of_an_ineligible_example_does_not_count(goal):
    threat = ThreatModel(Linf(0.06), goal=goal, queries=10)
    result = assess(subject(), data(), order(WEAK, threat=threat, doubts="all", gates=()))
    evidence = result.evidence
    assert {"probe-margin", "probe-cross-entropy"} & {each.stage for each in evidence.passes} == set()
    judged = evidence["correct"] & evidence.columns.get("eligible", evidence["correct"])
    assert not (evidence["success"] & ~judged).any()
    assert result.exit_code == 0


class Flipping(torch.nn.Module):
    """A network that is wrong at every tenth look, whatever it is shown."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x):
        logits = self.net(x)
        return torch.where(torch.rand(len(x), 1) < 0.1, logits.roll(1, dims=1), logits)


@pytest.mark.slow
def test_an_unlucky_look_at_a_model_that_draws_breaks_nothing():
    asked = order(Member("PGD", PGD(steps=3)), doubts="all")
    tiny = replace(asked, plan=replace(asked.plan, threat=ThreatModel(Linf(1e-6))))
    found = assess(subject(Flipping()), data(), tiny)
    assert found.metrics["robust_accuracy"].value > 0.7
    assert not any(each.broke for each in found.evidence.passes)
    raised = {doubt.name for doubt in found.doubts if doubt.state == "raised"}
    assert raised == {"randomness"}


def test_what_the_curve_and_the_fixed_pass_broke_counts_without_probes():
    """A list of attacks is doubted for it as well."""
    smallest = Member("FMN", FMN(steps=20))
    found = assess(subject(), data(), order(WEAK, suite="", curve=(smallest,), attacked=False))
    (curve,) = found.evidence.passes
    close = found.evidence["correct"] & (found.evidence["distance"] <= 0.06)
    assert torch.equal(close, found.evidence["success"])
    assert curve.broke == int((close & ~found.evidence["suite_success"]).sum()) > 0
    doubt = next(d for d in found.doubts if d.name == "not-exhausted")
    assert (doubt.state, doubt.statistic) == ("raised", curve.broke)
    fixed = assess(subject(), data(), order(WEAK, attacked=True, doubts="none"))
    assert [each.stage for each in fixed.evidence.passes if each.broke] == ["fixed-pgd"]


def test_the_smallest_changes_are_kept_and_leave_the_shares_after_each_attack(tmp_path):
    members = (Member("DDN", DDN(steps=2)), Member("DDN-long", DDN(steps=40)))
    asked = order(*members, threat=ThreatModel(L2(0.3)), smallest=True, attacked=False, keep_adversarial=True)
    result = assess(subject(), data(), asked, run=tmp_path / "run")
    kept = result.adversarial
    clean = data().read(0, N).x[kept["id"]]
    torch.testing.assert_close(
        L2().distance(kept["x"], clean).float(), result.evidence["distance"][kept["id"]]
    )
    assert torch.equal(open_run(tmp_path / "run").adversarial["x"], kept["x"])
    for record, told in zip(result.attacks, result.summary()["attacks"], strict=True):
        assert told["robust_accuracy"]["value"] * N == pytest.approx(record.surviving_after)


def test_a_list_of_attacks_raises_only_the_free_doubts():
    result = assess(subject(), data(), order(Member("PGD", PGD(steps=2)), suite="", attacked=False))
    assert {d.name for d in result.doubts} == {name for name, test in doubt_tests().items() if test.free}
    assert result.evidence.doubts_cost.forwards <= 15 * N


def test_the_same_examples_in_memory_are_the_same_data():
    x, y = uniform(5, 3), torch.tensor([0, 1, 2, 0, 1])
    assert as_data(x, y).digest == as_data(x.clone(), y.clone()).digest
