"""A model is reloaded from its file while its server runs, and workers that make no progress are replaced."""

import json
import os
import pickle
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import holdfast
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.model import Classifier
from holdfast.guard.calibration import Calibration, write_calibration
from holdfast.server import messages as signals
from holdfast.server.audit_folder import verify_audit
from holdfast.server.messages import (
    Candidate,
    Generation,
    LoadedModel,
    Opened,
    PoolSet,
    Prepare,
    refuse_damaged,
)
from holdfast.server.requests import Refused
from holdfast.server.served_weights import ServedWeights
from holdfast.server.server_setup import ServerSetup, WorkerSetup
from holdfast.server.supervisor import Supervisor
from holdfast.server.telemetry import MetricTotals, Telemetry
from holdfast.settings.guard_settings import read_guard_settings
from holdfast.verbs.opening.guard import guard_digest
from holdfast.verbs.serve_opening import server_setup
from holdfast.verbs.settings import Serve
from waiting import until

from .small import FEATURES, network, request
from .test_server import JSON, X, running, scores, setup

CODE = f"from torch import nn\n\ndef make():\n    return nn.Linear({FEATURES}, 3)\n"


def write(path, seed, change=lambda name, value: value):
    """Write the weights of a network as an operator does: the file has its old or its new content."""
    state = network(seed).net.state_dict()
    save_file({name: change(name, value).contiguous() for name, value in state.items()}, f"{path}.new")
    Path(f"{path}.new").replace(path)


def prepared(tmp_path, **settings):
    """The setup of a server of the weights in a file."""
    code, file = tmp_path / "net.py", tmp_path / "model.safetensors"
    code.write_text(CODE)
    write(file, 0)
    values = {
        "port": 0,
        "name": "small",
        "model": str(file),
        "arch": f"{code}:make",
        "input_shape": [FEATURES],
        **settings,
    }
    return server_setup(Serve(**values)), file


def test_the_guard_states_the_shape_of_the_inputs(tmp_path):
    guard = tmp_path / "guard.yaml"
    guard.write_text(f"inputs: {{shape: [{FEATURES}]}}\nrules: {{range: {{}}}}\n")
    served, _ = prepared(tmp_path, input_shape=None, guard=str(guard))
    assert served.worker.shape == (FEATURES,)
    with pytest.raises(UsageError, match="the shape of the inputs is not known"):
        prepared(tmp_path, input_shape=None)


class Load:
    """Clients that send requests until they are stopped; they count the models that answer, and failures."""

    def __init__(self, url, seeds):
        self.logits = {seed: network(seed)(X)[0] for seed in seeds}
        self.answers, self.failures, self.stopped = Counter(), [], threading.Event()
        threads = [
            threading.Thread(target=self.run, args=(url, reused), daemon=True)
            for reused in (True, True, False)
        ]
        self.threads = threads
        for thread in threads:
            thread.start()

    def seed_of(self, answer):
        """The last bits of an answer depend on how many requests are in its batch; another network differs by more."""
        return next(seed for seed, logits in self.logits.items() if torch.allclose(logits, answer, atol=1e-5))

    def run(self, url, reused):
        limits = httpx.Limits() if reused else httpx.Limits(max_keepalive_connections=0)
        with httpx.Client(timeout=60, limits=limits) as client:
            while not self.stopped.is_set():
                try:
                    response = client.post(url, content=request(X), headers=JSON)
                    assert response.status_code == 200, response.text
                    self.answers[self.seed_of(scores(response))] += 1
                except Exception as error:  # noqa: BLE001 - every failure is one of the test
                    self.failures.append(repr(error))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stopped.set()
        for thread in self.threads:
            thread.join(60)


def contents(folder, pattern):
    return [
        json.loads(line)["content"]
        for chain in sorted(folder.glob(pattern))
        for line in chain.read_text().splitlines()
    ]


def most_workers(server, most):
    """Note the largest number of workers until a reload is done."""
    while server.status()["model"]["reload"] != "done":
        most[0] = max(most[0], len(server.status()["workers"]))
        time.sleep(0.002)


