"""Changes carried across data sets: what is counted, what stands beside it, and who is refused."""

import math
from dataclasses import replace

import pytest
import torch

from holdfast.attacks import PGD
from holdfast.attacks.parts import ascent, losses
from holdfast.core.batch import Batch
from holdfast.core.constraints import L2, Linf
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Bounds, Classifier
from holdfast.core.threat import ThreatModel
from holdfast.io.data.loaders import as_data
from holdfast.reports.transfer import across_rows
from holdfast.runs.assess.assess import assess
from holdfast.runs.assess.request import DescribedModel
from holdfast.runs.documents.stored_runs import open_run
from holdfast.runs.harness.kinds.passes import MATRIX, _permuted, paired
from holdfast.runs.harness.stage import Member
from runs.fakes import FAST, FEATURES, SMALLEST, N, data, network, order, settled, subject

BLIND = ThreatModel(Linf(0.06), access="none")


def elsewhere(n=N + 5, seed=5, labels=9, features=FEATURES):
    """Inputs of another kind, with labels that the model does not know."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, features, generator=g, dtype=torch.float64) ** 3
    return as_data(x, torch.arange(n) % labels, name=f"elsewhere {seed}")


def carrying(*others, members=(FAST,), **changes):
    return replace(order(*members, **{"gates": (), **changes}), across=others)


def shares(result):
    return [[share.value for share in (*row.turned, *row.control)] for row in across_rows(result.evidence)]


def test_other_data_may_be_of_another_type_than_the_model_takes():
    batch = elsewhere().read(0, N)
    other = as_data(batch.x.float(), batch.y, name="elsewhere 5")
    found = assess(subject(), data(), carrying(other))
    assert found.evidence.across["turned"].shape == (N, 2, 2)


def test_an_image_counts_as_turned_if_the_change_alters_its_prediction():
    model, bounds = Classifier(network()), Bounds()
    found = assess(subject(), data(), carrying(elsewhere(n=N)))
    rng, threat = Draws(3).at("stage", "across"), ThreatModel(Linf(0.06), surrogates=(model,))
    sets = [paired(each.read(0, N), 3, place) for place, each in enumerate((data(), elsewhere(n=N)))]
    sets = [replace(each, y=model(each.x).argmax(1)) for each in sets]
    rows = across_rows(found.evidence)
    assert [row.made_on for row in rows] == ["data in memory", "elsewhere 5"]
    for place, (each, row) in enumerate(zip(sets, rows, strict=True)):
        change = MATRIX.attack(model, each, threat, rng=rng.at(place)) - each.x
        for on, share in zip(sets, row.turned, strict=True):
            moved = threat.constraint.project(on.x + change, on.x, bounds)
            assert share.n == N
            assert share.value == pytest.approx((model(moved).argmax(1) != on.y).double().mean().item())
        own, other = row.turned[place].value, row.turned[1 - place].value
        assert own > other
        assert own > row.control[place].value


def test_the_control_is_as_far_in_every_norm_and_keeps_pixels_whole():
    ids, change = torch.arange(3), torch.randn(3, 2, 4, 4, dtype=torch.float64)
    batch = Batch(torch.zeros_like(change), torch.zeros(3, dtype=torch.int64), ids)
    mixed = _permuted(change, batch, Draws(0))
    assert not torch.equal(mixed, change)
    pixels = [{tuple(pixel) for pixel in each.flatten(1).mT.tolist()} for each in (*change, *mixed)]
    assert pixels[:3] == pixels[3:]
    table = change.flatten(1)
    assert torch.equal(_permuted(table, batch.at(table), Draws(0)).sort(1).values, table.sort(1).values)


def test_pairs_do_not_go_by_the_order_of_the_files():
    batch = data().read(0, N)
    first, second = paired(batch, 0, 0), paired(batch, 0, 1)
    assert sorted(first.ids.tolist()) == sorted(second.ids.tolist()) == list(range(N))
    assert first.ids.tolist() != second.ids.tolist() != list(range(N))
    assert torch.equal(paired(batch, 0, 0).ids, first.ids)


@pytest.mark.slow
def test_a_run_stores_and_reports_the_measurement_and_counts_its_queries(tmp_path):
    asked = carrying(elsewhere(), elsewhere(seed=6))
    kept = assess(subject(), data(), asked, run=tmp_path / "run")
    assert (tmp_path / "run" / "across.safetensors").is_file()
    assert open_run(tmp_path / "run").summary() == kept.summary()
    assert [card["name"] for card in kept.summary()["other_data"]] == ["elsewhere 5", "elsewhere 6"]
    without = assess(subject(), data(), replace(asked, across=())).evidence.cost
    # on each of three data sets 10 gradients, one look at the clean input and one at each change and its control
    assert kept.cost.forwards - without.forwards == N * 3 * (10 + 1 + 2 * 3)
    assert kept.cost.backwards - without.backwards == N * 3 * 10
    again = assess(subject(), data(), asked, run=tmp_path / "run", resume=True)
    assert again.summary() == kept.summary()


@pytest.mark.slow
def test_batches_and_resumption_change_nothing_of_it(tmp_path):
    asked = carrying(elsewhere())
    whole = assess(subject(), data(), asked, run=tmp_path / "whole")
    assert shares(assess(subject(), data(), replace(asked, batch_size=7, shard_size=9))) == shares(whole)

    def stop(step):
        if step.stage == "across":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        assess(subject(), data(), asked, run=tmp_path / "cut", progress=stop)
    assess(subject(), data(), asked, run=tmp_path / "cut", resume=True)
    assert settled(tmp_path / "cut") == settled(tmp_path / "whole")


def test_other_data_is_another_run(tmp_path):
    assess(subject(), data(), carrying(elsewhere()), run=tmp_path / "run")
    with pytest.raises(UsageError, match="across.1 elsewhere"):
        assess(subject(), data(), carrying(elsewhere(seed=6)), run=tmp_path / "run", resume=True)


def test_the_sample_is_bounded_and_as_large_of_each(set_limit):
    set_limit("holdfast.runs.assess.preparation.MATRIX_ROWS", 11)
    assert len(assess(subject(), data(), carrying(elsewhere())).evidence.across["turned"]) == 11
    few = assess(subject(), data(), carrying(elsewhere(n=7)))
    assert few.evidence.across["control"].shape == (7, 2, 2)


def test_changes_are_made_on_surrogates_if_the_model_has_no_gradient():
    other = DescribedModel(Classifier(network(1)), "b" * 64, {"name": "other", "how": "python"})
    asked = carrying(elsewhere(), threat=BLIND, members=(), attacked=False)
    transfer = replace(asked.plan, members=(MATRIX,))
    found = assess(subject(), data(), replace(asked, plan=transfer, surrogates=(other,)))
    assert sum(sum(row) for row in shares(found)) > 0
    with pytest.raises(UsageError, match="computed from gradients, but the model has none"):
        assess(subject(), data(), replace(carrying(elsewhere()), plan=replace(asked.plan, members=(FAST,))))


@pytest.mark.slow
def test_workers_leave_it_to_the_process_that_holds_the_run(tmp_path):
    first = Member("PGD", PGD(steps=3, loss=losses.cross_entropy, schedule=ascent.flat))
    asked = carrying(elsewhere(n=9), members=(first,), shard_size=20)
    alone = assess(subject(), data(), asked)
    assert shares(assess(subject(), data(), replace(asked, workers=1))) == shares(alone)


def test_time_that_runs_out_leaves_it_out():
    found = assess(subject(), data(), carrying(elsewhere(), time_budget_s=1e-9))
    assert not found.evidence.across
    assert any("the transfer between data sets is left out" in note for note in found.evidence.notes)


@pytest.mark.parametrize(
    "threat, members, changes, said",
    [
        (
            ThreatModel(L2(math.inf)),
            (SMALLEST,),
            {"smallest": True, "attacked": False},
            "needs a threat model with a norm and a finite eps",
        ),
        (ThreatModel(Linf(0.06), goal=3), (FAST,), {"attacked": False}, "leave goal=targeted:3 out"),
    ],
    ids=["without an eps", "goal"],
)
def test_a_threat_under_which_it_means_nothing_is_refused(threat, members, changes, said):
    with pytest.raises(UsageError, match=said):
        assess(subject(), data(), carrying(elsewhere(), threat=threat, members=members, **changes))


def test_inputs_of_another_shape_are_refused():
    with pytest.raises(
        UsageError, match=r"elsewhere 5 have shape \(13,\); those of the run have shape \(12,\)"
    ):
        assess(subject(), data(), carrying(elsewhere(features=13)))
