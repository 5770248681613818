"""`holdfast adapt` on a server of a pool: the candidate becomes a set, which the gates of the pool admit or refuse."""

import json
import shutil
import threading
import time
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import pytest
import torch

import holdfast
from adaptation.test_adapting import CODE, GUARD, SHAPE, examples, settings, worse_on_live_requests
from holdfast.cli.app import run as command
from holdfast.core.errors import InUse, TargetError, UsageError
from holdfast.rotation.pool import Pool
from holdfast.server.admin import AdminServer
from holdfast.server.audit_folder import verify_audit
from holdfast.server.keys import KeyFile
from holdfast.server.messages import bound_socket
from holdfast.server.supervisor import Supervisor
from holdfast.verbs import adapt_served
from holdfast.verbs.serve_opening import server_setup
from holdfast.verbs.settings import Serve
from server.small import pool as small_pool
from waiting import until


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """A folder with data and a pool of three admitted sets, to be copied."""
    folder = tmp_path_factory.mktemp("collected")
    (folder / "net.py").write_text(CODE)
    (x, y), (fit, labels) = examples(1200, 0), examples(2000, 1)
    np.savez(folder / "data.npz", x_test=x, y_test=y, x_train=fit, y_train=labels)
    made = holdfast.rotate.collect(
        f"{folder / 'net.py'}:make",
        str(folder / "data.npz"),
        "linf:0.02",
        {"use": "basins", "seeds": 2, "sets": 1},
        {"use": "standard", "training": {"epochs": 4, "lr": 0.01, "averaging": "none"}},
        device="cpu",
        run=folder / "pool",
    )
    holdfast.rotate.draw(made.pool, by="retraining", sets=3, trust_code=True)
    assert len(holdfast.rotate.admit(made.pool, trust_code=True).admitted) == 3
    return folder


@pytest.fixture
def folder(collected, tmp_path):
    shutil.copytree(collected, tmp_path, dirs_exist_ok=True)
    return tmp_path


@contextmanager
def serving(folder, **more):
    """A server of the pool in a folder, and the URL of its operator's port."""
    served = Serve(
        model=f"rotating:{folder / 'pool'}",
        port=0,
        admin_port=0,
        audit=str(folder / "audit"),
        trust_code=True,
        **more,
    )
    server = Supervisor(server_setup(served))
    listener = bound_socket("127.0.0.1", 0)
    admin = AdminServer(server, listener, None if served.keys is None else KeyFile(Path(served.keys)))
    admin.start()
    server.start()
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server, f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.stop()
        thread.join(60)
        admin.stop()


@contextmanager
def requests(server, key=None):
    """Requests to the server during the block, and the status codes of the answers."""
    headers = {"content-type": "application/json"}
    headers |= {} if key is None else {"authorization": f"Bearer {key}"}
    tensor = {"name": "input", "shape": [1, *SHAPE], "datatype": "FP32", "data": torch.rand(64).tolist()}
    body, statuses, ended = json.dumps({"inputs": [tensor]}), [], threading.Event()

    def send():
        while not ended.is_set():
            connection = HTTPConnection(*server.address, timeout=30)
            connection.request("POST", "/v2/models/pool/infer", body, headers)
            statuses.append(connection.getresponse().status)
            connection.close()
            time.sleep(0.01)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield statuses
    finally:
        ended.set()
        thread.join()


def judged_elsewhere(pool):
    """An admission that is not possible because another process judges the sets, and refuses them."""

    def admit(request, **_):
        pool.refuse(request.only, "too weak")
        raise InUse("another process runs admit")

    return admit


