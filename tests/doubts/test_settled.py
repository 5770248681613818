"""Doubts that the suite has settled, whose probes are not run."""

import pytest
import torch
from torch import nn

import holdfast
from holdfast.metrics.comparisons import basis

X = torch.rand(12, 6, generator=torch.Generator().manual_seed(1))
SETTLED = {"margin", "runner-up", "probability-margin", "small-cross-entropy", "search"}


def network(layers=1):
    """A network with hidden layers of 16 values, whose bounds are loose from two of them on."""
    rng = torch.Generator().manual_seed(2)
    hidden = [part for _ in range(layers - 1) for part in (nn.Linear(16, 16), nn.ReLU())]
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), *hidden, nn.Linear(16, 3))
    with torch.no_grad():
        for weights in net.parameters():
            weights.copy_(torch.randn(weights.shape, generator=rng))
    return net


def assess(threat, layers=1, **settings):
    net = network(layers)
    with torch.no_grad():
        y = net(X).argmax(1)
    return holdfast.assess(net, (X, y), threat, only=["sprint", "relay-2"], **settings)


@pytest.fixture(scope="module")
def broken():
    """A run in which no example survives."""
    return assess("linf:0.9")


def tried(result):
    return {each.stage.removeprefix("probe-"): each.tried for each in result.evidence.passes}


def test_if_no_example_is_left_no_probe_looks_for_more(broken):
    assert broken["robust_accuracy"].value == 0
    assert not any(tried(broken)[name] for name in SETTLED)
    assert {
        doubt.state for doubt in broken.doubts if doubt.name in ("black-box", "scale", "loss-spread")
    } == {"clear"}
    assert all(doubt.message for doubt in broken.doubts)


def test_examples_that_only_a_baseline_broke_settle_nothing(broken):
    stored = assess("linf:0.9", save_adversarial=True)
    based = assess("linf:0.9", baseline=stored)
    assert based.attacks[0].reuse.broke == len(X) and tried(based)["search"] and tried(based)["margin"]


def test_the_search_that_settles_doubts_is_run_on_examples_that_are_not_certified():
    certified = assess("linf:0.06", layers=2, certify=True)
    evidence = certified.evidence
    left = evidence["correct"] & ~evidence["success"] & ~evidence["certified"]
    assert 0 < left.sum() < 32 and evidence["certified"].any()
    assert tried(certified)["settling-search"] == int(left.sum())
    assert not any(tried(certified)[name] for name in SETTLED)


def test_runs_with_the_same_suite_and_doubts_are_compared_by_every_pass_whichever_probes_ran(broken):
    searched, off = assess("linf:0.06"), assess("linf:0.06", doubts=False)
    ran = [{name for name, n in tried(each).items() if n} for each in (broken, searched)]
    assert ran[0] != ran[1]
    assert basis(broken.evidence, searched.evidence) == "every pass"
    assert basis(off.evidence, searched.evidence) == "suite only"
