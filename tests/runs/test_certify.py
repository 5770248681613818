"""A certification: proofs, attacks on certified examples, wrong certificates, and equal bytes of equal runs."""

import json
import shutil
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

import holdfast
from holdfast.attacks import PGD, Square
from holdfast.attacks.parts import ascent, losses
from holdfast.core.constraints import Linf
from holdfast.core.errors import Interrupted, TargetError, UnsoundProof, UsageError
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.reports.certification import section
from holdfast.reports.tree import Paragraph
from holdfast.runs.assess.assess import assess
from holdfast.runs.assess.certify import certify_request
from holdfast.runs.documents.stored_runs import Comparison, open_run
from holdfast.runs.harness.kinds.attack import TEST_QUERIES
from holdfast.runs.harness.measure import measure_plan
from holdfast.runs.harness.plan import Plan
from holdfast.runs.harness.stage import Member
from holdfast.runs.store import columns as column_files
from holdfast.runs.store.verify import verify
from runs import fakes
from runs.fakes import data, network, settled, subject
from runs.provers import READIED, Corners, Interval
from store.test_foreign import rewritten

SMALL = ThreatModel(Linf(0.02))


def attack():
    """An attack that can be pickled, although tests wrap the functions of modules to watch shapes."""
    return Member("PGD", PGD(steps=6, restarts=2, loss=losses.margin_loss, schedule=ascent.flat))


QUICK, LATE = (Interval(),), (Corners(),)


