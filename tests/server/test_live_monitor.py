"""The monitor of a running server: samples of requests, alarms, labels, and what is refused."""

import json
import time
from dataclasses import replace
from mmap import mmap

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from holdfast.cli.app import run
from holdfast.core.draws import Draws
from holdfast.core.errors import TargetError
from holdfast.core.model import Classifier
from holdfast.guard.rules import Action, Incoming
from holdfast.monitoring.signals import Observed, Reference
from holdfast.server import server_worker
from holdfast.server.answering_requests import Answer, Job, Outcome
from holdfast.server.audit_folder import verify_audit
from holdfast.server.live_monitor import LiveMonitor, Reservoir
from holdfast.server.messages import Observations, decoded_by_supervisor
from holdfast.server.telemetry import MEMORY_BYTES, Telemetry
from waiting import until

from .small import CLASSES, FEATURES, network, request
from .test_canary import Operator
from .test_reloading import contents, prepared
from .test_sampled_inputs import received
from .test_server import JSON, running, setup


def samples(n, seed=0):
    return torch.randn(n, FEATURES, generator=torch.Generator().manual_seed(seed))


def reference(n=400):
    x = samples(n)
    y = torch.arange(n) % CLASSES
    seen = Observed(x, network()(x), None, y)
    return Reference.of(seen, Draws(0).at("monitor"), "reference", [str(k) for k in range(CLASSES)], "small")


NETWORK = network()


def outcome(x, name, action=Action.ALLOW):
    return Outcome(Job(Incoming(x, "client", name)), None, Answer(NETWORK(x)), action=action)


@pytest.fixture
def live(power_of_tests):
    records, warnings = [], []
    monitor = LiveMonitor(
        reference(), lambda kind, **facts: records.append((kind, facts)), Telemetry(), warnings.append
    )
    monitor.records, monitor.warnings = records, warnings
    monitor.start()
    yield monitor
    monitor.close()


def reservoir_of_all(compared, n):
    """The sample of a worker, of which the next `n` inputs are a part."""
    reservoir = Reservoir(compared)
    reservoir._tokens = n
    return reservoir


def reported(x, names, action=Action.ALLOW):
    """The report of a worker that answered one request for each row of `x`, and sampled all of them."""
    reservoir = reservoir_of_all(reference(), len(x))
    reservoir.add(
        [outcome(row[None], name, action) for row, name in zip(x, names, strict=True)],
    )
    return received(reservoir.taken())


def test_a_worker_samples_few_inputs_and_reports_each_prediction():
    reservoir, x = Reservoir(reference()), samples(200)
    for k in range(50):
        reservoir.add(
            [outcome(x[4 * k : 4 * k + 2], f"r{k}"), Outcome(Job(Incoming(x, "c", "lost")))],
        )
    content = reservoir.taken()
    n = len(content.signals) // 8 // len(reference().signals.names)
    assert 1 <= n < 40 and len(content.predictions) == 50 and content.left_out == 0
    name, classes, confidences, flagged = content.predictions[3]
    best = network()(x[12:14]).softmax(1).max(1)
    assert (name, classes, flagged) == ("r3", best.indices.tolist(), False)
    assert confidences == pytest.approx(best.values.tolist(), abs=1e-5)
    assert reservoir.taken() is None


def test_too_many_requests_are_left_out_and_counted():
    reservoir = Reservoir(reference())
    for k in range(45):
        reservoir.add([outcome(samples(1), f"{k}.{i}") for i in range(50)])
    content = reservoir.taken()
    assert (len(content.predictions), content.left_out) == (2000, 250)


def test_a_worker_of_a_pool_does_not_report_observations_as_often_as_answers(tmp_path, set_limit):
    set_limit("holdfast.server.server_worker._REPORT_S", 1000.0)
    sent = []
    prepared = replace(setup(tmp_path).worker, monitor=reference())
    worker = server_worker.Worker(
        prepared, None, lambda kind, content: sent.append(content["type"]), mmap(-1, MEMORY_BYTES)
    )
    for name in ("a", "b"):
        worker.reservoir.add([outcome(samples(1), name)])
        worker.report()
    worker.batcher.close()
    assert sent == ["Report", "Observations", "Report"]


