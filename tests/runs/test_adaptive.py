"""The adaptive run: called for by doubts, part of the verdict, an answer to what called for it, and resumable."""

import json

import pytest
import torch
from torch import nn

import holdfast
from holdfast.attacks import APGD, Square
from holdfast.attacks.adaptive_search import AdaptiveSearch
from holdfast.core.constraints import L0, L2, Linf
from holdfast.core.errors import UsageError
from holdfast.core.evidence import Doubt
from holdfast.doubts.answering import arms, required_attacks, with_answers
from holdfast.runs.assess.assess import assess
from holdfast.runs.documents.stored_runs import open_run
from holdfast.runs.harness.stage import Member
from runs.fakes import FAST, data, network, order, settled, subject

ARMS = (Member("BPDA", APGD(steps=5)), Member("Search", Square(queries=10)))


SEARCH = Member("AdaptiveSearch", AdaptiveSearch(methods=("margin", "square", "labels")))


class Rounded(nn.Module):
    def forward(self, x):
        return (20 * x).round() / 20


class Noisy(nn.Module):
    def forward(self, x):
        return x + 0.02 * torch.randn_like(x)


def masked(stage=None):
    return subject(nn.Sequential(stage or Rounded(), network()), digest="b" * 64)


def adaptive_order(**changes):
    return order(FAST, adaptive=changes.pop("arms", ARMS), doubts=changes.pop("doubts", "all"), **changes)


def states(result):
    return {doubt.name: doubt.state for doubt in result.doubts}


@pytest.mark.slow
def test_a_masked_model_is_broken_by_the_attacks_that_its_doubts_recommend():
    naive, adaptive = (
        assess(masked(), data(), adaptive_order(arms=chosen, gates=("robust_accuracy >= 0.7",)))
        for chosen in ((), ARMS)
    )
    assert naive.gates[0].verdict == adaptive.gates[0].verdict == "fail"  # probes broke enough examples
    assert [record.name for record in adaptive.attacks] == ["PGD", "BPDA", "Search"]
    alone = naive.metrics["suite_robust_accuracy"].value
    assert adaptive.metrics["robust_accuracy"].value < alone - 0.3
    assert adaptive.metrics["suite_robust_accuracy"].value == alone
    assert states(naive)["zero-gradient"] == "raised"
    assert states(adaptive)["zero-gradient"] == "answered"
    because, round_ = adaptive.attacks[1].notes
    assert because.startswith("run because of zero-gradient")
    assert round_ == "its gradient bypasses every rounding by the identity"
    assert len(adaptive.attacks[2].notes) == 1
    said = next(doubt.message for doubt in adaptive.doubts if doubt.name == "zero-gradient")
    assert "answered by BPDA and Search, which broke" in said
    assert (adaptive.evidence["broken_by"] == 1).any()


@pytest.mark.slow
def test_an_answered_doubt_lets_a_gate_pass():
    """At an eps at which nothing falls, so that only the doubts stood between the gate and a pass."""
    small = {"threat": holdfast.ThreatModel(Linf(1e-3)), "gates": ("robust_accuracy >= 0.5",)}
    naive = assess(masked(), data(), adaptive_order(arms=(), **small))
    adaptive = assess(masked(), data(), adaptive_order(**small))
    assert (naive.gates[0].verdict, adaptive.gates[0].verdict) == ("unclear", "pass")
    assert set(states(adaptive).values()) <= {"clear", "answered", "not measured"}


@pytest.mark.slow
def test_under_l2_an_answer_follows_from_a_search_for_the_smallest_change():
    """Where climbing inside the ball leaves four of five surviving."""
    by_suite = {
        suite: holdfast.assess(
            "mnist-cnn-hardened", "mnist-mini", n=10, threat="l2:2", suite=suite, adaptive=suite == "quick"
        )
        for suite in ("quick", "fast")
    }
    adaptive, fast = by_suite["quick"], by_suite["fast"]
    assert {"BPDA-ALMA", "BPDA-FAB"} <= {record.name for record in adaptive.attacks}
    assert "answered" in states(adaptive).values()
    assert adaptive.metrics["robust_accuracy"].value <= fast.metrics["robust_accuracy"].value


def test_a_model_without_masking_has_no_adaptive_attack():
    result = assess(subject(), data(), adaptive_order(threat=holdfast.ThreatModel(Linf(1e-3))))
    assert [record.name for record in result.attacks] == ["PGD"]
    assert "no doubt requires an adaptive attack, so none was run" in result.evidence.notes


@pytest.mark.slow
def test_a_model_that_draws_is_attacked_on_average():
    chosen = (Member("EOT", APGD(steps=5, draws=4, sure=0.95)), *ARMS)
    result = assess(masked(Noisy()), data(), adaptive_order(arms=chosen))
    assert "EOT" in [record.name for record in result.attacks]
    assert "BPDA" not in [record.name for record in result.attacks]
    assert states(result)["randomness"] == "answered"


