"""A candidate serves as a canary beside the served model, and runs of `holdfast adapt` hold the server."""

import os
import signal
import time
from types import SimpleNamespace

import httpx
import pytest

from holdfast.server.adaptations import Adaptations
from holdfast.server.admin import AdminServer
from holdfast.server.audit_folder import verify_audit
from holdfast.server.keys import KeyFile, add_key
from holdfast.server.messages import Generation, bound_socket
from holdfast.server.requests import Refused
from holdfast.server.supervisor import Supervisor
from holdfast.server.traffic import SetCounts
from holdfast.verbs.opening.resolve import open_subject
from holdfast.verbs.settings import Doctor
from waiting import until

from .test_reloading import Load, contents, prepared, write
from .test_server import running


class Operator:
    """Requests to the operator's port of a server."""

    def __init__(self, server, keys=None, key=None):
        listener = bound_socket("127.0.0.1", 0)
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        self.server, self.port = server, AdminServer(server, listener, keys)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", headers=headers)
        self.port.start()

    def close(self):
        self.client.close()
        self.port.stop()

    def post(self, path, **body):
        return self.client.post(path, json=body)

    def status(self):
        return self.client.get("/status").json()

    def canary(self, state):
        until(lambda: self.server.status()["canary"]["state"] == state)
        return self.server.status()["canary"]


@pytest.fixture
def operated():
    """Function that opens the operator's port of a server."""
    opened = []

    def make(*given):
        opened.append(Operator(*given))
        return opened[-1]

    yield make
    for operator in opened:
        operator.close()


def candidate(tmp_path, seed, **change):
    """A file with other weights, and the digest of the model in it."""
    file = tmp_path / f"candidate-{seed}.safetensors"
    write(file, seed, **change)
    subject = open_subject(Doctor(model=str(file), arch=f"{tmp_path / 'net.py'}:make"))
    return {"model": str(file), "digest": subject.digest}


@pytest.mark.slow
def test_a_canary_answers_a_share_and_ends_without_a_failed_request(tmp_path, operated):
    ready, file = prepared(tmp_path, audit=str(tmp_path / "audit"), workers=2)
    with running(ready) as (server, url, _), Load(url, (0, 1)) as load:
        operator, new = operated(server), candidate(tmp_path, 1)
        settings = operator.status()["model"]["settings"]
        assert settings == {"model": str(file), "arch": f"{tmp_path / 'net.py'}:make"}
        refused = operator.post("/canary", run="a", **new)
        assert refused.status_code == 409 and "does not hold the server" in refused.text
        assert operator.post("/adaptation", run="a", step="begin", facts={"x": 1}).status_code == 200
        assert operator.post("/adaptation", run="b", step="begin").status_code == 409
        assert operator.post("/canary", run="a", **new).status_code == 202
        name = operator.canary("serving")["set"]
        assert operator.post("/canary", run="a", **new).status_code == 409
        until(lambda: load.answers[1] > 20 and load.answers[0] > 20)
        until(lambda: operator.status()["sets"][name]["requests"] > 20)
        sets = operator.status()["sets"]
        assert sets.keys() == {name, ready.worker.set_name} and sets[name]["model_failures"] == 0
        worker = next(each for each in operator.status()["workers"] if each["set"] == name)
        os.kill(worker["pid"], signal.SIGKILL)
        assert "ended with status" in operator.canary("failed")["reason"]
        assert len(operator.status()["workers"]) == 2  # and it is not replaced
        assert operator.status()["sets"][name]["requests"] > 20
        load.failures.clear()  # connections to the killed process
        operator.post("/canary", run="a", **new)
        operator.canary("serving")
        server.request_swap("by the test")  # the canary ends before a reload
        operator.canary("none")
        until(lambda: server.status()["model"]["reload"] == "done")
        operator.post("/canary", run="a", **new)
        operator.canary("serving")
        operator.post("/adaptation", run="a", step="end", ended=True)
        operator.canary("none")  # with the run that began it
        assert load.failures == []
    assert verify_audit(tmp_path / "audit").failed == 0
    records = contents(tmp_path / "audit", "*server*")
    assert [r["state"] for r in records if r["kind"] == "canary"] == ["failed", "ended", "ended"]
    assert [r["step"] for r in records if r["kind"] == "adapt"] == ["begin", "end"]