def test_requests_like_the_reference_raise_no_alarm_if_the_model_is_certain(power_of_tests):
    # probabilities near 1 and far below 1e-7, whose differences 32-bit numbers do not contain
    def seen(x):
        return Observed(x, 40 * NETWORK(x), None, None)

    certain = Reference.of(seen(samples(800)), Draws(0).at("monitor"), "reference", None, "small")
    monitor = LiveMonitor(certain, lambda kind, **facts: None, Telemetry(), lambda text: None)
    monitor.start()
    try:
        for part in torch.split(samples(320, 1), 40):
            reservoir = reservoir_of_all(certain, len(part))
            rows = [row[None] for row in part]
            answered = [
                Outcome(Job(Incoming(row, "client", "r")), None, Answer(40 * NETWORK(row))) for row in rows
            ]
            reservoir.add(answered)
            monitor.received(reservoir.taken(), canary=False)
        until(lambda: monitor.summary()["stream"]["n"] == 320)
        assert monitor.summary()["alarmed"] == []
    finally:
        monitor.close()


def test_shifted_requests_raise_an_alarm_and_those_of_a_canary_do_not(live):
    content = reported(samples(200, 1) + 2, [f"r{k}" for k in range(200)], Action.FLAG)
    live.received(content, canary=True)
    live.received(reported(samples(40, 2), [f"s{k}" for k in range(40)]), canary=False)
    until(lambda: live.summary()["stream"]["n"] == 40)
    assert live.summary()["alarmed"] == [] and live.summary()["flagged"] == 200
    live.received(content, canary=False)
    until(lambda: live.summary()["alarmed"] == ["martingale"])
    until(lambda: any("alarm of martingale" in text for text in live.warnings))
    assert ("alarm", "martingale") in [(kind, facts["test"]) for kind, facts in live.records]
    live.restart()
    assert live.summary()["stream"]["n"] == 0 and live.summary()["verdict"] == "no alarm"


def test_labels_are_compared_with_the_predictions(live):
    x = samples(4)
    y = network()(x).argmax(1).tolist()
    live.received(reported(x[:2], ["a", "b"]), canary=False)
    live.received(reported(x[2:], ["c", "d"]), canary=True)
    wrong = (y[1] + 1) % CLASSES
    answer = live.label({"a": [y[0]], "b": [wrong], "z": [0], "c": [y[2], 1], "d": [CLASSES]})
    assert (answer["accepted"], answer["unknown"], list(answer["invalid"])) == (2, ["z"], ["c", "d"])
    assert live.label({"a": [y[0]]})["unknown"] == ["a"]  # a label is accepted once
    live.label({"c": [y[2]]})
    assert [live.class_of(*each) for each in (("a", 0), ("b", 0), ("b", 1), ("z", 0))] == [
        y[0],
        wrong,
        -1,
        -1,
    ]
    assert live.summary()["measured"]["accuracy"]["value"] == pytest.approx(2 / 3)
    assert live.summary()["expected"]["n"] == 2


def test_predictions_of_large_requests_are_forgotten_earlier(live, set_limit):
    set_limit("holdfast.server.live_monitor._REMEMBERED", 10)
    for name in "abc":
        entry = [name, [0] * 4, [0.5] * 4, False]
        live.received(Observations(b"", [entry, entry]), canary=False)
    assert list(live._remembered) == ["b", "c"]
    live.label({"b": [0] * 4})
    live.received(Observations(b"", [("d", [0] * 6, [0.5] * 6, False)]), canary=False)
    assert list(live._remembered) == ["c", "d"]


def test_a_report_that_is_invalid_raises(live):
    with pytest.raises(ValueError, match="buffer"):
        live.received(Observations(b"abc", []), canary=False)
    content = json.dumps({"type": "Observations", "signals": "", "predictions": [[1]]})
    with pytest.raises(ValueError, match="Expected"):
        decoded_by_supervisor(b"M" + content.encode())


def deep(seed=0):
    torch.manual_seed(seed)
    return Classifier(nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, CLASSES))).eval()


