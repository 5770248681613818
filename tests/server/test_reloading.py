"""A model is reloaded from its file while its server runs, and workers that make no progress are replaced."""

import json
import os
import signal
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import holdfast
from holdfast.api.guard_opening import guard_digest
from holdfast.api.serving import server_setup
from holdfast.api.verb_settings import Serve
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.model import Classifier
from holdfast.guard.calibration import Calibration, write_calibration
from holdfast.server import server_signals as signals
from holdfast.server.audit_folder import verify_audit
from holdfast.server.loaded_model import LoadedModel, refuse_damaged
from holdfast.server.reloading import Reloading, ServedVersion
from holdfast.server.server_worker import ServingSetup
from holdfast.server.supervisor import ServerSetup, Supervisor
from holdfast.server.telemetry import MetricTotals, Telemetry
from holdfast.settings.guard_settings import read_guard_settings
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
            begin_worker, most = server._reloading._begin_worker, []
            server._reloading._begin_worker = lambda: (most.append(len(server._workers)), begin_worker())[1]
            status = reloaded("done")
            names[1] = status["set"]
            assert status["epoch"] == 2 and names[1] != names[0] and most == [2, 2]
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
            until(lambda: sum(worker.ready for worker in server._workers) == 2)
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
    ready = setup(tmp_path, hung_s=2.0, max_rows=1)
    ready = replace(ready, worker=replace(ready.worker, opening=stuck))
    with running(ready) as (server, url, messages):

        def replaced(n):
            until(lambda: server.totals.value("holdfast_worker_hangs_total") >= n)
            until(lambda: server.totals.value("holdfast_worker_restarts_total") >= n)
            until(lambda: any(worker.ready for worker in server._workers))
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
    worker, terminal = ServingSetup(stuck, "small", (FEATURES,), set_name="file"), [True]
    monkeypatch.setattr(signals, "has_terminal", lambda: terminal[0])
    monkeypatch.setattr(signals, "in_foreground", lambda: True)
    server = Supervisor(ServerSetup(worker, reloadable=True))
    # a test run under nohup inherits that the signal is ignored, and such a server does not end
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with server.hang_ups():
            os.kill(os.getpid(), signal.SIGHUP)
            until(lambda: server._step() or server.status()["model"]["reload"] == "running")
            assert not server.status()["draining"]
            terminal[0] = False
            os.kill(os.getpid(), signal.SIGHUP)
            until(lambda: server.status()["draining"])
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
    # the terminal of a process in the background may be closed without a report to it
    monkeypatch.setattr(signals, "in_foreground", lambda: False)
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
    """A worker without a process."""

    def __init__(self):
        self.generation, self.ready, self.retiring, self.error, self.sent, self.set_name = (
            0,
            True,
            False,
            None,
            [],
            "",
        )
        self.canary, self.child, self.process = False, self, self

    def send(self, content):
        self.sent.append(content)

    def kill(self):
        self.killed = True


def reloading(n=2):
    """The reloads of a server with fake workers, the messages, the metrics, and the records."""
    workers, messages, records, telemetry = [Fake() for _ in range(n)], [], [], Telemetry()

    def begin():
        workers.append(Fake())
        return workers[-1]

    return (
        Reloading(
            ServedVersion("old", "old", classes=3),
            workers,
            telemetry,
            lambda kind, **facts: records.append(facts),
            messages.append,
            messages.append,
            begin_worker=begin,
        ),
        workers,
        messages,
        records,
    )


@pytest.mark.parametrize(
    ("digest", "classes", "reason"),
    [("new", 4, "a model with 4 classes, and 3 are served"), ("new", 3, "")],
)
def test_the_first_worker_of_a_reload_announces_a_model_with_the_same_outputs(digest, classes, reason):
    state, workers, messages, records = reloading()
    state.request("a test")
    state.poll()
    assert state.testing and len(workers) == 3
    new = workers[2]
    state.opened(new, {"digest": digest, "classes": classes})
    if reason:
        workers.remove(new)
        assert state.left(new, str(new.error)) and reason in messages[-1]
        assert "all workers serve the model from before" in messages[-1] and not records
        assert state.version.name == "old" and state.status()["reload"] == "failed"
        return
    assert (state.version.name, records[0]["set"], new.error) == ("old", "new", None)
    assert state.ready(new) and state.version.name == "new" and state.old == workers[:2]


def test_a_worker_with_another_model_than_the_announced_one_is_refused():
    state, workers, messages, _ = reloading()
    state.opened(workers[0], {"digest": "other", "classes": 3})
    assert "its file has changed" in str(workers[0].error) and not workers[0].sent
    state.request("a test")
    state.poll()
    state.opened(workers[2], {"digest": "new", "classes": 3})
    state.ready(workers[2])
    del workers[0]  # it was retired
    state.poll()
    assert len(workers) == 3 and not state.testing
    state.opened(workers[2], {"digest": "newer", "classes": 3})
    failed = workers.pop()
    assert state.left(failed, str(failed.error))
    assert "1 of 2 workers serve the model from before" in messages[-1]


def test_the_metric_of_failed_reloads_is_cleared_by_the_next_one():
    state, workers, _, _ = reloading(1)
    totals = MetricTotals()

    def failing():
        totals.follow("supervisor", state._telemetry.memory)
        return totals.value("holdfast_reload_failing")

    state.request("a test")
    state.poll()
    state.left(workers.pop(), "the file is missing")
    assert failing() == 1
    state.request("again")
    state.poll()
    state.opened(workers[1], {"digest": "old", "classes": 3})  # only the guard has changed
    assert state.ready(workers[1]) and state.status()["epoch"] == 1
    del workers[0]
    state.poll()
    assert failing() == 0 and state.status()["reload"] == "done"