@pytest.mark.slow
def test_candidates_that_cannot_serve(tmp_path, operated):
    ready, _ = prepared(tmp_path)
    with running(ready) as (server, _, _):
        operator = operated(server)
        operator.post("/adaptation", run="a", step="begin")
        good = candidate(tmp_path, 1)
        nan = tmp_path / "nan.safetensors"
        write(nan, 2, change=lambda name, value: value * float("nan"))
        for body, reason in (
            ({**good, "digest": "0" * 64}, "has the digest"),
            ({**good, "model": str(tmp_path / "absent.safetensors")}, "absent.safetensors"),
            ({**good, "model": str(nan)}, "NaN"),
        ):
            assert operator.post("/canary", run="a", **body).status_code == 202
            assert reason in operator.canary("failed")["reason"]
        assert operator.post("/canary", run="a", model=1, digest="").status_code == 400
        assert server.not_ready() == {} and len(operator.status()["workers"]) == 1


def test_runs_hold_the_server_one_at_a_time():
    records = []
    adaptations = Adaptations(
        lambda kind, **facts: records.append((kind, facts)), lambda name: f"~{name}", 0.05
    )
    adaptations.took("a", "begin", {})
    with pytest.raises(Refused, match="the run a adapts the model"):
        adaptations.took("b", "begin", {})
    assert adaptations.holder == "a"
    until(lambda: adaptations.holder is None)
    adaptations.took("b", "approval", {"n": 1})
    with pytest.raises(Refused, match="does not wait"):
        adaptations.approve("a", approved=True, by="operator")
    adaptations.approve("b", approved=False, by="operator")
    with pytest.raises(Refused, match="does not wait"):
        adaptations.approve("b", approved=True, by="operator")
    assert [run["approval"] for run in adaptations.runs()] == ["rejected", None]
    facts = {"run": "b", "approved": False, "principal": "~operator", "own": False}
    assert records[-1] == ("approval", facts)
    for run, step, facts in (
        (1, "x", {}),
        ("a", "", {}),
        ("a", "x", {"a": "x" * 9000}),
        ("a\n", "x", {}),
        ("a", "x", {"a": float("nan")}),
        ("a", "x", {"a": ["\ud800"]}),
    ):
        with pytest.raises(Refused):
            adaptations.took(run, step, facts)


def test_requests_are_counted_for_the_set_of_a_pool_that_served():
    def worker(name, serves):
        return SimpleNamespace(name=name, generation=serves, set_name=serves.name)

    def swap(name):
        counts.follow(Generation(name))
        for each in workers:
            each.set_name = each.generation.name

    def requests():
        return {name: each["requests"] for name, each in counts.sums().items()}

    workers = [worker(name, Generation("first")) for name in ("one", "two")]
    counted = {"one": 3.0, "two": 4.0, "three": 2.0}
    values = {("holdfast_requests_total", ("200",)): counted}
    totals = SimpleNamespace(of=lambda name: {key: (each[name],) for key, each in values.items()})
    counts = SetCounts(totals, workers)
    assert requests() == {"first": 7}
    swap("second")
    counted["one"] += 5
    counts.left(workers.pop(1))
    workers.append(worker("three", workers[0].generation))
    assert requests() == {"first": 7, "second": 7}
    for k in range(60):
        swap(f"set {k}")
    assert len(requests()) == 51, "the newest are kept"


def test_requests_of_the_operator(tmp_path, operated, set_limit):
    ready, _ = prepared(tmp_path)
    key, other = (add_key(tmp_path / "keys.json", scope, (scope,)) for scope in ("admin", "infer"))
    keys = KeyFile(tmp_path / "keys.json")
    server = Supervisor(ready)
    operator = operated(server, keys, key)
    assert operator.post("/adaptation", run="a", step="approval").json() == {"run": "a"}
    assert operator.post("/approval", run="a", approved=True).status_code == 409, "it posted the step"
    second = operated(server, keys, add_key(tmp_path / "keys.json", "second", ("approve",)))
    set_limit("holdfast.server.keys._CHECK_S", 0.0)
    assert second.post("/approval", run="a", approved=True).json()["approved"] is True
    run = operator.client.get("/adaptation").json()["runs"][0]
    assert (run["approval"], run["by"], run["steps"][0]["step"]) == ("approved", "second", "approval")
    assert abs(run["steps"][0]["time"] - time.time()) < 60
    assert operator.client.post("/adaptation", content=b"[1]").status_code == 400
    assert operator.client.post("/adaptation", content=b"{" * 1_100_000).status_code == 413
    assert operator.client.post("/canary", json={"run": "a"}, headers={"origin": "x"}).status_code == 403
    for stranger in (operated(server, keys), operated(server, keys, other)):
        assert stranger.post("/approval", run="a", approved=True).status_code in (401, 403)
        assert stranger.client.get("/adaptation").status_code in (401, 403)
        assert stranger.client.delete("/canary").status_code in (401, 403)
