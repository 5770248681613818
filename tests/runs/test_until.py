"""Runs that end as soon as a condition is decided."""

import shutil
from dataclasses import replace

import pytest
import torch

from holdfast.attacks import PGD, Universal
from holdfast.core.errors import TargetError, UsageError
from holdfast.gates.grammar import look_sizes, parse, parse_until
from holdfast.io.data.data import Selection, in_random_blocks
from holdfast.runs.assess.assess import assess
from holdfast.runs.harness.stage import Member
from holdfast.verbs.reports import report, verify
from runs.fakes import FAST, data, network, order, settled, subject
from store.test_foreign import rewritten

CONDITION, N = "robust_accuracy >= 0.3", 300
IN_WAVES = Member("PGD-again", PGD(steps=6, restarts=2), waves=2, least=4)
REQUEST = replace(order(FAST, IN_WAVES, gates=(), shard_size=40), until=parse_until(CONDITION))
DATA = in_random_blocks(data(N), look_sizes(N), 7)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    return assess(subject(), DATA, REQUEST, run=run)


def test_the_result_is_that_of_an_ordinary_run_on_the_same_examples(whole):
    looks = whole.evidence.looks
    assert looks.look > 2 and looks.examples == len(whole.evidence) < N
    first = Selection(DATA, tuple(range(looks.examples)))
    ordinary = assess(subject(), first, replace(REQUEST, until=None))
    assert whole.evidence.columns.keys() == ordinary.evidence.columns.keys()
    for name, values in ordinary.evidence.columns.items():
        assert torch.equal(whole.evidence.columns[name], values), name
    assert whole.metrics == ordinary.metrics
    (gate,) = whole.gates
    assert gate.verdict == "pass" and gate.estimate.low >= 0.3
    assert gate.estimate.low < whole["robust_accuracy"].low  # it is valid at every look, and therefore wider


def test_an_attack_without_waves_is_run_once_on_each_example(whole):
    rows = []
    net = network()
    net.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    request = replace(REQUEST, plan=replace(REQUEST.plan, members=(FAST,)))
    looks = assess(subject(net), DATA, request).evidence.looks
    in_looks = sum(rows)
    rows.clear()
    first = Selection(DATA, tuple(range(looks.examples)))
    assess(subject(net), first, replace(request, until=None, gates=(request.until,)))
    assert looks.look > 2 and in_looks == sum(rows)


def test_a_further_gate_does_not_end_the_run(whole):
    gates = (parse("clean_accuracy >= 0.1"), parse("robust_accuracy >= 0.2"))
    result = assess(subject(), DATA, replace(REQUEST, gates=gates))
    assert result.evidence.looks == whole.evidence.looks
    assert [gate.claim for gate in result.gates] == [REQUEST.until, *gates]
    assert all(gate.looks == result.evidence.looks and gate.verdict == "pass" for gate in result.gates)


@pytest.mark.parametrize(
    ("changes", "ended", "text"),
    [
        ({}, "decided", "because its attacks decided 'robust_accuracy >= 0.3'"),
        (
            {"until": parse_until("robust_accuracy >= 0.47")},
            "all measured",
            "the run measured every example (300), which does not decide",
        ),
        (
            {"time_budget_s": 1e-9, "plan": replace(REQUEST.plan, doubts="all")},
            "out of time",
            "time ran out at look 1, after 32 of 300 examples in a random order",
        ),
    ],
)
def test_the_report_states_why_the_run_ended(changes, ended, text):
    result = assess(subject(), DATA, replace(REQUEST, **changes))
    assert result.evidence.looks.ended == ended
    assert sum(text in note for note in result.evidence.notes) == 1
    assert (result.gates[0].verdict == "unclear") is (ended != "decided")
    assert result.summary()["gates"][0]["looks"]["ended"] == ended


def test_a_run_that_is_stopped_anywhere_resumes_to_the_same_bytes(tmp_path, whole):
    class Stop(Exception):
        pass

    steps = []
    assess(subject(), DATA, REQUEST, progress=steps.append)
    for at in range(3, len(steps), len(steps) // 3):
        seen, run = [], tmp_path / str(at)

        def progress(step, seen=seen, at=at):
            seen.append(step)
            if len(seen) == at:
                raise Stop

        with pytest.raises(Stop):
            assess(subject(), DATA, REQUEST, run=run, progress=progress)
        assess(subject(), DATA, REQUEST, run=run, resume=True)
        assert settled(run) == settled(whole.folder), at


def test_a_false_number_of_looks_is_refused(whole, tmp_path):
    for k, (name, change, message) in enumerate(
        [
            ("until.json", lambda c: c.update(look=1), "examples"),
            ("until.json", lambda c: c.update(examples=48, look=2), "examples"),
            ("until.json", lambda c: c.update(ended="all measured"), "examples"),
            ("verdict.json", lambda c: c["gates"].pop(0), "first gate"),
        ]
    ):
        run = shutil.copytree(whole.folder, tmp_path / str(k))
        assert verify(run).complete and report(run).gates == whole.gates
        rewritten(run, name, change)
        with pytest.raises(TargetError, match=message):
            report(run)


def test_what_blocks_cannot_decide_is_refused():
    for condition in ("robust_margin >= 0.1", "regression >= 0.1"):
        with pytest.raises(UsageError, match="a share of all examples: certified_accuracy"):
            parse_until(condition)
    with pytest.raises(UsageError, match="no metric 'zzz'; expected one of certified_accuracy, .{50,150}$"):
        parse_until("zzz >= 0.1")
    fitted = replace(REQUEST, plan=replace(REQUEST.plan, members=(Member("UAP", Universal()),)))
    with pytest.raises(UsageError, match="the step fitting UAP needs all at once"):
        assess(subject(), DATA, replace(fitted, fit=data(50, seed=9)))
