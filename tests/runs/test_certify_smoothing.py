"""A certification by randomised smoothing: all numbers are about the smoothed classifier, and contradictions between
statistical certificates and attacks are judged by their probability.
"""

import shutil
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

import holdfast
from holdfast.attacks import PGD
from holdfast.attacks.parts.losses import cross_entropy
from holdfast.certifiers.smoothing import ReadySmoothing, Smoothing
from holdfast.core.constraints import L2
from holdfast.core.errors import NoBounds, TargetError, UnsoundProof, UsageError
from holdfast.core.threat import ThreatModel
from holdfast.runs.assess.assess import assess
from holdfast.runs.assess.certify import certify_request, smoothed_subject
from holdfast.runs.documents.stored_runs import open_run
from holdfast.runs.harness.stage import Member
from holdfast.runs.store import columns as column_files
from holdfast.statistics.intervals import upper_tail
from runs import fakes
from runs.fakes import data, settled, subject
from store.test_foreign import rewritten

EPS = 0.1
HOW = Smoothing(0.2, draws=400, failure_probability=0.01, seed=3)


def order(*, eps=EPS, how=HOW, **changes):
    attack = Member("PGD", PGD(steps=4, restarts=2, loss=cross_entropy))
    settings = {"threat": ThreatModel(L2(eps)), "gates": ("certified_accuracy >= 0.05",), **changes}
    return certify_request(fakes.order(attack, **settings), [how], [])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = tmp_path_factory.mktemp("smoothed") / "run"
    return run, assess(smoothed_subject(subject(), HOW), data(), order(), run=run)


@pytest.mark.slow
def test_the_run_is_about_the_smoothed_classifier(whole):
    run, result = whole
    evidence, results = result.evidence, open_run(run).summary()["certification"]
    assert evidence.model["name"] == "smoothed classifier, σ = 0.2, on top of fake"
    certified, abstained = evidence["certified"], evidence["abstained"]
    assert 5 < int(certified.sum()) < int(evidence["correct"].sum())
    assert not (certified & (abstained | evidence["success"])).any()
    assert (evidence["certified_radius"][certified] >= EPS).all()
    assert (evidence["certified_radius"][abstained] == 0).all()
    assert float(result.gate("certified_accuracy@0.1 >= 0").estimate) == float(result["certified_accuracy"])
    assert result.gate("certified_accuracy@0.02 >= 0").estimate.value > result["certified_accuracy"].value
    assert float(result["certified_accuracy"]) <= float(result["robust_accuracy"])
    statistical = results["statistical"]
    assert statistical["tried"] == int(evidence["correct"].sum())
    assert statistical["any_failure_probability"] == pytest.approx(0.01 * statistical["tried"])
    assert statistical["abstained"] == int((abstained & ~evidence["success"]).sum())
    # votes decide the clean predictions: most agree with the network, and not all
    agreed = evidence["prediction"] == fakes.network()(data().read(0, fakes.N).x).argmax(1)
    assert 0.7 < float(agreed.double().mean()) < 1
    assert "each verdict of smoothing is wrong with a probability of at most 0.01" in result.table


@pytest.mark.parametrize(("column", "value"), [("radius", 9.0), ("radius", torch.nan), ("abstained", True)])
def test_a_smoothed_certificate_that_was_edited_is_refused(tmp_path, whole, column, value):
    run, name = shutil.copytree(whole[0], tmp_path / "run"), "proof-1-smoothing.safetensors"
    stored = column_files.read(run / name)
    changed = torch.full_like(stored.columns[column], value)
    column_files.write(run / name, {**stored.columns, column: changed}, stored.about)
    rewritten(run, name, judged=False)
    with pytest.raises(TargetError, match=f"{name}' is not the file"):
        open_run(run)


def test_a_resumed_run_has_the_same_bytes(tmp_path, whole):
    run, _ = whole
    with certifying(interrupted), pytest.raises(KeyboardInterrupt):
        assess(smoothed_subject(subject(), HOW), data(), order(), run=tmp_path / "run")
    again = replace(HOW, sigma=0.3)
    with pytest.raises(UsageError, match="another configuration and another model"):
        assess(
            smoothed_subject(subject(), again), data(), order(how=again), run=tmp_path / "run", resume=True
        )
    assess(smoothed_subject(subject(), HOW), data(), order(), run=tmp_path / "run", resume=True)
    assert settled(tmp_path / "run") == settled(run)


def interrupted(*_):
    raise KeyboardInterrupt