@pytest.mark.slow
def test_a_model_is_reloaded_under_load_and_an_unusable_or_unannounced_file_never_serves(tmp_path):
    ready, file = prepared(tmp_path, audit=str(tmp_path / "audit"), workers=2)
    names = {0: ready.worker.set_name}
    with running(ready) as (server, url, messages):

        def reloaded(state):
            server.request_swap("by the test")
            until(lambda: server.status()["model"]["reload"] == state)
            return server.status()["model"]

        with Load(url, (0, 1, 2)) as load:

            def answers(seed):
                count = load.answers[seed]
                until(lambda: load.answers[seed] > count + 20 or len(load.failures) > 9)

            answers(0)
            write(file, 1)
            most = [0]
            watching = threading.Thread(target=most_workers, args=(server, most))
            watching.start()
            status = reloaded("done")
            watching.join()
            names[1] = status["set"]
            assert status["epoch"] == 2 and names[1] != names[0] and most == [3]
            assert [worker["set"] for worker in server.status()["workers"]] == [names[1]] * 2
            assert load.failures == []

            write(file, 2, lambda name, value: value * torch.nan)
            assert "NaN" in reloaded("failed")["reason"]
            until(lambda: server.totals.value("holdfast_reload_failing") == 1)

            write(file, 2)  # not announced: a worker that dies must not be replaced by one with other weights
            os.kill(server.status()["workers"][0]["pid"], signal.SIGKILL)
            until(lambda: "its file has changed" in server.status()["model"]["reason"])
            answers(1)
            assert load.answers[2] == 0
            names[2] = reloaded("done")["set"]
            until(lambda: [worker["started"] for worker in server.status()["workers"]] == [True] * 2)
            assert server.totals.value("holdfast_reload_failing") == 0
            answers(2)
    # the requests of the killed worker, at most one of each client
    assert len(load.failures) <= 3 and not any("Assertion" in failure for failure in load.failures)
    records = contents(tmp_path / "audit", "*.worker-*.jsonl")
    recorded = Counter(each["set"] for each in records if each["kind"] == "answered")
    assert all(0 <= recorded[names[seed]] - load.answers[seed] <= 3 for seed in names)
    assert sum(recorded.values()) <= sum(load.answers.values()) + 3
    served = [each for each in contents(tmp_path / "audit", "*.server.jsonl") if each["kind"] == "set"]
    assert [(each["set"], each["epoch"]) for each in served] == [(names[1], 2), (names[2], 3)]
    assert verify_audit(tmp_path / "audit").open == 0
    assert any("the reload failed" in message for message in messages)


class Stuck(nn.Module):
    """A network that never returns for inputs above 0.9."""

    def forward(self, x):
        if bool((x > 0.95).all()):
            time.sleep(600)
        return x[:, :3]


def stuck():
    return LoadedModel(Classifier(Stuck()))


@pytest.mark.slow
def test_a_worker_that_makes_no_progress_is_replaced_and_its_requests_are_interrupted(tmp_path):
    ready = setup(tmp_path, opening=stuck, hung_s=2.0, max_rows=1)
    with running(ready) as (server, url, messages):

        def replaced(n):
            until(lambda: server.totals.value("holdfast_worker_hangs_total") >= n)
            until(lambda: server.totals.value("holdfast_worker_restarts_total") >= n)
            until(lambda: server.status()["ready"])
            assert httpx.post(url, content=request(X), headers=JSON).status_code == 200

        with pytest.raises(httpx.TransportError):
            httpx.post(url, content=request(torch.ones(1, FEATURES)), headers=JSON, timeout=60)
        replaced(1)
        os.kill(server.status()["workers"][0]["pid"], signal.SIGSTOP)
        replaced(2)
    assert any("a batch made no progress for 2 s" in message for message in messages)
    assert any("the process made no progress for 2 s" in message for message in messages)
    ends = [r for r in contents(tmp_path / "audit", "*.jsonl") if r["kind"] == "interrupted"]
    assert [end["reason"] for end in ends] == ["a batch made no progress for 2 s"]
    verified = verify_audit(tmp_path / "audit")
    assert (verified.answered, verified.interrupted, verified.open) == (2, 1, 0)


GUARD = """
mode: enforce
inputs: {shape: [4]}
rules: {energy: {}}
state: {at: memory}
"""


def test_the_guard_of_a_reloaded_model_must_be_calibrated_with_it(tmp_path):
    guard = tmp_path / "guard.yaml"
    guard.write_text(GUARD)
    digest = guard_digest(read_guard_settings(guard))
    ready, file = prepared(tmp_path, guard=str(guard))
    assert len(ready.notes) == 1 and "the rule energy only reports" in ready.notes[0]

    def calibrate(model):
        calibration = Calibration(0.01, 100, 1, {"energy": 1.0}, digest, (model,))
        write_calibration(calibration, tmp_path / "guard.calibration.json")

    before = ready.worker.opening()
    write(file, 1)
    after = ready.worker.opening()
    assert before.digest == ready.worker.digest != after.digest
    calibrate(before.guard_digest)
    ready.worker.guard(before.guard_digest)
    with pytest.raises(UsageError, match="was calibrated with the model"):
        ready.worker.guard(after.guard_digest)
    calibrate(after.guard_digest)
    ready.worker.guard(after.guard_digest)