@pytest.mark.slow
@pytest.mark.parametrize("at", ["2-bpda", "3-search"])
def test_a_run_stopped_in_its_adaptive_part_ends_with_the_same_bytes(tmp_path, at):
    whole = assess(masked(), data(), adaptive_order(), run=tmp_path / "whole")

    def stop(step):
        if step.stage == at and step.done:
            raise RuntimeError("pulled the plug")

    with pytest.raises(RuntimeError, match="plug"):
        assess(masked(), data(), adaptive_order(), run=tmp_path / "cut", progress=stop)
    again = assess(masked(), data(), adaptive_order(), run=tmp_path / "cut", resume=True)
    assert settled(tmp_path / "cut") == settled(tmp_path / "whole")
    opened = open_run(tmp_path / "whole")
    for other in (again, opened):
        assert other.doubts == whole.doubts
        assert [record.notes for record in other.attacks] == [record.notes for record in whole.attacks]
        assert other.metrics == whole.metrics


@pytest.mark.slow
@pytest.mark.parametrize("at", ["4-adaptivesearch", "answer-checks-adaptivesearch"])
def test_a_run_stopped_in_its_search_or_its_checks_ends_with_the_same_bytes(tmp_path, at):
    whole = assess(masked(), data(), searching(), run=tmp_path / "whole")

    def stop(step):
        if step.stage == at and step.done:
            raise RuntimeError("pulled the plug")

    with pytest.raises(RuntimeError, match="plug"):
        assess(masked(), data(), searching(), run=tmp_path / "cut", progress=stop)
    again = assess(masked(), data(), searching(), run=tmp_path / "cut", resume=True)
    assert settled(tmp_path / "cut") == settled(tmp_path / "whole")
    for other in (again, open_run(tmp_path / "whole")):
        assert other.doubts == whole.doubts
        assert other.evidence.answer_checks == whole.evidence.answer_checks != ()
        assert [record.search for record in other.attacks] == [record.search for record in whole.attacks]


def searching(**changes):
    return adaptive_order(arms=(*ARMS, SEARCH), adaptive_budget=250, **changes)


@pytest.mark.slow
def test_the_report_has_what_each_method_did_and_the_checks(tmp_path):
    result = assess(masked(), data(), searching())
    summary = json.loads(result.to_json())
    record = result.attacks[-1]
    assert summary["attacks"][-1]["search"]["methods"] == [vars(method) for method in record.search.methods]
    states = {method.name: method.state for method in record.search.methods}
    assert states["stand-in"] == "left out"
    assert states["margin"] in ("run", "dropped")
    assert (
        sum(method.broke for method in record.search.methods)
        == record.surviving_before - record.surviving_after
    )
    passes = sum(method.forwards for method in record.search.methods)
    assert 0 < passes <= record.cost.queries
    assert [check["name"] for check in summary["answer_checks"]] == [
        "whole-box", "larger-eps", "labels-only", "gradient", "same-output", "choices"
    ]  # fmt: skip
    result.to_html(tmp_path / "r.html")
    assert "methods that share the budget" in (tmp_path / "r.html").read_text().lower()
    failed = [check.name for check in result.evidence.answer_checks if check.state == "failed"]
    answered = [doubt for doubt in result.doubts if doubt.state == "answered"]
    assert bool(failed) != bool(answered)


class Hidden(nn.Module):
    """A gradient of the wrong sign."""

    def forward(self, x):
        return x - 2 * x + 2 * x.detach()


@pytest.mark.slow
def test_a_doubt_stays_raised_if_the_gradient_of_the_attack_is_wrong():
    flat = nn.Sequential(nn.Flatten(), nn.Unflatten(1, (12, 1)), nn.Flatten())
    model = subject(nn.Sequential(Hidden(), flat, network()), digest="c" * 64)
    result = assess(model, data(), searching())
    checks = {check.name: check.state for check in result.evidence.answer_checks}
    doubts = [doubt for doubt in result.doubts if doubt.state in ("raised", "answered")]
    assert doubts
    assert all(doubt.state == "raised" for doubt in doubts) == ("failed" in checks.values())


class Alone(nn.Module):
    """Answers the class of the examples near them, and the first class elsewhere, without a gradient."""

    def __init__(self, x):
        super().__init__()
        self.net, self.known = network(), x

    def forward(self, x):
        near = (x[:, None] - self.known).abs().amax(2).amin(1) < 0.07
        labels = self.net(x).argmax(1).where(near, 0)
        return nn.functional.one_hot(labels, 4).to(x.dtype)


@pytest.mark.slow
def test_images_of_other_classes_do_not_pass_the_check_with_the_whole_box():
    examples = data()
    model = subject(Alone(examples.read(0, len(examples)).x), digest="d" * 64)
    search = Member("AdaptiveSearch", AdaptiveSearch())
    result = assess(model, examples, adaptive_order(arms=(search,), adaptive_budget=4000))
    checks = {check.name: check.state for check in result.evidence.answer_checks}
    assert checks["whole-box"] == "failed"
    assert "answered" not in states(result).values()


