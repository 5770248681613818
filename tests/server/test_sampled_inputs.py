"""The sample of a worker for `holdfast adapt`: bounded, of all clients, and read in one answer."""

import io
import json
import time

import httpx
import msgspec
import numpy as np
import pytest
import torch

from holdfast.guard.rules import Incoming
from holdfast.server import live_monitor
from holdfast.server.answering_requests import Answer, Job, Outcome, ServedSet
from holdfast.server.audit_chain import AuditKey
from holdfast.server.keys import KeyFile, add_key
from holdfast.server.live_monitor import CollectedSamples, SampledInputs
from holdfast.server.requests import Refused
from waiting import until

from . import test_canary
from .small import FEATURES, request
from .test_canary import candidate
from .test_reloading import prepared
from .test_server import running

operated = test_canary.operated
SERVED = ServedSet(None, "a")
ROW = 4 * FEATURES


def outcome(x, principal, *, failed=False, reached=True):
    refusal = Refused(500, "the model failed", (), "model" if failed else "guard")
    answer = None if failed or not reached else Answer(torch.zeros(len(x), 3))
    return Outcome(Job(Incoming(x, principal)), None, answer, refusal, reached=reached)


@pytest.fixture
def sampled(set_limit):
    set_limit("holdfast.server.live_monitor._SPACING_S", 0.0)
    sampled = SampledInputs()
    sampled.limit(10 * ROW)
    return sampled


def sent(sampled, principal, n, value=0.0, **more):
    for k in range(n):
        sampled.add([outcome(torch.full((1, FEATURES), value + k), principal, **more)], SERVED)


def kept(sampled):
    """The first value of each sampled input, by client."""
    sent = received(sampled.answer(1))
    x = np.frombuffer(sent.x, "<f4").reshape(sent.shape)
    return {
        name: [x[k, 0] for k, owner in enumerate(sent.principals) if owner == name]
        for name in dict.fromkeys(sent.principals)
    }


def received(message):
    """A message as the supervisor receives it."""
    return msgspec.json.decode(json.dumps(msgspec.to_builtins(message)), type=type(message))


def test_nothing_is_kept_without_a_run(sampled):
    sampled.limit(0)
    sent(sampled, "a", 3)
    assert kept(sampled) == {}
    sampled.limit(10 * ROW)
    sent(sampled, "a", 3)
    assert kept(sampled) == {"a": [0, 1, 2]}
    sampled.limit(0)
    assert kept(sampled) == {}


def test_a_flood_of_one_client_displaces_no_input_of_others(sampled):
    sent(sampled, "flood", 500)
    assert kept(sampled) == {"flood": list(range(490, 500))}
    sent(sampled, "a", 5)
    sent(sampled, "flood", 500)
    assert kept(sampled) == {"flood": list(range(495, 500)), "a": [0, 1, 2, 3, 4]}
    sent(sampled, "b", 3)
    assert {name: len(values) for name, values in kept(sampled).items()} == {"flood": 3, "a": 3, "b": 3}
    for k in range(20):
        sent(sampled, f"c{k}", 1)
    assert len(kept(sampled)) == 10


def test_a_client_that_sends_often_is_not_sampled_often(monkeypatch):
    sampled = SampledInputs()
    sampled.limit(1000 * ROW)
    begun = time.monotonic()
    sent(sampled, "flood", 2000)
    took = time.monotonic() - begun
    sent(sampled, "a", 1)
    sent(sampled, "flood", 1, failed=True)
    found = kept(sampled)
    assert len(found["flood"]) <= 3 + took / live_monitor._SPACING_S and found["a"] == [0]


def test_inputs_on_which_the_model_fails_are_kept_apart(sampled):
    sent(sampled, "a", 2, 100.0, failed=True)
    sent(sampled, "a", 50)
    failed = sampled.answer(1).failed
    assert sorted(x for x in kept(sampled)["a"] if x >= 100) == [100, 101] and sum(failed) == 2


def test_inputs_that_were_refused_before_the_model_are_left_out(sampled):
    sampled.add([outcome(torch.ones(1, FEATURES), "a", reached=False)], SERVED)
    assert kept(sampled) == {}


def test_one_input_of_a_large_request_does_not_keep_the_others_in_memory(sampled):
    sampled.add([outcome(torch.rand(64, FEATURES), "a")], SERVED)
    (only,) = sampled._clients["a"].inputs
    assert only.x.untyped_storage().nbytes() == ROW


def test_inputs_of_another_shape_are_left_out(sampled):
    sampled.add([outcome(torch.ones(1, FEATURES), "a")], SERVED)
    sampled.add([outcome(torch.ones(1, FEATURES + 1), "b")], SERVED)
    assert list(kept(sampled)) == ["b"]


def test_answers_are_joined_with_pseudonyms_and_classes(sampled):
    sent(sampled, "a", 2)
    answer = received(sampled.answer(0))
    collected = CollectedSamples(AuditKey(bytes(32)).pseudonym)

    def ask(number):
        for k in (number - 1, number, number):
            collected.received(msgspec.structs.replace(answer, number=k))
        return 2

    with np.load(io.BytesIO(collected.collected(ask, lambda request, row: 7))) as arrays:
        assert arrays["x"].tolist() == [[k] * FEATURES for k in (0, 1, 0, 1)], "an earlier answer is ignored"
        assert set(arrays["principal"]) == {AuditKey(bytes(32)).pseudonym("a")} and (arrays["y"] == 7).all()
        assert set(arrays["set"]) == {"a"} and not arrays["failed"].any() and (arrays["age"] >= 0).all()
    with np.load(io.BytesIO(collected.collected(lambda number: 0, lambda *_: -1))) as arrays:
        assert len(arrays["x"]) == len(arrays["principal"]) == 0


@pytest.mark.slow
def test_all_workers_sample_while_a_run_holds_the_server(tmp_path, operated):
    keys = tmp_path / "keys.json"
    clients, key = (
        [add_key(keys, name, ("infer",)) for name in ("one", "two")],
        add_key(keys, "op", ("admin",)),
    )
    ready, _ = prepared(tmp_path, workers=1, keys=str(keys))
    with running(ready) as (server, url, _):
        operator = operated(server, KeyFile(keys), key)

        def ask(n):
            for k in range(n):
                headers = {"authorization": f"Bearer {clients[k % 2]}", "content-type": "application/json"}
                httpx.post(url, content=request(torch.rand(1, FEATURES)), headers=headers).raise_for_status()
                time.sleep(0.03)

        def samples():
            with np.load(io.BytesIO(operator.client.get("/samples").content)) as arrays:
                return dict(arrays)

        assert operator.client.get("/samples").status_code == 409
        operator.post("/adaptation", run="a", step="begin")
        operator.post("/canary", run="a", **candidate(tmp_path, 1))
        operator.canary("serving")
        until(lambda: all(worker.sampling for worker in server._workers))
        until(lambda: ask(4) or len(set(samples()["set"])) == 2)
        found = samples()
        assert len(set(found["principal"])) == 2 and "one" not in found["principal"]
        operator.post("/adaptation", run="a", step="end", ended=True)
        until(lambda: not any(worker.sampling for worker in server._workers))