def test_a_damaged_model_is_refused():
    def damaged(change):
        net = nn.Linear(FEATURES, 3)
        with torch.no_grad():
            change(net)
        return Classifier(net)

    cpu = torch.device("cpu")
    with pytest.raises(TargetError, match="1 parameters of the model contain NaN, such as .*bias"):
        refuse_damaged(damaged(lambda net: net.bias[0].fill_(torch.nan)), (FEATURES,), cpu)
    with pytest.raises(TargetError, match="NaN or infinite"):
        refuse_damaged(damaged(lambda net: net.weight.fill_(torch.inf)), (FEATURES,), cpu)
    refuse_damaged(damaged(lambda net: None), (FEATURES,), cpu)


@pytest.mark.slow
def test_sighup_reloads_a_model_and_ends_a_server_whose_terminal_was_closed(monkeypatch):
    worker = WorkerSetup(stuck, "small", (FEATURES,), set_name="file")
    process = {"has_terminal": True, "in_foreground": True}
    for name in ("has_terminal", "in_foreground"):
        monkeypatch.setattr(signals, name, lambda name=name: process[name])
    server = Supervisor(ServerSetup(worker, reloadable=True))
    # a test run under nohup inherits that the signal is ignored, and such a server does not end
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with server.hang_ups():
            os.kill(os.getpid(), signal.SIGHUP)
            until(lambda: server._step() or server.status()["model"]["reload"] == "running")
            assert not server.status()["draining"]
            process["has_terminal"] = False
            os.kill(os.getpid(), signal.SIGHUP)
            until(lambda: server.status()["draining"])
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
    # the terminal of a process in the background may be closed without a report to it
    process["in_foreground"] = False
    server = Supervisor(ServerSetup(worker, reloadable=True))
    with server.hang_ups():
        os.kill(os.getpid(), signal.SIGHUP)
        until(lambda: server._step() or server.status()["model"]["reload"] == "running")
        assert not server.status()["draining"]
    with pytest.raises(UsageError, match="has no pool and no file"):
        Supervisor(ServerSetup(worker)).request_swap("")


@pytest.mark.slow
def test_sighup_directly_after_the_start_reloads_the_model_and_does_not_end_the_server():
    messages, before = [], signal.signal(signal.SIGHUP, signal.SIG_IGN)
    late = threading.Timer(60, os.kill, (os.getpid(), signal.SIGTERM))

    def notify(text):
        messages.append(text)
        if text.startswith("serving"):
            os.kill(os.getpid(), signal.SIGHUP)
        if text.startswith("all workers serve"):
            os.kill(os.getpid(), signal.SIGTERM)

    late.start()
    try:
        holdfast.serve("mnist-cnn", port=0, admin_port=0, notify=notify)
    finally:
        late.cancel()
        signal.signal(signal.SIGHUP, before)
    assert "the model is reloaded: SIGHUP" in messages


class Fake:
    """A worker without a process. `process` and `child` are itself."""

    def __init__(self, number, generation):
        self.name, self.generation, self.ready, self.opened = f"worker-{number}", generation, True, False
        self.retiring = self.drained = False
        self.error, self.sent, self.killed = None, [], False
        self.child = self.process = self

    @property
    def set_name(self):
        return self.generation.name if self.opened else ""

    def send(self, message):
        self.sent.append(message)

    def retire(self):
        self.retiring = True

    def kill(self):
        self.killed = True


class Weights:
    """The served weights of a server with fake workers, its messages, metrics and records."""

    def __init__(self, n=2):
        self.workers, self.messages, self.records = [], [], []
        self.telemetry, self.totals = Telemetry(), MetricTotals()
        self.totals.follow("supervisor", self.telemetry.memory)
        worker = WorkerSetup(stuck, "small", (FEATURES,), set_name="old", digest="old")
        self.state = ServedWeights(
            ServerSetup(worker, reloadable=True, opening={"model": "m.pt"}, candidate=lambda file: worker),
            self.workers,
            self.begin,
            self.totals,
            self.telemetry,
            lambda kind, **facts: self.records.append((kind, facts)),
            self.messages.append,
            self.messages.append,
        )
        for _ in range(n):
            self.state.opened(self.begin(self.state.serving), Opened("old", 3))

    def begin(self, generation, setup=None):
        self.workers.append(Fake(len(self.workers), generation))
        return self.workers[-1]

    def poll(self):
        """Take one step, and return the newest worker."""
        self.state.poll("a")
        return self.workers[-1]

    def end(self, worker, cause=""):
        """Let a worker end, and return whether no other one starts in its place."""
        self.workers.remove(worker)
        return self.state.left(worker, cause or str(worker.error))

    @property
    def reload(self):
        return self.state.status({})["model"]

    @property
    def failing(self):
        return self.totals.value("holdfast_reload_failing")