@contextmanager
def certifying(method):
    """Let smoothing certify examples by another method."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReadySmoothing, "__call__", method)
        yield


def wrong_for(chosen):
    """A method that also certifies the examples with some ids."""
    honest = ReadySmoothing.__call__

    def wrong(self, batch):
        proofs, more = honest(self, batch), torch.isin(batch.ids, torch.tensor(chosen))
        return replace(proofs, certified=proofs.certified | more, broken=proofs.broken & ~more)

    return wrong


def broken_ids(eps):
    evidence = assess(smoothed_subject(subject(), HOW), data(), order(eps=eps, gates=())).evidence
    return evidence["id"][evidence["success"] & evidence["correct"]].tolist()


@pytest.mark.slow
def test_one_contradiction_is_listed_and_many_end_the_run():
    eps = 0.3
    broken = broken_ids(eps)
    assert len(broken) > 12
    with certifying(wrong_for(broken[:1])):
        result = assess(smoothed_subject(subject(), HOW), data(), order(eps=eps, gates=()))
    evidence, row = result.evidence, result.evidence["id"] == broken[0]
    assert evidence["contradicted"].nonzero()[:, 0].tolist() == row.nonzero()[:, 0].tolist()
    assert evidence["success"][row].all()
    assert not evidence["certified"][row].any()
    assert f"contradict each other for 1 example (id {broken[0]})" in result.table
    results = result.summary()["certification"]
    assert results["rows"][-1]["undecided"] == results["unknown"]

    with certifying(wrong_for(broken)), pytest.raises(UnsoundProof, match="more than by chance"):
        assess(smoothed_subject(subject(), HOW), data(), order(eps=eps, gates=()))


def test_the_probability_of_contradictions_is_that_of_a_binomial_distribution():
    assert upper_tail(2, 3, 0.1) == pytest.approx(3 * 0.01 * 0.9 + 0.001)
    assert upper_tail(0, 3, 0.1) == 1


def test_a_model_without_gradients_is_certified_without_attacks():
    neighbors = pytest.importorskip("sklearn.neighbors")
    rng = np.random.default_rng(0)
    y = np.arange(30) % 2
    x = np.clip(rng.normal(0.5, 0.02, (30, 4)) + 0.3 * (2 * y[:, None] - 1), 0, 1).astype("float32")
    model = neighbors.KNeighborsClassifier(3).fit(x, y)
    result = holdfast.certify(
        model, (x, y), "l2:0.2", "smoothing", sigma=0.2, draws=300, failure_probability=0.01
    )
    assert float(result["certified_accuracy"]) > 0.9
    assert not result.evidence.attacks
    assert any("gives scores only, so that no attack is run" in note for note in result.summary()["notes"])
    assert not any("switched off" in note for note in result.summary()["notes"])


class Strict(torch.nn.Module):
    """A network that refuses inputs outside of [0, 1], as many services do."""

    def __init__(self):
        super().__init__()
        self.net = fakes.network()

    def forward(self, x):
        if ((x < 0) | (x > 1)).any():
            raise ValueError("a pixel is outside of [0, 1]")
        return self.net(x)


def test_a_model_that_refuses_noise_needs_a_clamp():
    with pytest.raises(UsageError, match="a pixel is outside.*clip=True"):
        assess(smoothed_subject(subject(Strict()), HOW), data(), order())
    clipped = replace(HOW, clip=True)
    result = assess(smoothed_subject(subject(Strict()), clipped), data(), order(how=clipped, gates=()))
    assert result.evidence["certified"].any()
    assert result.evidence.model["smoothed"]["clip"] is True


@pytest.mark.parametrize(("eps", "advised"), [(0.001, True), (0.5, False)])
def test_smoothing_is_advised_only_if_it_certifies_an_example_of_a_trial(eps, advised):
    torch.manual_seed(0)
    layers = torch.nn.Linear(9, 9), torch.nn.LayerNorm(9), Sorted(), torch.nn.Linear(9, 3)
    net = torch.nn.Sequential(*layers).eval()
    x = torch.rand(40, 9)
    with pytest.raises(NoBounds, match=r"aten\.sort in Sorted.*; replace it") as caught:
        holdfast.certify(net, (x, net(x).argmax(1)), f"linf:{eps}", "crown")
    assert bool(caught.value.remedies) is advised and "register" not in caught.value.message


def test_only_functions_of_single_values_are_to_be_registered():
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), Lgamma())
    with pytest.raises(NoBounds, match="or register its bounds with holdfast.certifiers.register"):
        holdfast.certify(net, (torch.rand(4, 4), torch.zeros(4, dtype=torch.long)), "linf:0.1", "crown")


class Sorted(torch.nn.Module):
    """A function of several values without known bounds."""

    def forward(self, x):
        return x + 0 * x.sort(1).values


class Lgamma(torch.nn.Module):
    """A pointwise function without known bounds."""

    def forward(self, x):
        return torch.lgamma(x.abs() + 1)
