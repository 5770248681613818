"""Batches of requests get the answers and the audit records of single requests."""

import json
import threading
from copy import deepcopy

import pytest
import torch
from torch import nn

from holdfast.core.model import Classifier
from holdfast.guard.detectors.outputs import Energy, LastFeatures
from holdfast.guard.detectors.queries import QueryDetector
from holdfast.guard.guard import GuardPipeline
from holdfast.guard.query_rule import QueryRule
from holdfast.guard.rules import Action, Incoming, InputDefence, InputSchema, Mode, Rule
from holdfast.guard.state_in_sqlite import SQLiteState
from holdfast.server.answering_requests import Answer, Answerer, ChainAudit, Job, ServedSet
from holdfast.server.audit_chain import AuditKey, ChainFile

SHAPE = (1, 8, 8)
SCHEMA = InputSchema(SHAPE)


def guarded(folder, **parts):
    """An answerer with all kinds of rules and actions, a state in a file, and an audit."""
    folder.mkdir()
    torch.manual_seed(0)
    model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 3))).eval().requires_grad_(False)
    state = SQLiteState(folder / "state.db")
    detector = QueryDetector(bytes(32), state, SHAPE, radius=0.5, threshold=3.0)
    rules = (
        Rule("schema", Mode.ENFORCE, Action.BLOCK, 0.0),
        Rule("range", Mode.ENFORCE, Action.DELAY, 0.0),
        Rule("queries", Mode.ENFORCE, Action.BLOCK, 2.9),
        Rule("energy", Mode.ENFORCE, Action.LABEL_ONLY, -0.9),
    )
    guard = GuardPipeline(
        SCHEMA,
        {rule.name: rule for rule in rules},
        {"energy": Energy()},
        queries=QueryRule(detector, SCHEMA, clock=lambda: 0.0),
        **parts,
    )
    chain = ChainFile(folder / "chain.jsonl")
    return Answerer(ServedSet(model, "s", 1), guard, ChainAudit(chain, AuditKey(bytes(32)))), chain


def jobs():
    """Requests of several sizes: different inputs, an attack, and inputs of wrong shape, type and range."""
    rng = torch.Generator().manual_seed(1)
    attacked = torch.rand(1, *SHAPE, generator=rng)
    inputs = []
    for k in range(24):
        x = torch.rand(1 + k % 3, *SHAPE, generator=rng)
        if k % 2:
            x[:1] = (attacked + 0.05 * torch.randn(1, *SHAPE, generator=rng)).clamp(0, 1)
        inputs.append(x)
    inputs[5], inputs[8] = torch.rand(1, 1, 8, 9, generator=rng), inputs[8].double()
    inputs[10], inputs[14] = inputs[10] + 1, torch.full((1, *SHAPE), torch.nan)
    return [Job(Incoming(x, f"client {k % 2}", f"{k:032x}"), digest="d" * 32) for k, x in enumerate(inputs)]


def contents(chain):
    """The records of a chain in the order of their requests, without their times."""
    records = [json.loads(line)["content"] for line in chain.path.read_text().splitlines()]
    return sorted(
        ({**record, "time": 0} for record in records), key=lambda record: (record["request"], record["kind"])
    )


@pytest.mark.parametrize("defence", [None, InputDefence(bits=3)])
def test_batches_get_the_answers_and_records_of_single_requests(tmp_path, defence):
    single, chain = guarded(tmp_path / "single", defence=defence)
    answers = [single([job])[0] for job in jobs()]
    for size in (5, 24):
        batched, other = guarded(tmp_path / f"{size}", defence=defence)
        batches = [batched(jobs()[start : start + size]) for start in range(0, 24, size)]
        for one, two in zip(answers, [answer for batch in batches for answer in batch], strict=True):
            assert type(one) is type(two)
            if isinstance(one, Exception):
                assert (one.status, one.reason) == (two.status, two.reason)
            else:
                torch.testing.assert_close(one.scores, two.scores)
                assert one.delay_s == two.delay_s
        for first, second in zip(contents(chain), contents(other), strict=True):
            rows = [each.pop("rows", None) for each in (first, second)]
            assert first == second
            if first["kind"] == "answered":
                for (action, scores), (same, others) in zip(*rows, strict=True):
                    assert action == same and scores.keys() == others.keys()
                    for rule, (value, *fired) in scores.items():
                        assert others[rule] == [pytest.approx(value, abs=1e-2), *fired]
        observed = [each.guard.observed for each in (single, batched)]
        assert len({(each.n, each.alarms) for each in observed}) == 1
    kinds = {(record.get("status"), record.get("action")) for record in contents(chain)}
    assert {(422, "block"), (200, "allow"), (200, "label_only")} <= kinds
    assert any(isinstance(answer, Answer) and answer.delay_s for answer in answers)


def test_each_outcome_has_the_features_of_its_inputs(tmp_path):
    answering, _ = guarded(tmp_path / "a")
    answering.features, outcomes = LastFeatures(answering.served.model.net, "0"), []
    answering.observed = lambda settled, served: outcomes.extend(settled)
    answering(jobs())
    answered = [each for each in outcomes if each.answer is not None]
    assert len(answered) > 3
    for each in answered:  # the layer returns the inputs, without their shape
        (features, first), x = each.features, each.job.incoming.x.flatten(1).float()
        assert torch.equal(features[first : first + len(x)], x)


def test_the_last_features_are_those_of_the_same_thread_and_of_any_copy():
    net = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 3))
    features, x = LastFeatures(net, "0"), torch.rand(5, 2)
    thread = threading.Thread(target=net, args=(torch.rand(7, 2),))
    thread.start()
    thread.join()
    assert features() is None
    deepcopy(net)(x)
    assert torch.equal(features(), net[0](x)) and LastFeatures(net, "other")() is None
