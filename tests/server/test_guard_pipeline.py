"""The guard decides about requests before and after the model."""

import re
from dataclasses import replace

import pytest
import torch

from holdfast.core.errors import UsageError
from holdfast.guard.detectors.outputs import Energy
from holdfast.guard.guard import LOST, REFUSED_TEXT, UNAVAILABLE_TEXT, GuardPipeline, QueryResult
from holdfast.guard.rules import Action, Incoming, InputDefence, InputSchema, Mode, Rule

SHAPE = (1, 4, 4)


class Counting:
    """A query scorer whose score is the number of earlier queries."""

    def __init__(self):
        self.principals = []

    def score(self, x, principals, sent=None):
        assert len(x) == len(principals)
        begin = len(self.principals)
        self.principals += principals
        return QueryResult(torch.arange(begin, begin + len(x)).double())


def rule(name, mode=Mode.ENFORCE, action=Action.BLOCK, threshold=0.0):
    return Rule(name, mode, action, threshold)


def guard(*rules, **parts):
    rules = rules or (
        rule("schema"),
        rule("range"),
        rule("queries", threshold=2.0),
        rule("energy", action=Action.ABSTAIN),
    )
    names = [each.name for each in rules]
    return GuardPipeline(
        InputSchema(SHAPE),
        {each.name: each for each in rules},
        {"energy": Energy()} if "energy" in names else {},
        queries=Counting() if "queries" in names else None,
        **parts,
    )


def x(n=1, value=0.5):
    return torch.full((n, *SHAPE), value)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (torch.zeros(2, 1, 4, 5), r"shape \(2, 1, 4, 5\); expected \(n, 1, 4, 4\)"),
        (torch.zeros(4, 4), r"shape \(4, 4\)"),
        (torch.tensor(1.0), r"shape \(\)"),
        (torch.zeros(0, *SHAPE), "no inputs"),
        (torch.zeros(1, *SHAPE, dtype=torch.float64), "float64; expected float32"),
        (x(value=1.5), "outside the range; expected from 0 to 1"),
        (x(value=-0.01), "outside the range"),
        (x(value=torch.nan), "NaN or infinity"),
        (x(value=torch.inf), "NaN or infinity"),
    ],
)
def test_an_invalid_request_is_refused_with_its_reason_and_does_not_reach_the_query_detector(given, reason):
    pipeline = guard()
    decision = pipeline.before(given)
    assert decision.action is Action.BLOCK and not decision.answered
    assert re.search(reason, decision.refusal)
    assert pipeline.queries.principals == []


def test_a_channel_is_compared_with_its_own_range():
    schema = InputSchema((2, 1, 1), low=(0.0, -1.0), high=(1.0, 0.0))
    inputs = torch.tensor([[0.5, -0.5], [-0.5, -0.5], [0.5, 0.25], [torch.nan, 0.0]]).view(4, 2, 1, 1)
    assert schema.excess(inputs).tolist() == [0.0, 0.5, 0.25, torch.inf]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float16])
def test_the_range_of_every_data_type_is_compared(dtype):
    inputs = torch.tensor([[10, 250], [9, 100], [20, 254]], dtype=dtype).view(3, 2, 1, 1)
    whole = InputSchema((2, 1, 1), dtype, (10.0,), (250.0,))
    assert whole.excess(inputs).tolist() == [0.0, 1.0, 4.0]
    each = InputSchema((2, 1, 1), dtype, (10.0, 50.0), (15.0, 250.0))
    assert each.excess(inputs).tolist() == [0.0, 1.0, 5.0]


def test_a_batch_of_requests_gets_the_decisions_of_single_requests():
    sizes, bad = (1, 3, 2), x(2, 7.0)
    outputs = [torch.tensor([[9.0, 9.0], [-9.0, -9.0], [0.1, 0.2]])[torch.arange(n)] for n in sizes]
    single, together = guard(), guard()
    expected = []
    for n, logits in zip(sizes, outputs, strict=True):
        decision = single.before(x(n), principal=f"p{n}")
        expected.append(single.after(decision, logits) if decision.answered else decision)
    requests = [Incoming(x(1), "p1"), Incoming(bad, "bad"), Incoming(x(3), "p3"), Incoming(x(2), "p2")]
    decisions = together.before_many(requests)
    decisions = together.after_many(decisions, [outputs[0], None, *outputs[1:]])
    assert [d.rows for d in decisions[:1] + decisions[2:]] == [d.rows for d in expected]
    assert decisions[1].refusal and not decisions[1].answered
    assert together.queries.principals == single.queries.principals == ["p1", *["p3"] * 3, *["p2"] * 2]
    # the fourth query is the first with more than two before it; the second row of three has a high energy
    assert [d.action for d in decisions] == [Action.ALLOW, Action.BLOCK, Action.BLOCK, Action.BLOCK]
    assert decisions[2].refusal == REFUSED_TEXT


def test_only_an_enforced_rule_acts_and_shadow_records_what_it_would_do():
    for mode, action, shadow in (
        (Mode.OBSERVE, Action.ALLOW, Action.ALLOW),
        (Mode.SHADOW, Action.ALLOW, Action.ABSTAIN),
        (Mode.ENFORCE, Action.ABSTAIN, Action.ABSTAIN),
    ):
        pipeline = guard(rule("energy", mode, Action.ABSTAIN))
        decision = pipeline.after(pipeline.before(x(2)), torch.tensor([[-5.0, -5.0], [5.0, 5.0]]))
        assert [row.action for row in decision.rows] == [action, Action.ALLOW]
        assert decision.rows[0].shadow is shadow and decision.rows[0].scores[0].fired
        assert pipeline.observed.n == 2 and pipeline.observed.alarms == 1