def embedded(net, observer=None):
    x = samples(400)
    seen = Observed(x, net(x), net.net[:2](x), None)
    return Reference.of(seen, Draws(0).at("monitor"), "reference", None, "deep", layer="1", observer=observer)


def report_of(net, compared, x):
    """The report of a worker that sampled all inputs, with their embeddings."""
    reservoir = reservoir_of_all(compared, len(x))
    jobs = [Job(Incoming(row[None], "client", f"r{k}")) for k, row in enumerate(x)]
    reservoir.add(
        [
            Outcome(job, None, Answer(net(job.incoming.x)), features=(net.net[:2](job.incoming.x), 0))
            for job in jobs
        ],
    )
    return reservoir.taken()


def test_a_change_of_embeddings_alone_raises_an_alarm(power_of_tests):
    net, other = deep(0), deep(1)
    compared = embedded(net)
    assert "embeddings: feature 7" in compared.signals.names
    reservoir = Reservoir(compared)
    reservoir.add([outcome(samples(1), "r")])
    assert reservoir.taken().signals == b"", "an input without its embedding is not sampled"
    monitor = LiveMonitor(compared, lambda kind, **facts: None, Telemetry(), lambda text: None)
    monitor.start()
    try:
        content = report_of(net, compared, samples(40, 5))
        monitor.received(content, canary=False)
        until(lambda: monitor.summary()["stream"]["n"] == 40)
        assert monitor.summary()["alarmed"] == [] and monitor.summary()["layer"] == "1"
        mixed = replace_network(net, other)
        for k in range(8):
            monitor.received(report_of(mixed, compared, samples(40, 6 + k)), canary=False)
        until(lambda: monitor.summary()["alarmed"])
        (alarm,) = [t["alarm"] for t in monitor.summary()["tests"] if t["name"] == "martingale"]
        assert alarm["view"] == "embeddings"
    finally:
        monitor.close()


def replace_network(net, other):
    """The logits of `net` and the embeddings of `other`."""

    class Mixed:
        def __init__(self):
            self.net = other.net

        def __call__(self, x):
            return net(x)

    return Mixed()


def test_the_reference_follows_the_model_in_the_file(power_of_tests):
    nets, warnings = [deep(0), deep(1)], []
    first = embedded(nets[0])

    def renewed():
        if monitor.reference is not first:
            raise TargetError("lost")
        return embedded(nets[1], first.observer)

    monitor = LiveMonitor(first, lambda kind, **facts: None, Telemetry(), warnings.append, renewed)
    monitor.start()
    try:
        monitor.model_changes(done=False)
        monitor.received(report_of(nets[1], first, samples(200, 1)), canary=False)
        assert monitor._inbox.empty(), "no samples of two models"
        monitor.model_changes(done=True)
        until(lambda: monitor.reference is not first)
        until(lambda: not monitor._changing)
        for k in range(5):
            monitor.received(report_of(nets[1], first, samples(40, 2 + k)), canary=False)
        until(lambda: monitor.summary()["stream"]["n"] == 200)
        assert monitor.summary()["alarmed"] == []
        monitor.model_changes(done=True)
        until(lambda: warnings)
        assert "restart the server" in warnings[-1]
    finally:
        monitor.close()


