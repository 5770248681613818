"""Runs with models of the attacker's own: the matrix, what is kept of it, and who is refused."""

import math
from dataclasses import replace

import pytest
import torch

from holdfast.attacks import Transfer
from holdfast.core.constraints import L2, Linf
from holdfast.core.draws import Draws
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.gates.grammar import parse
from holdfast.metrics.comparisons import ALL, matrix
from holdfast.runs.assess.assess import assess
from holdfast.runs.assess.request import DescribedModel
from holdfast.runs.documents.stored_runs import open_run
from holdfast.runs.harness.kinds.passes import MATRIX
from holdfast.runs.harness.stage import Member
from runs.fakes import CLASSES, FAST, FEATURES, SMALLEST, N, data, network, order, settled, subject

BLIND = ThreatModel(Linf(0.06), access="none")
GIVEN = Member("Transfer", Transfer(steps=3, neighbours=0))


def other(seed=1, name="other", net=None):
    return DescribedModel(
        Classifier(network(seed) if net is None else net), f"{seed:064d}", {"name": name, "how": "python"}
    )


def with_surrogates(*surrogates, members=(FAST,), **changes):
    return replace(order(*members, **changes), surrogates=surrogates)


def shares(result):
    return [[share.value for share in row.shares] for row in matrix(result.evidence)]


def test_the_matrix_is_what_was_made_on_each_and_shown_to_all():
    models = [network(0), network(1), network(2)]
    found = assess(subject(), data(), with_surrogates(other(1), other(2, "third")))
    rows = matrix(found.evidence)
    assert [(row.maker, row.of) for row in rows] == [("fake", 0), ("other", 1), ("third", 2), (ALL, None)]
    batch, rng = data().read(0, N), Draws(3).at("stage", "transfer")
    for row, makers in zip(rows, ([0], [1], [2], [1, 2]), strict=True):
        held = tuple(Classifier(models[k]) for k in makers)
        threat = ThreatModel(Linf(0.06), surrogates=held)
        x_adv = MATRIX.attack(Classifier(models[0]), batch, threat, rng=rng)
        for model, share in zip(models, row.shares, strict=True):
            right = model(batch.x).argmax(1) == batch.y
            turned = right & (model(x_adv).argmax(1) != batch.y)
            assert share.n == int(right.sum())
            assert share.value == pytest.approx(int(turned.sum()) / share.n)
    assert found.metrics["transfer_success"] == rows[-1].shares[0]


def test_an_example_that_only_the_matrix_breaks_raises_a_doubt():
    weak = Member("Transfer", Transfer(steps=1, reach=0.05, neighbours=0))
    asked = with_surrogates(other(), members=(weak,))
    found = assess(subject(), data(), replace(asked, plan=replace(asked.plan, threat=BLIND, doubts="all")))
    evidence, turned = found.evidence, torch.zeros(N, dtype=torch.bool)
    turned[evidence.transfer["id"]] = evidence.transfer["wrong"][:, :, 0].any(1)
    missed = evidence["correct"] & ~evidence["suite_success"] & turned
    (matrix,) = (each for each in evidence.passes if each.stage == "transfer")
    assert missed.any() and evidence["success"][missed].all()
    assert matrix.broke == int(missed.sum())
    doubt = next(doubt for doubt in found.doubts if doubt.name == "not-exhausted")
    assert doubt.state == "raised" and "the transfer matrix" in doubt.message


@pytest.mark.slow
def test_a_run_stores_its_matrix_and_reports_it_again(tmp_path):
    asked = with_surrogates(other(), doubts="all", gates=("transfer_success <= 0.99",))
    kept = assess(subject(), data(), asked, run=tmp_path / "run")
    assert kept.evidence.surrogates == ({"name": "other", "how": "python", "digest": f"{1:064d}"},)
    back = open_run(tmp_path / "run")
    assert back.summary() == kept.summary()
    assert (tmp_path / "run" / "transfer.safetensors").is_file()
    stage = kept.evidence.cost
    without = assess(subject(), data(), replace(asked, surrogates=(), gates=())).cost
    # made on the target and on the surrogate, judged clean and twice: 10 gradients and 3 looks
    probe = (
        kept.evidence.doubts_cost.forwards
        - assess(subject(), data(), replace(asked, surrogates=(), gates=())).evidence.doubts_cost.forwards
    )
    assert stage.forwards - without.forwards == 13 * N + probe
    assert stage.backwards - without.backwards == 10 * N
    again = assess(subject(), data(), asked, run=tmp_path / "run", resume=True)
    assert again.summary() == kept.summary()


@pytest.mark.slow
def test_batches_shards_and_resumption_change_nothing_of_it(tmp_path):
    asked = with_surrogates(other(), other(2, "third"))
    whole = assess(subject(), data(), asked)
    small = assess(subject(), data(), replace(asked, batch_size=7, shard_size=9))
    assert shares(small) == shares(whole)
    assess(subject(), data(), asked, run=tmp_path / "whole")

    def stop(step):
        if step.stage == "transfer" and 0 < step.done < step.of:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        assess(subject(), data(), asked, run=tmp_path / "cut", progress=stop)
    assess(subject(), data(), asked, run=tmp_path / "cut", resume=True)
    assert settled(tmp_path / "cut") == settled(tmp_path / "whole")


