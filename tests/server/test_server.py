"""The server as processes: it answers, replaces workers that die, swaps parameter sets, and drains."""

import asyncio
import json
import os
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import httpx
import pytest
import torch

from disk import failing
from holdfast.core.errors import TargetError
from holdfast.rotation import AnswersPerPrincipal, Elapsed
from holdfast.rotation.pool import Pool
from holdfast.runs.engine import processes
from holdfast.server.audit_chain import AuditKey
from holdfast.server.audit_folder import verify_audit
from holdfast.server.messages import LoadedModel, no_rules
from holdfast.server.server_setup import HUNG_S, LivePool, ServerSettings, ServerSetup, WorkerSetup
from holdfast.server.supervisor import Supervisor
from waiting import until

from .small import FEATURES, network, pool, request

JSON = {"content-type": "application/json"}
X = torch.rand(1, FEATURES, generator=torch.Generator().manual_seed(3))


def setup(tmp_path, *, opening=None, live=None, guard=no_rules, hung_s=HUNG_S, **settings):
    audit = tmp_path / "audit"
    worker = WorkerSetup(
        opening or opened,
        "small",
        (FEATURES,),
        ServerSettings(port=0, audit=str(audit), **settings),
        set_name="" if live else "file",
        audit_key=AuditKey.of(audit),
        guard=guard,
        hung_s=hung_s,
    )
    return ServerSetup(worker, live)


@contextmanager
def running(prepared, **settings):
    """A running server, its address and its messages; it drains at the end of the context."""
    messages = []
    server = Supervisor(replace(prepared, **settings), messages.append)
    server.start()
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server, f"http://127.0.0.1:{server.address[1]}/v2/models/small/infer", messages
    finally:
        server.stop()
        thread.join(60)
    assert not thread.is_alive()


def scores(response):
    return torch.tensor(response.json()["outputs"][0]["data"])