def test_a_wrong_request_is_not_scored_further_while_the_schema_is_only_observed():
    pipeline = guard(rule("schema", Mode.OBSERVE), rule("range"), rule("queries", threshold=9.0))
    decisions = pipeline.before_many([Incoming(torch.zeros(1, 3)), Incoming(x())])
    assert [d.answered for d in decisions] == [True, True]
    assert [len(d.rows[0].scores) for d in decisions] == [1, 3]
    assert decisions[0].x.shape == (1, 3)


def test_outputs_that_are_no_numbers_raise_an_alarm():
    pipeline = guard(rule("energy", threshold=1e9))
    decision = pipeline.after(
        pipeline.before(x(3)), torch.tensor([[torch.nan, 0], [torch.inf, 0], [-torch.inf, 0]])
    )
    assert [row.action for row in decision.rows] == [Action.BLOCK, Action.BLOCK, Action.ALLOW]


def test_the_model_gets_squeezed_inputs_and_the_query_detector_the_originals():
    pipeline = guard(defence=InputDefence(bits=1))
    seen = []
    pipeline.queries.score = lambda inputs, names, sent: (
        seen.append(inputs.clone()),
        QueryResult(torch.zeros(len(inputs)), "open"),
    )[1]
    decision = pipeline.before(x(value=0.7))
    assert decision.x.unique().tolist() == [1.0]
    assert torch.equal(seen[0], x(value=0.7))
    assert decision.notes == {"queries": LOST} and decision.unchecked and decision.answered


class Lost:
    """A query detector whose state cannot be reached."""

    def __init__(self, fail="closed"):
        self.fail = fail

    def score(self, x, principals, sent=None):
        return QueryResult(torch.full((len(x),), torch.inf), self.fail)


@pytest.mark.parametrize(
    ("fail", "mode", "action", "refused"),
    [
        ("closed", Mode.ENFORCE, Action.BLOCK, True),
        ("closed", Mode.ENFORCE, Action.LABEL_ONLY, True),
        ("closed", Mode.ENFORCE, Action.FLAG, False),
        ("closed", Mode.SHADOW, Action.BLOCK, False),
        ("open", Mode.ENFORCE, Action.BLOCK, False),
    ],
)
def test_a_lost_state_refuses_requests_as_configured_and_is_no_detection(fail, mode, action, refused):
    pipeline = replace(
        guard(rule("queries", mode, action), rule("energy", threshold=-1e9)), queries=Lost(fail)
    )
    decision = pipeline.before(x(2))
    assert (decision.unavailable, decision.answered) == (refused, not refused)
    assert decision.refusal == (UNAVAILABLE_TEXT if refused else "") and decision.action is Action.ALLOW
    if not refused:
        decision = pipeline.after(decision, torch.zeros(2, 2))
        assert decision.actions == (Action.BLOCK,) * 2  # of the rule energy
    assert decision.unchecked and decision.notes == {"queries": LOST}
    assert {s.rule for row in decision.rows for s in row.scores} <= {"energy"}
    assert (pipeline.observed.n, pipeline.observed.alarms) == (0, 0)


def test_a_delay_does_not_replace_an_action_that_returns_less():
    pipeline = guard(
        rule("queries", action=Action.DELAY, threshold=-1.0),
        rule("energy", action=Action.LABEL_ONLY),
        delay_s=2.5,
    )
    decision = pipeline.after(pipeline.before(x()), torch.tensor([[-5.0, -5.0]]))
    assert decision.actions == (Action.LABEL_ONLY,) and decision.delay_s == 2.5


def test_a_delay_is_part_of_the_decision():
    pipeline = guard(rule("energy", action=Action.DELAY), delay_s=2.5)
    assert pipeline.after(pipeline.before(x()), torch.tensor([[-5.0, -5.0]])).delay_s == 2.5
    assert pipeline.after(pipeline.before(x()), torch.tensor([[5.0, 5.0]])).delay_s == 0


def test_outputs_of_another_number_of_inputs_are_refused():
    pipeline = guard()
    with pytest.raises(UsageError, match="returned 2 outputs for a request with 1 inputs"):
        pipeline.after(pipeline.before(x()), torch.zeros(2, 2))
    with pytest.raises(UsageError, match="'energy' has no detector"):
        replace(pipeline, detectors={})
    with pytest.raises(UsageError, match="needs a query detector"):
        replace(pipeline, queries=None)


def test_inputs_of_several_shapes_are_joined_by_shape():
    pipeline = replace(guard(), schema=InputSchema((1, None, None)))
    requests = [
        Incoming(torch.zeros(1, 1, 2, 2), "a"),
        Incoming(torch.zeros(2, 1, 3, 3), "b"),
        Incoming(torch.zeros(1, 1, 2, 2), "c"),
    ]
    decisions = pipeline.after_many(pipeline.before_many(requests), [torch.zeros(n, 2) for n in (1, 2, 1)])
    assert pipeline.queries.principals == ["a", "c", "b", "b"]
    assert [len(d.rows[0].scores) for d in decisions] == [
        4,
        3,
        4,
    ]  # the last request of b was blocked before the model