class Fragile(Hidden):
    """Raises an error for inputs far from the data, which are corners of the box here."""

    def forward(self, x):
        if (((x < 0.01) | (x > 0.99)).double().mean(1) > 0.7).any():
            raise ValueError("out of range")
        return super().forward(x)


@pytest.mark.slow
def test_a_model_that_raises_far_from_the_data_is_attacked_near_them():
    result = assess(masked(Fragile()), data(), searching())
    doubts = {doubt.name: doubt for doubt in result.doubts}
    assert "raised an error" in doubts["whole-box"].message
    assert "ValueError: out of range" in doubts["whole-box"].message
    assert doubts["whole-box"].state == "not measured"
    assert {check.name for check in result.evidence.answer_checks} >= {"whole-box"}


def test_an_attack_that_the_time_limit_ends_gives_no_answer():
    result = assess(masked(), data(), adaptive_order(time_budget_s=0.0))
    assert "answered" not in states(result).values()


RAISED = tuple(Doubt(name, "raised") for name in ("zero-gradient", "randomness", "nan"))


@pytest.mark.parametrize("constraint", [Linf(0.1), L2(1.0), L0(3)])
def test_every_arm_is_called_by_some_doubt(constraint):
    known = [arm for arm in arms(constraint) if arm.weight is None]
    by_doubts = required_attacks(known, RAISED[:1]) | required_attacks(known, RAISED[1:2])
    assert set(by_doubts) == {arm.name for arm in known}
    assert required_attacks(known, ()) == {}
    assert required_attacks(known, RAISED[2:]) == {}


def test_a_random_model_is_attacked_on_average_whatever_cleared_its_randomness():
    averaged = (Doubt("randomness", "clear", 0.2, 1e-4), Doubt("zero-gradient", "raised"))
    known = [arm for arm in arms(Linf(0.1)) if arm.weight is None]
    assert required_attacks(known, averaged) == dict.fromkeys(
        ("EOT", "Search", "AdaptiveSearch"), ("zero-gradient",)
    )
    assert required_attacks(known, averaged[:1]) == {}
    assert required_attacks(arms(Linf(0.1)), averaged) == required_attacks(known, averaged)


def ran(n=4, *, dead=False, broke=2):
    rows = torch.arange(n)
    return {
        "ran": rows >= 0, "success": rows < broke, "dead": (rows >= 0) & dead, "backwards": torch.full((n,), 5)
    }  # fmt: skip


def test_a_doubt_is_answered_by_all_that_it_called_for():
    because = {"BPDA": ("zero-gradient",), "Search": ("zero-gradient",)}
    doubts = (Doubt("zero-gradient", "raised", message="no gradient"),)
    both = with_answers(
        doubts, {"BPDA": ran(), "Search": ran(broke=3)}, because, bypassed=True, survivor_broken=False
    )[0]
    assert both.state == "answered"
    assert both.message == (
        "no gradient; answered by BPDA and Search, which broke 3 of the 4 examples that they were run on"
    )
    assert with_answers(doubts, {"BPDA": ran()}, because, bypassed=True, survivor_broken=False) == doubts
    found_none = with_answers(
        doubts, {"BPDA": ran(dead=True), "Search": ran()}, because, bypassed=True, survivor_broken=False
    )[0]
    assert found_none.state == "raised"
    assert "did not circumvent it" in found_none.message


def test_a_shattered_gradient_is_answered_round_it_or_on_average_alone():
    doubts = (Doubt("shattered", "raised", message="ripples"),)
    for arm, bypassed, state in (
        ("BPDA", True, "answered"),
        ("BPDA", False, "raised"),
        ("EOT", False, "answered"),
    ):
        (told,) = with_answers(
            doubts, {arm: ran()}, {arm: ("shattered",)}, bypassed=bypassed, survivor_broken=False
        )
        assert told.state == state


def test_a_suite_is_not_exhausted_if_a_probe_breaks_more():
    doubts, because = (Doubt("not-exhausted", "raised"),), {"Search": ("not-exhausted",)}
    assert with_answers(doubts, {"Search": ran()}, because, bypassed=True, survivor_broken=True) == doubts
    assert (
        with_answers(doubts, {"Search": ran()}, because, bypassed=True, survivor_broken=False)[0].state
        == "answered"
    )


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"doubts": False}, "give doubts=True"),
        ({"suite": "minimum-norm"}, "leave out adaptive"),
        ({"suite": "corruptions", "threat": "corruptions:1"}, "leave out adaptive"),
    ],
)
def test_settings_that_exclude_adaptive_attacks_are_refused(settings, says):
    x, y = torch.rand(4, 12), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(UsageError, match=says):
        holdfast.assess(network().float(), (x, y), **{"threat": "linf:0.1", **settings}, adaptive=True)


@pytest.mark.slow
def test_from_scores_alone_only_the_search_is_left():
    settings = {"threat": holdfast.ThreatModel(Linf(0.06), access="scores")}
    chosen = order(Member("Square", Square(queries=3)), adaptive=ARMS, doubts="all", **settings)
    result = assess(masked(), data(), chosen)
    assert "BPDA" not in [record.name for record in result.attacks]