@pytest.mark.slow
def test_a_client_that_retries_sees_no_failure_when_workers_are_killed(tmp_path):
    expected, stop, failures, answered = network()(X)[0], threading.Event(), [], []

    def load(url):
        with httpx.Client(timeout=60) as client:
            while not stop.is_set():
                try:
                    response = client.post(url, content=request(X), headers=JSON)
                except httpx.TransportError:
                    continue
                answered.append(1)
                if response.status_code != 200 or not torch.equal(scores(response), expected):
                    failures.append(response.text)

    with running(setup(tmp_path, workers=2)) as (server, url, messages):
        threads = [threading.Thread(target=load, args=(url,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for kill in range(2):
            until(lambda: [worker["started"] for worker in server.status()["workers"]] == [True] * 2)
            count = len(answered)
            until(lambda count=count: len(answered) > count + 20)
            os.kill(server.status()["workers"][kill % 2]["pid"], signal.SIGKILL)
            until(lambda n=kill + 1: server.totals.value("holdfast_worker_restarts_total") == n)
        until(lambda: [worker["started"] for worker in server.status()["workers"]] == [True] * 2)
        stop.set()
        for thread in threads:
            thread.join(60)
    assert not failures and sum("replaced" in message for message in messages) == 2
    verified = verify_audit(tmp_path / "audit")
    assert verified.open == 0 and verified.answered >= len(answered) and verified.chains == 5
    counted = server.totals.value("holdfast_inputs_total")
    # a kill between the record of a batch and its count loses at most the four requests of the batch
    assert verified.answered - 2 * 4 <= counted <= verified.answered


@pytest.mark.slow
def test_a_server_drains_and_answers_what_it_received(tmp_path):
    with running(setup(tmp_path)) as (server, url, _):

        async def burst():
            async with httpx.AsyncClient(timeout=60) as client:
                posts = [
                    asyncio.ensure_future(client.post(url, content=request(X), headers=JSON))
                    for _ in range(50)
                ]
                await asyncio.sleep(0.05)
                server.stop()
                return await asyncio.gather(*posts, return_exceptions=True)

        responses = asyncio.run(burst())
    answered = [r for r in responses if isinstance(r, httpx.Response)]
    assert all(r.status_code == 200 for r in answered) and answered
    # a connection that was not accepted before the end is refused, and its client connects elsewhere
    assert all(isinstance(r, httpx.Response | httpx.ConnectError | httpx.ReadError) for r in responses)
    verified = verify_audit(tmp_path / "audit")
    assert (verified.answered, verified.open, verified.interrupted) == (len(answered), 0, 0)


@pytest.fixture
def live(tmp_path, monkeypatch):
    monkeypatch.delenv("HOLDFAST_POOL_KEY", raising=False)
    return lambda n=4, **settings: LivePool(pool(tmp_path / "pool", n), network, **settings)


def set_of(response, sets):
    """Names of the sets that give these scores."""
    return [name for name, logits in sets.items() if torch.equal(logits, scores(response))]


@pytest.mark.slow
def test_swaps_under_load_answer_every_request_by_one_serving_set(tmp_path, live):
    prepared = live(8, triggers=[AnswersPerPrincipal(40)])
    names = [member.name for member in prepared.pool.ledger.members]
    sets = {name: network(seed)(X)[0] for seed, name in enumerate(names)}
    with running(setup(tmp_path, workers=2, live=prepared)) as (server, url, messages):
        with httpx.Client(timeout=60) as client:
            seen = []
            while prepared.alarm != "empty":
                response = client.post(url, content=request(X), headers=JSON)
                assert response.status_code == 200, response.text
                seen += set_of(response, sets)
        assert server.totals.value("holdfast_pool_alarm", "empty") == 1
        assert client is not None and server.status()["pool"]["epoch"] == 8
        last = server.status()["pool"]["set"]
        assert set_of(httpx.post(url, content=request(X), headers=JSON), sets) == [last]
    assert len(set(seen)) == 8 and any("alarm empty" in message for message in messages)
    opened = Pool.open(tmp_path / "pool")
    terms = opened.ledger.terms
    assert sum(term.others for term in terms) == len(seen) + 1
    assert all(term.others >= 40 for term in terms[:-1])
    order = [name for place, name in enumerate(seen) if place == 0 or seen[place - 1] != name]
    # while a swap is passed on, two workers may answer by the old and the new set
    assert [name for place, name in enumerate(order) if name not in order[:place]] == [t.name for t in terms]
    recorded = {}
    for chain in (tmp_path / "audit").glob("*.worker-*.jsonl"):
        for line in chain.read_text().splitlines():
            content = json.loads(line)["content"]
            if content["kind"] == "answered":
                recorded[content["set"]] = recorded.get(content["set"], 0) + 1
    assert recorded == {term.name: term.others for term in terms}
    assert verify_audit(tmp_path / "audit").answered == len(seen) + 1


@pytest.mark.slow
def test_a_set_that_cannot_be_loaded_is_refused_and_never_serves(tmp_path, live):
    prepared = live(1, triggers=[AnswersPerPrincipal(1)])
    wrong = prepared.pool.add(dict(network(9).net.state_dict()), {})
    prepared.pool.admit(wrong, canary="0" * 64)
    first = prepared.pool.swap(choose=lambda names: next(name for name in names if name != wrong))
    with running(setup(tmp_path, live=prepared)) as (server, url, messages):
        for _ in range(3):
            assert httpx.post(url, content=request(X), headers=JSON).status_code == 200
        until(lambda: prepared.alarm == "empty")
        assert server.status()["pool"]["set"] == first.name
    assert Pool.open(tmp_path / "pool").ledger.member(wrong).state == "refused"
    assert any("have the digest" in message or "predicts" in message for message in messages)


def test_swaps_are_limited_except_those_of_stolen_sets(live):
    clock = [0.0]
    prepared = live(5, triggers=[AnswersPerPrincipal(1)], swaps_per_hour=2, clock=lambda: clock[0])
    serving = prepared.first()
    for _ in range(2):
        prepared.answered(serving.epoch, {"alice": 1})
        following = prepared.due(serving)
        assert prepared.commit(following, serving)
        serving = following
    prepared.answered(serving.epoch, {"alice": 1})
    assert prepared.due(serving) is None and prepared.alarm == "limit"
    clock[0] = 3601.0
    assert prepared.due(serving) is not None
    clock[0] = 1.0
    prepared.pool.expose(serving.name, "a theft")
    for name in prepared.pool.ahead:
        prepared.pool.admit(name, canary=prepared.pool.ledger.member(name).canary, against=[serving.name])
    assert prepared.due(serving) is not None


def test_a_machine_whose_date_is_set_back_still_swaps_by_time(live):
    clock = [0.0]
    prepared = live(2, triggers=[Elapsed(3600)], clock=lambda: clock[0])
    serving = prepared.first()
    assert prepared.due(serving) is None
    clock[0] = 3601.0  # while the date has hardly changed
    assert prepared.due(serving) is not None


def test_answers_are_kept_while_the_ledger_cannot_be_written(live, monkeypatch):
    prepared = live(2, triggers=[])
    serving = prepared.first()
    prepared.answered(serving.epoch, {"alice": 3, "": 2})
    with monkeypatch.context() as patched:
        failing(patched, 1, ("write",))
        prepared.write(now=True)
    assert prepared.alarm == "error"
    prepared.write(now=True)
    (term,) = prepared.pool.ledger.terms
    assert term.answers == {prepared.pool.pseudonym("alice"): 3} and term.others == 2


@pytest.mark.slow
def test_a_model_that_cannot_be_opened_is_reported_and_no_worker_has_the_key_of_the_pool(monkeypatch):
    def read_late(pipe, read=processes.read_message):
        time.sleep(0.3)  # so that the process has ended before its error is read
        return read(pipe)

    monkeypatch.setattr(processes, "read_message", read_late)
    monkeypatch.setenv("HOLDFAST_POOL_KEY", "secret")
    worker = WorkerSetup(unusable, "small", (FEATURES,), ServerSettings(port=0), set_name="file")
    with pytest.raises(TargetError, match="this model is missing"):
        Supervisor(ServerSetup(worker)).start()


def opened():
    return LoadedModel(network())


def unusable():
    assert "HOLDFAST_POOL_KEY" not in os.environ
    raise TargetError("this model is missing")