def order(member=None, *, proofs=QUICK, late=LATE, gates=("certified_accuracy >= 0.05",), **changes):
    settings = {"shard_size": 15, "threat": SMALL, **changes}
    return certify_request(fakes.order(member or attack(), gates=gates, **settings), proofs, late)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run in a folder."""
    run = tmp_path_factory.mktemp("certified") / "run"
    READIED.clear()
    result = assess(subject(), data(), order(), run=run)
    return run, result, tuple(READIED)


def test_every_example_is_certified_broken_or_unknown(whole):
    _, result, _ = whole
    evidence, results = result.evidence, result.summary()["certification"]
    certified, broken = evidence["certified"], ~evidence["correct"] | evidence["success"]
    assert not (certified & broken).any()
    assert results["certified"] == int(certified.sum()) > 4
    assert results["broken"] == int(broken.sum())
    assert results["unknown"] == int((~certified & ~broken).sum())
    assert results["rows"][-1]["undecided"] == results["unknown"]
    assert [row["name"] for row in results["rows"]] == ["interval", "attacks", "corners"]
    assert (evidence["certified_radius"] == certified.double() * 0.02).all()
    assert (evidence["certified_bound"][certified] > 0).all()
    assert (evidence["certified_by"][certified] == 0).all()
    assert (evidence["certified_by"][~certified] == -1).all()
    assert float(result["certified_accuracy"]) <= float(result["robust_accuracy"])
    assert float(result["certified_accuracy"]) == pytest.approx(float(certified.double().mean()))


def test_a_method_is_prepared_once_and_run_on_undecided_examples(whole):
    _, result, readied = whole
    assert readied == ("interval", "corners")
    quick, late = result.evidence.proofs
    correct = int(result.evidence["correct"].sum())
    assert quick.tried == correct
    assert late.tried == correct - quick.certified - int(result.evidence["suite_success"].sum())
    assert (late.after_attacks, quick.after_attacks) == (True, False)


def test_a_certificate_holds_against_the_bound_of_every_attack(whole):
    _, result, _ = whole
    assert (result.evidence["certified_bound"] <= result.evidence["margin"].double()).all()


@pytest.fixture(scope="module")
def many():
    """Enough examples that most of the certified ones are not attacked."""
    net = Classifier(network())
    g = torch.Generator().manual_seed(2)
    x = torch.rand(200, fakes.FEATURES, generator=g, dtype=torch.float64)
    return net, fakes.as_data(x, net(x).argmax(1)).read(0, 200)


def few(many):
    """The network with the first 30 examples: the method `Corners` evaluates every corner of their balls."""
    net, batch = many
    return net, batch.take(torch.arange(30))


@pytest.mark.parametrize("full", [False, True])
def test_a_sample_of_the_certified_examples_is_attacked(many, full):
    net, batch = many
    plan = Plan((attack(),), ThreatModel(Linf(0.005)), proofs=(Interval(),), full=full)
    evidence = measure_plan(net, [batch], plan)
    certified = evidence["certified"]
    assert int(certified.sum()) > 64
    assert int((certified & evidence["attacked"]).sum()) == (int(certified.sum()) if full else 32)
    assert evidence["attacked"][~certified].all()
    shards = measure_plan(net, list(batch.split(70)), plan)
    assert torch.equal(shards["attacked"], evidence["attacked"])


@pytest.mark.parametrize("full", [False, True])
def test_a_query_attack_on_certified_examples_is_short(many, full):
    net, batch = few(many)
    plan = Plan(
        (Member("Square", Square(queries=300)),), ThreatModel(Linf(0.005)), proofs=(Interval(),), full=full
    )
    evidence = measure_plan(net, [batch], plan)
    tested, queries = evidence["certified"] & evidence["attacked"], evidence["queries"]
    assert queries[tested].tolist() == [300 if full else TEST_QUERIES] * int(tested.sum())
    undecided = evidence["attacked"] & ~tested & ~evidence["success"]
    assert queries[undecided].tolist() == [300] * int(undecided.sum()) != []
    shards = measure_plan(net, list(batch.split(7)), plan)
    assert torch.equal(shards["queries"], queries)


@pytest.mark.slow
def test_a_counterexample_of_a_method_is_judged_and_counts(many):
    net, batch = few(many)
    plan = Plan((), ThreatModel(Linf(0.3)), late_proofs=(Corners(),), keep_adversarial=True)
    evidence = measure_plan(net, [batch], plan)
    (record,), (counted,) = evidence.proofs, evidence.passes
    assert record.broken == record.confirmed == counted.broke == int(evidence["success"].sum()) > 0
    assert record.stopped == record.tried - record.broken
    assert len(evidence.gallery["id"]) > 0


@pytest.mark.slow
def test_a_claim_that_the_model_does_not_confirm_breaks_nothing(many):
    net, batch = few(many)

    class Wrong(Corners):
        def proofs(self, model, eps, batch):
            proofs = super().proofs(model, eps, batch)
            return replace(proofs, x_adv=batch.x, broken=torch.ones_like(proofs.broken))

    evidence = measure_plan(net, [batch], Plan((), SMALL, late_proofs=(Wrong(),)))
    assert not evidence["success"].any()
    assert evidence.proofs[0].broken == 0


@pytest.mark.parametrize("tested_by", [attack(), Member("Square", Square())], ids=["PGD", "Square"])
def test_a_wrong_certificate_ends_the_run_without_a_result(tmp_path, tested_by):
    run, threat = tmp_path / "run", ThreatModel(Linf(0.2))
    wrong = order(tested_by, proofs=(Interval(shrink=0.02),), threat=threat)
    broken_by = f"certified by interval, broken by {tested_by.name}.*No certificate"
    with pytest.raises(UnsoundProof, match=broken_by) as caught:
        assess(subject(), data(), wrong, run=run)
    assert caught.value.exit_code == 5
    with pytest.raises(UnsoundProof):
        assess(subject(), data(), wrong, run=run, resume=True)
    assert not (run / "verdict.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["proof-1-interval", "1-pgd", "proof-2-corners"])
def test_a_stopped_run_resumes_to_the_same_bytes(tmp_path, whole, stage):
    run, _, _ = whole
    stopped = tmp_path / "run"
    stop_at(stopped, stage)
    assess(subject(), data(), order(), run=stopped, resume=True)
    assert settled(stopped) == settled(run)


@pytest.mark.slow
def test_worker_processes_store_the_same_columns(tmp_path, whole):
    run, _, _ = whole
    shared = tmp_path / "shared"
    assess(subject(), data(), order(workers=2), run=shared)
    stages = [path.name for path in run.glob("*.safetensors")]
    assert "proof-1-interval.safetensors" in stages
    for name in stages:
        assert (shared / name).read_bytes() == (run / name).read_bytes(), name


def test_a_stored_run_is_verified_reported_and_compared(tmp_path, whole):
    run, result, _ = whole
    assert verify(run).complete
    opened = open_run(run)
    assert opened.summary()["certification"]["certified"] == result.summary()["certification"]["certified"]
    assert opened.summary()["verb"] == "certify"
    text = Comparison(opened, result).text()
    assert "Certified accuracy" in text
    table = opened.table
    assert "certification: 40 examples, linf:0.02" in table
    assert "≤ robust accuracy" in table
    assert "are certified under linf:0.02" in str(opened)
    for suffix in (".html", ".md", ".csv", ".xml"):
        assert opened.write(tmp_path / f"report{suffix}").stat().st_size > 0
    assert "certified_by" in (tmp_path / "report.csv").read_text().splitlines()[0]
    assert json.loads(opened.to_json())["metrics"]["certified_accuracy"]["n"] == 40


def test_a_certificate_that_was_edited_is_refused(tmp_path, whole):
    forged, name = shutil.copytree(whole[0], tmp_path / "forged"), "proof-1-interval.safetensors"
    stored = column_files.read(forged / name)
    column_files.write(forged / name, {**stored.columns, "ran": ~stored.columns["ran"]}, stored.about)
    rewritten(forged, name, judged=False)
    with pytest.raises(TargetError, match="proof-1-interval.safetensors' is not the file"):
        open_run(forged)


def test_a_stored_certificate_of_a_broken_example_is_refused(tmp_path, whole):
    run, result, _ = whole
    forged, name = shutil.copytree(run, tmp_path / "forged"), "proof-1-interval.safetensors"
    stored = column_files.read(forged / name)
    changed = {**stored.columns, "certified": stored.columns["certified"] | result.evidence["success"]}
    changed |= {
        "bound": torch.ones_like(stored.columns["bound"]),
        "claimed": torch.zeros_like(changed["certified"]),
    }
    column_files.write(forged / name, changed | {"ran": ~changed["claimed"]}, stored.about)
    rewritten(forged, name)
    with pytest.raises(TargetError, match="states a verdict that its columns do not give"):
        open_run(forged)


def test_a_gate_on_certified_accuracy_ignores_doubts_about_attacks(whole):
    _, result, _ = whole
    assert result.gate("certified_accuracy >= 0.01")
    assert result.gate("certified_accuracy@0.02 >= 0.01").estimate == result["certified_accuracy"]
    assert result.gate("certified_accuracy@0.03 <= 0.2").estimate.value == 0


def test_without_proofs_the_gate_names_the_way(tmp_path):
    with pytest.raises(UsageError, match="holdfast certify proves robustness; give certify=True"):
        assess(subject(), data(), fakes.order(gates=("certified_accuracy >= 0.5",)))


class Random(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x):
        return self.net(x) + torch.randn(len(x), fakes.CLASSES, dtype=x.dtype)


@dataclass(frozen=True)
class Crowded(Interval):
    """Interval bounds on a machine whose memory is too small for more than four examples."""

    def proofs(self, model, eps, batch):
        if len(batch) > 4:
            raise torch.OutOfMemoryError("no memory is left")
        return super().proofs(model, eps, batch)


@pytest.mark.slow
def test_the_report_states_the_batch_with_which_a_method_continued_when_memory_ran_out(tmp_path, whole):
    result = assess(subject(), data(), order(proofs=(Crowded(),)), run=tmp_path / "run")
    results = open_run(tmp_path / "run").summary()["certification"]
    assert [row["batch"] for row in results["rows"]] == [3, None, None]
    assert "memory ran out in interval, which continued with 3 examples at a time" in result.table
    assert torch.equal(result.evidence["certified"], whole[1].evidence["certified"])


def test_models_about_which_nothing_is_proved_are_refused():
    with pytest.raises(UsageError, match="outputs of the model are random"):
        assess(subject(Random()), data(), order())
    labels = subject()
    labels.model.access = "labels"
    with pytest.raises(UsageError, match="the model gives labels only"):
        assess(labels, data(), order())


def test_time_that_runs_out_keeps_the_certificates(monkeypatch):
    result = assess(subject(), data(), order(time_budget_s=1e-9, gates=()))
    assert result.summary()["certification"]["certified"] == 0
    assert any("interval finished 0 of 40 examples" in note for note in result.summary()["notes"])


def stop_at(run, stage):
    """Begin the run, and interrupt it when the stage begins."""

    def interrupt(step):
        if step.stage == stage:
            raise Interrupted("stopped", signal_number=2)

    with pytest.raises(Interrupted):
        assess(subject(), data(), order(), run=run, progress=interrupt)


class _InPlace(nn.Module):
    """A network whose gradients fail, because it changes a value that the backward pass needs."""

    def forward(self, x):
        h = torch.sigmoid(x)
        y = h * h
        h += 1
        return y


def test_a_network_whose_gradients_fail_is_refused_with_the_cause():
    x = torch.rand(8, 3)
    with pytest.raises(
        UsageError, match=r"its backward pass raises RuntimeError.*correct its code"
    ) as refused:
        holdfast.certify(_InPlace(), (x, x.argmax(1)), "linf:0.01", "ibp")
    assert "give the network itself" not in str(refused.value)


@pytest.mark.parametrize("threat", ["linf:0.1,goal=targeted:3", "linf:0", "linf", "corruptions:3"])
def test_a_threat_under_which_nothing_is_proved_is_refused_in_python_too(threat, tmp_path):
    with pytest.raises(
        UsageError,
        match="proof is about|nothing to prove|no eps|text, training-set and observations only",
    ):
        holdfast.certify("mnist-cnn", "mnist-mini", threat, n=2, run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


class _Logarithm(nn.Module):
    """A margin of almost 1 at every input, with a logarithm whose bounds are below zero for some inputs."""

    def forward(self, x):
        z = (x - 0.4) * (x + 0.0 - 0.4)
        return torch.stack((1 + 0.01 * (z + 0.01).log().sum(1), 0 * x[:, 0]), 1)


@pytest.mark.slow
def test_the_operation_whose_domain_the_bounds_leave_is_a_reason_of_unknown_examples():
    x = torch.tensor([[0.4, 0.4], [0.9, 0.9], [0.5, 0.3]])
    result = holdfast.certify(
        Classifier(_Logarithm()), (x, torch.zeros(3, dtype=torch.long)), "linf:0.15", "crown"
    )
    results = result.summary()["certification"]
    assert (results["certified"], results["unknown"]) == (1, 2)
    ((operation, count),) = [tuple(each.values()) for each in results["undefined"]]
    assert operation.startswith("aten.log, at ")
    assert "(z + 0.01).log()" in operation
    assert count == 2
    texts = [block.text for block in section(result.summary()).blocks if isinstance(block, Paragraph)]
    assert any(text.startswith("2 examples unknown: the bounds leave the domain") for text in texts)