@pytest.mark.slow
def test_a_reload_of_another_model_is_no_alarm(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("reference.npz", x=samples(400).numpy(), y=np.arange(400) % CLASSES)
    code = "from torch import nn\n\ndef make():\n"
    code += f"    return nn.Sequential(nn.Linear({FEATURES}, 8), nn.ReLU(), nn.Linear(8, {CLASSES}))\n"
    (tmp_path / "deep.py").write_text(code)
    file = tmp_path / "deep.safetensors"
    save_file(deep(0).net.state_dict(), file)
    more = {"model": str(file), "arch": f"{tmp_path / 'deep.py'}:make", "monitor": "reference.npz"}
    ready, _ = prepared(tmp_path, bounds=[-9, 9], **more)
    with running(ready) as (server, url, _), httpx.Client(timeout=60) as client:
        assert server.live.reference.layer == "1"

        def ask(n, seed):
            for x in torch.split(samples(n, seed), 1):
                assert client.post(url, content=request(x), headers=JSON).status_code == 200

        ask(40, 1)
        until(lambda: server.live.summary()["stream"]["n"] > 0)
        before = server.live.reference
        save_file({name: 3 * value for name, value in deep(1).net.state_dict().items()}, file)
        server.request_swap("test")
        until(lambda: server.live.reference is not before)
        until(lambda: not server.live._changing)
        ask(300, 2)
        until(lambda: server.live.summary()["stream"]["n"] > 20)
        assert server.live.summary()["alarmed"] == []


@pytest.mark.slow
def test_a_server_with_a_monitor(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("reference.npz", x=samples(400).numpy(), y=np.arange(400) % CLASSES)
    ready, _ = prepared(tmp_path, audit="audit", workers=2, monitor="reference.npz", bounds=[-9, 9])
    with running(ready) as (server, url, _), httpx.Client(timeout=60) as client:
        operator = Operator(server)
        address = str(operator.client.base_url)

        def ask(x, times):
            return [
                client.post(url, content=request(x), headers=JSON).headers["holdfast-request"]
                for _ in range(times)
            ]

        names = ask(samples(1, 5), 20)
        until(lambda: operator.client.get("/monitor").json()["requests"] == 20)
        (tmp_path / "labels.csv").write_text(
            "request,label\n" + "".join(f"{name},1\n" for name in [*names, "no"])
        )
        assert run(["monitor", address, "--once", "--labels", "labels.csv", "-o", "report.json"]) == 0
        shown = capsys.readouterr()
        assert "labels of 20 requests were accepted" in shown.err and "1 requests are unknown" in shown.err
        assert "martingale" in shown.out and json.loads((tmp_path / "report.json").read_text())["measured"]
        end = time.monotonic() + 60
        while not operator.client.get("/monitor").json()["alarmed"]:
            ask(samples(1, 6) + 5, 10)
            assert time.monotonic() < end
        assert operator.client.get("/samples").status_code == 409
        assert run(["monitor", address, "--once", "-q"]) == 1
        assert 'holdfast_monitor_alarm{test="martingale"} 1.0' in operator.client.get("/metrics").text
        assert operator.post("/labels", labels=[1]).status_code == 400
        assert operator.post("/monitor/restart").status_code == 200
        assert run(["monitor", address, "--once", "-q"]) == 0
        operator.close()
    assert verify_audit(tmp_path / "audit").failed == 0
    assert "martingale" in [
        r["test"] for r in contents(tmp_path / "audit", "*server*") if r["kind"] == "alarm"
    ]


def test_a_server_without_a_monitor_and_options_that_do_not_fit(tmp_path, capsys):
    from holdfast.server.supervisor import Supervisor

    operator = Operator(Supervisor(prepared(tmp_path)[0]))
    try:
        refused = operator.client.get("/monitor")
        assert refused.status_code == 409 and "start it with --monitor DATA" in refused.text
        assert run(["monitor", str(operator.client.base_url), "--once"]) == 3
        assert "start it with --monitor DATA" in capsys.readouterr().err
    finally:
        operator.close()
    for words, reason in (
        (["http://127.0.0.1:9", "--once"], "cannot be reached"),
        (["http://127.0.0.1:9", "--reference", "mnist-mini"], "--reference is for a recorded stream"),
        (["stream.npz", "--once"], "--once is for a server"),
    ):
        assert run(["monitor", *words]) in (2, 3)
        assert reason in capsys.readouterr().err


def test_a_reference_of_another_shape_and_a_short_one_are_refused(tmp_path):
    np.savez(tmp_path / "wide.npz", x=np.zeros((400, 7), np.float32))
    np.savez(tmp_path / "short.npz", x=np.zeros((20, FEATURES), np.float32))
    for name, reason in (("wide", "have the shape|shape"), ("short", "at least 134 are needed")):
        with pytest.raises(Exception, match=reason):
            prepared(tmp_path, monitor=str(tmp_path / f"{name}.npz"))