@pytest.mark.slow
def test_a_candidate_becomes_a_set_of_the_pool_or_not(folder, tmp_path, monkeypatch):
    with serving(folder) as (server, url), requests(server) as statuses:
        pool = Pool.open(tmp_path / "pool")
        first = pool.serving.name

        # the gates of the pool refuse the set, while another process judges sets
        with monkeypatch.context() as patched:
            patched.setattr(adapt_served, "admit", judged_elsewhere(pool))
            refused = settings(url, tmp_path).run(tmp_path / "refused")
        assert (refused.outcome, refused.steps[-1].step) == ("not promoted", "admit")
        assert "too weak" in refused.reason and pool.serving.name == first

        # a run that was killed after each step is resumed, and its set serves
        run, lines = settings(url, tmp_path, seed=1), []
        for step in ("immunise", "admit", "watch"):
            with monkeypatch.context() as patched:
                patched.setattr(adapt_served.AdaptedPool, step, lambda self, *_: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    run.run(tmp_path / "run", resume=True, notify=lines.append)
        promoted = run.run(tmp_path / "run", resume=True, notify=lines.append)
        assert promoted.promoted and len([line for line in lines if line.startswith("harden:")]) == 1
        facts = {step.step: step.facts for step in promoted.steps}
        second = facts["promote"]["set"]
        assert server.status()["pool"]["set"] == pool.serving.name == second != first
        member = pool.ledger.member(second)
        assert member.bases == (first,) and member.against == (first,)
        assert pool.ledger.member(first).exposed.automatic, "the set was made from it"
        assert facts["measure"]["pairs"] > 0 and facts["watch"]["pairs"] > 0
        assert not (tmp_path / "run" / "training").exists(), "no weights remain as plain text"
        assert pool.kept(f"adapted_{promoted.run}") is None

        # a set that is worse on live requests is replaced by another admitted one, and never serves again
        holdfast.rotate.admit(pool, trust_code=True)
        with monkeypatch.context() as patched, worse_on_live_requests():
            patched.setattr(adapt_served.AdaptedPool, "measure", lambda self, pairs: {})
            back = settings(url, tmp_path, seed=2).run(tmp_path / "back")
        assert (back.outcome, back.reason) == ("rolled back", "after the promotion, it is worse")
        withdrawn = pool.ledger.member(back.steps[-2].facts["set"])
        assert withdrawn.state == "retired" and pool.serving.name not in (first, second, withdrawn.name)
        assert server.status()["pool"]["set"] == pool.serving.name
        with pytest.raises(UsageError, match="no set waits"):
            settings(url, tmp_path).run(tmp_path / "empty")
    assert set(statuses) == {200}
    assert verify_audit(tmp_path / "audit").failed == 0
    (chain,) = (tmp_path / "audit").glob("*.server.jsonl")
    records = [json.loads(line)["content"] for line in chain.read_text().splitlines()]
    names = [record["set"] for record in records if record["kind"] == "set"]
    assert names == [first, second, withdrawn.name, pool.serving.name]


@pytest.mark.slow
def test_a_pool_with_a_guard_keys_and_a_monitor_is_adapted_by_schedule(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    arrays = np.load("data.npz")
    np.savez("reference.npz", x=arrays["x_test"], y=arrays["y_test"])
    Path("guard.yaml").write_text(GUARD)
    holdfast.rotate.swap("pool")  # a guard is calibrated on the set that serves
    words = ["rotating:pool", "reference.npz", "--guard", "guard.yaml", "--trust-code"]
    assert command(["calibrate", *words]) == 0
    keys = {}
    for name, scope in (("client", "infer"), ("operator", "adapt"), ("prometheus", "metrics")):
        capsys.readouterr()
        assert command(["keys", "add", name, "--scope", scope, "--file", "keys.json", "--quiet"]) == 0
        keys[name] = capsys.readouterr().out.strip()
        Path(f"{name}.key").write_text(keys[name])
        Path(f"{name}.key").chmod(0o600)
    more = {"monitor": "reference.npz", "guard": "guard.yaml", "keys": "keys.json"}
    with serving(folder, **more) as (server, url), requests(server, keys["client"]) as statuses:
        until(lambda: len(statuses) > 50)
        once = ["monitor", url, "--once", "--key-file"]
        assert command([*once, "prometheus.key", "-o", "report.json"]) in (0, 1)
        report = json.loads(Path("report.json").read_text())
        assert report["requests"] > 0 and {"martingale", "mmd"} <= {t["name"] for t in report["tests"]}
        assert command([*once, "client.key"]) == 2
        assert "does not permit metrics" in capsys.readouterr().err
        with pytest.raises(UsageError, match="does not permit adapt"):
            settings(url, folder, key_file="client.key").run(folder / "refused")
        server.live.restart()  # the requests are all the same, and an alarm would begin the run
        run = settings(url, folder, key_file="operator.key", trigger="0.1s").run(folder / "run")
        assert run.promoted, run.reason
        facts = {step.step: step.facts for step in run.steps}
        assert facts["trigger"]["trigger"] in ("0.1s", "alarm") and facts["shadow"]["pairs"] > 0
    assert set(statuses) == {200}
    assert verify_audit(folder / "audit").failed == 0


def state(pool, served):
    return {"pool": {"set": served, "settings": {"pool": str(pool.path)}}}


def test_pools_that_cannot_be_adapted_are_refused(tmp_path, monkeypatch):
    adapt = settings("http://127.0.0.1:9", tmp_path)
    absent = {"pool": {"set": "a", "settings": {"pool": str(tmp_path / "absent")}}}
    with pytest.raises(TargetError, match="is not on this machine"):
        adapt_served.begin(absent, adapt)
    pool = small_pool(tmp_path / "pool", 2)
    with pytest.raises(TargetError, match="it is another pool"):
        adapt_served.begin(state(pool, "0" * 16), adapt)
    served = pool.swap().name
    with monkeypatch.context() as patched:
        patched.setattr(adapt_served.os, "access", lambda path, mode: False)
        with pytest.raises(TargetError, match="may not write to the pool"):
            adapt_served.begin(state(pool, served), adapt)
    with pytest.raises(UsageError, match="created in Python"):
        adapt_served.begin(state(pool, served), adapt)
    pool.swap()
    with pytest.raises(UsageError, match="no set waits"):
        adapt_served.begin(state(pool, served), adapt)