@pytest.mark.slow
def test_the_sample_is_bounded_and_seeded(set_limit):
    set_limit("holdfast.runs.harness.kinds.passes.MATRIX_ROWS", 11)
    found = assess(subject(), data(), with_surrogates(other(), shard_size=5))
    ids = found.evidence.transfer["id"]
    assert len(ids) == 11
    assert sorted(ids.tolist()) == ids.tolist() != list(range(11))
    again = assess(subject(), data(), with_surrogates(other(), shard_size=40))
    assert torch.equal(again.evidence.transfer["id"], ids)


def test_another_surrogate_is_another_run(tmp_path):
    assess(subject(), data(), with_surrogates(other()), run=tmp_path / "run")
    with pytest.raises(UsageError, match="surrogates.1 other"):
        assess(subject(), data(), with_surrogates(other(2)), run=tmp_path / "run", resume=True)


def test_a_model_without_queries_makes_no_examples_and_is_attacked():
    blind = with_surrogates(
        other(), other(0, "copy"), members=(GIVEN,), threat=BLIND, attacked=False, doubts="all"
    )
    found = assess(subject(), data(), blind)
    assert [row.maker for row in matrix(found.evidence)] == ["other", "copy", ALL]
    assert int(found.evidence["queries"].sum()) == 0
    assert found.evidence["success"].any()
    assert {doubt.name: doubt.state for doubt in found.doubts}["transfer"] == "not applicable"


def test_under_a_goal_only_the_target_class_counts():
    threat = ThreatModel(Linf(0.06), goal=3)
    found = assess(subject(), data(), with_surrogates(other(), threat=threat, attacked=False, gates=()))
    batch = data().read(0, N)
    assert (batch.y[found.evidence.transfer["id"]] != 3).all()
    assert 0 < shares(found)[0][0] <= 1


@pytest.mark.slow
def test_the_smallest_changes_have_no_matrix_and_the_doubt_all_the_same():
    threat = ThreatModel(L2(math.inf))
    asked = with_surrogates(
        other(), members=(SMALLEST,), threat=threat, smallest=True, attacked=False, doubts="all", gates=()
    )
    found = assess(subject(), data(), asked)
    assert not found.evidence.transfer
    assert {doubt.name: doubt.state for doubt in found.doubts}["transfer"] == "clear"


def wide():
    return torch.nn.Sequential(torch.nn.Linear(FEATURES, CLASSES + 1)).double()


def long():
    return torch.nn.Sequential(torch.nn.Linear(FEATURES + 1, CLASSES)).double()


@pytest.mark.parametrize(
    "net, error, said",
    [
        (wide(), TargetError, "5 classes, but the model has 4"),
        (long(), TargetError, r"inputs of the model, of shape \(12,\)"),
    ],
)
def test_a_surrogate_with_other_classes_or_inputs_is_refused(net, error, said):
    with pytest.raises(error, match=said):
        assess(subject(), data(), with_surrogates(other(net=net)))


def test_a_surrogate_that_returns_nan_is_refused():
    class Void(torch.nn.Module):
        def forward(self, x):
            return network(1)(x) / 0 * 0

    with pytest.raises(TargetError, match=r"other returns NaN for 8 of the first 8 examples"):
        assess(subject(), data(), with_surrogates(other(net=Void())))


def test_a_surrogate_with_random_outputs_is_refused():
    class Noisy(torch.nn.Module):
        def forward(self, x):
            return network(1)(x + 0.1 * torch.randn_like(x))

    with pytest.raises(UsageError, match="other is randomised"):
        assess(subject(), data(), with_surrogates(other(net=Noisy())))


def test_a_surrogate_without_gradients_is_refused():
    served = DescribedModel(Classifier(network(1), access="scores"), "b" * 64, {"name": "served"})
    with pytest.raises(UsageError, match="served gives only scores"):
        assess(subject(), data(), with_surrogates(served))


@pytest.mark.parametrize("cut", [torch.Tensor.detach, lambda x: (8 * x).round() / 8])
def test_a_surrogate_that_loses_all_gradients_is_refused(cut):
    class Cut(torch.nn.Module):
        def forward(self, x):
            return network(1)(cut(x))

    with pytest.raises(UsageError, match="other passes no gradient back"):
        assess(subject(), data(), with_surrogates(other(net=Cut())))


def test_without_a_surrogate_transfer_is_refused():
    with pytest.raises(UsageError, match="surrogates="):
        assess(subject(), data(), order(GIVEN, threat=BLIND, attacked=False))


def test_a_gate_on_what_transfers_needs_a_surrogate():
    with pytest.raises(UsageError, match="surrogates="):
        assess(subject(), data(), order(FAST, gates=("transfer_success <= 0.5",)))
    assert parse("transfer_success <= 0.5").metric == "transfer_success"


def test_surrogates_come_back_as_they_were():
    net = network(1).train()
    assess(subject(), data(), with_surrogates(other(net=net)))
    assert all(module.training for module in net.modules())
    assert all(weight.requires_grad for weight in net.parameters())


def test_time_that_runs_out_leaves_the_matrix_out():
    found = assess(subject(), data(), with_surrogates(other(), time_budget_s=1e-9, gates=()))
    assert not found.evidence.transfer
    assert any("so the transfer matrix is left out" in note for note in found.evidence.notes)