@pytest.mark.parametrize(
    ("digest", "classes", "reason"),
    [("new", 4, "a model with 4 classes, and 3 are served"), ("new", 3, "")],
)
def test_the_first_worker_of_a_reload_announces_a_model_with_the_same_outputs(digest, classes, reason):
    server = Weights()
    server.state.request("a test")
    new = server.poll()
    assert server.state.testing and len(server.workers) == 3
    server.state.opened(new, Opened(digest, classes))
    if reason:
        assert new.killed and not new.sent
        assert server.end(new) and reason in server.messages[-1]
        assert "all workers serve the model from before" in server.messages[-1] and not server.records
        assert server.reload["set"] == "old" and server.reload["reload"] == "failed"
        return
    assert server.reload["set"] == "old" and server.records[0][1]["set"] == "new" and new.error is None
    assert server.state.ready(new) and server.reload["set"] == "new"
    assert server.state.old == server.workers[:2]


def test_a_worker_with_another_model_than_the_announced_one_is_refused():
    server = Weights()
    first = server.begin(server.state.serving)
    server.state.opened(first, Opened("other", 3))
    assert "its file has changed" in str(first.error) and not first.sent
    assert not server.end(first)
    server.state.request("a test")
    new = server.poll()
    server.state.opened(new, Opened("new", 3))
    server.state.ready(new)
    del server.workers[0]  # it was retired
    second = server.poll()
    assert len(server.workers) == 3 and not server.state.testing
    server.state.opened(second, Opened("newer", 3))
    assert server.end(second)
    assert "1 of 2 workers serve the model from before" in server.messages[-1]


def test_the_metric_of_failed_reloads_is_cleared_by_the_next_one():
    server = Weights(1)
    server.state.request("a test")
    server.end(server.poll(), "the file is missing")
    assert server.failing == 1
    server.state.request("again")
    new = server.poll()
    server.state.opened(new, Opened("old", 3))  # only the guard has changed
    assert server.state.ready(new) and server.reload["epoch"] == 1 and not server.records
    del server.workers[0]
    server.poll()
    assert server.failing == 0 and server.reload["reload"] == "done"


def test_a_worker_that_began_before_a_reload_serves_the_new_model_and_is_replaced():
    server = Weights(1)
    late = server.begin(server.state.serving)
    server.state.request("a test")
    new = server.poll()
    server.state.opened(new, Opened("new", 3))
    server.state.ready(new)
    server.state.opened(late, Opened("new", 3))
    assert late.sent[-1].name == "new" and late.error is None and late in server.state.old


def test_a_canary_that_dies_is_not_replaced_and_a_reload_ends_one_that_serves():
    server = Weights(1)
    candidate = Candidate("a", "/c.pt", "wanted")
    for state in ("failed", "serving"):
        server.state.request_canary(candidate)
        worker = server.poll()
        with pytest.raises(Refused, match="there is a canary already"):
            server.state.request_canary(candidate)
        server.state.opened(worker, Opened("wanted", 3))
        assert not server.state.ready(worker)
        if state == "failed":
            assert server.end(worker, "it died")
        assert server.state.status({})["canary"]["state"] == state
    server.state.request("a test")
    server.poll()
    assert worker.retiring and server.reload["reload"] == "running"
    worker.drained = True
    assert server.end(worker) and server.state.status({})["canary"]["state"] == "none"
    assert server.poll().generation is server.state.following
    assert [facts.get("state") for _, facts in server.records] == [None, "failed", None, "ended"]


def test_a_worker_that_begins_during_a_swap_is_sent_the_next_set_before_it_serves_it():
    server = Weights(0)
    answers = {
        "first": Generation("first", pooled=PoolSet({})),
        "next": Generation("next", 2, pooled=PoolSet({})),
    }
    due = [answers["next"]]
    server.state.pool = SimpleNamespace(
        alarm="",
        pool=SimpleNamespace(ahead=()),
        write=lambda now=False: None,
        due=lambda serving: due.pop(),
        test=lambda following: None,
        commit=lambda following, serving: True,
    )
    server.state.serving = answers["first"]
    old = server.begin(answers["first"])
    server.poll()
    until(lambda: server.poll() and old.sent)
    starting = server.begin(answers["first"])
    starting.ready = False
    server.state.loaded(old, 2)
    assert [decoded(each) for each in old.sent] == [("next", 2), 2]
    assert [decoded(each) for each in starting.sent] == [("next", 2), 2]
    assert answers["first"].state == "retired" and starting.generation is answers["next"]


def decoded(message):
    """Name and epoch of a set that a worker is sent, or the epoch that it is to serve."""
    message = pickle.loads(message) if isinstance(message, bytes) else message
    return (message.name, message.epoch) if isinstance(message, Prepare) else message.epoch
