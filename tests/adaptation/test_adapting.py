"""`holdfast adapt` on a running server: a candidate is trained, compared and promoted, or not."""

import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import holdfast
from holdfast.cli.app import run as command
from holdfast.core.catalogue import names
from holdfast.core.errors import Remedy, TargetError, UsageError
from holdfast.io.remote.operator_port import Refusal
from holdfast.server.admin import AdminServer
from holdfast.server.audit_folder import verify_audit
from holdfast.server.messages import bound_socket
from holdfast.server.supervisor import Supervisor
from holdfast.verbs import adapt, adapt_comparison
from holdfast.verbs.reports import annex_of, verify
from holdfast.verbs.serve_opening import server_setup
from holdfast.verbs.settings import Adapt, Calibrate, Serve

SHAPE = (1, 8, 8)
CODE = f"""from torch import nn

def make():
    return nn.Sequential(nn.Flatten(), nn.Linear({SHAPE[1] * SHAPE[2]}, 4))
"""
GUARD = """inputs: {shape: [1, 8, 8], low: 0, high: 1}
mode: enforce
false_positives: 0.05
rules: {energy: {action: flag}}
store: {inputs: flagged, folder: inputs}
"""


def examples(n, seed):
    """Images of four classes: one brighter quarter each."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 4
    x = 0.4 * torch.rand(n, *SHAPE, generator=g)
    for k in range(4):
        x[y == k, :, 4 * (k // 2) : 4 * (k // 2) + 4, 4 * (k % 2) : 4 * (k % 2) + 4] += 0.25
    return x.numpy(), y.numpy()


@contextmanager
def serving(folder):
    """A server of a network in a file with a calibrated guard, the address of its operator's port, and the file."""
    code, file, data = folder / "net.py", folder / "model.safetensors", folder / "data.npz"
    code.write_text(CODE)
    (x, y), (fit, labels) = examples(1200, 0), examples(2000, 1)
    np.savez(data, x_test=x, y_test=y, x_train=fit, y_train=labels)
    arch = {"arch": f"{code}:make"}
    first = holdfast.harden(
        holdfast.open_model(f"{code}:make"),
        str(data),
        threat="linf:0.02",
        recipe="standard",
        budget="1s",
        sample=50,
    )
    file.write_bytes(first.weights)
    (folder / "guard.yaml").write_text(GUARD)
    Calibrate(model=str(file), data=str(data), guard=str(folder / "guard.yaml"), **arch).run()
    settings = Serve(
        model=str(file),
        port=0,
        admin_port=0,
        guard=str(folder / "guard.yaml"),
        audit=str(folder / "audit"),
        **arch,
    )
    server = Supervisor(server_setup(settings))
    listener = bound_socket("127.0.0.1", 0)
    admin = AdminServer(server, listener, None)
    admin.start()
    server.start()
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server, f"http://127.0.0.1:{listener.getsockname()[1]}", file
    finally:
        server.stop()
        thread.join(60)
        admin.stop()


def settings(url, folder, **more):
    values = {
        "server": url,
        "data": str(folder / "data.npz"),
        "threat": "linf:0.1",
        "recipe": "pgd",
        "budget": "1s",
        "assess_budget": "1s",
        "sample": 100,
        "trigger": "now",
        "canary_time": "1s",
        "trust_code": True,
        "accept_doubts": dict.fromkeys(names("doubts"), "what is tested are the steps"),
        "gates": ["clean_accuracy_drop <= 0.99 vs baseline"],
    }
    return Adapt(**{**values, **more})


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    with serving(folder) as (server, url, file):
        yield server, url, file, folder


@contextmanager
def worse_on_live_requests():
    """The candidate is worse than the served model on the requests that are compared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapt_comparison.LivePairs, "watched", lambda *_: {"ends": "it is worse"})
        yield


@pytest.mark.slow
def test_candidates_are_promoted_or_not(served, tmp_path, monkeypatch):
    server, url, file, folder = served
    before, calibration = file.read_bytes(), (folder / "guard.calibration.json").read_bytes()

    def unchanged():
        return file.read_bytes() == before and (folder / "guard.calibration.json").read_bytes() == calibration

    # a gate that fails, and a training set with flipped labels
    failed = settings(url, folder, gates=["robust_accuracy >= 0.999"]).run(tmp_path / "gate")
    assert (failed.outcome, failed.steps[-1].step) == ("not promoted", "gates") and unchanged()
    arrays = dict(np.load(folder / "data.npz"))
    arrays["y_train"][:200] = (arrays["y_train"][:200] + 1) % 4
    np.savez(tmp_path / "flipped.npz", **arrays)
    flipped = settings(url, folder, data=str(tmp_path / "flipped.npz")).run(tmp_path / "flipped")
    assert flipped.steps[-1].step == "quarantine" and "labels" in flipped.reason and unchanged()
    # a canary that is worse than the served model
    with worse_on_live_requests():
        worse = settings(url, folder).run(tmp_path / "canary")
    assert worse.outcome == "not promoted" and worse.reason == "as a canary, it is worse" and unchanged()
    assert server.status()["canary"]["state"] == "none"

    # a run that was killed between two steps is resumed, and its candidate is promoted
    run = settings(url, folder)
    with monkeypatch.context() as patched:
        patched.setattr(adapt._Adaptation, "_promote", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run.run(tmp_path / "run")
    lines = []
    promoted = run.run(tmp_path / "run", resume=True, notify=lines.append)
    assert promoted.promoted and not any(line.startswith("harden") for line in lines)
    status = server.status()
    assert status["model"]["digest"] == dict(promoted.steps[-2].facts)["digest"]
    assert file.read_bytes() == (tmp_path / "run" / "candidate.safetensors").read_bytes()
    assert verify(tmp_path / "run").complete
    text = annex_of([tmp_path / "run", folder / "audit"], "aisvs").content["folders"][0]["statement"]
    assert "has the same 11 steps" in text
    assert [step.step for step in promoted.steps][-3:] == ["canary", "promote", "watch"]
    assert "promoted" in str(promoted) and "promote" in promoted.text()
    assert promoted.write(tmp_path / "report.json").exists()
    assert run.run(tmp_path / "run", resume=True).steps == promoted.steps  # nothing is done again

    # a rollback after the promotion
    serving_now = file.read_bytes()
    with monkeypatch.context() as patched, worse_on_live_requests():
        patched.setattr(adapt._Adaptation, "_canary", lambda self: (self._extend_guard(), {})[1])
        back = settings(url, folder, seed=1).run(tmp_path / "back")
    assert (back.outcome, back.reason) == ("rolled back", "after the promotion, it is worse")
    assert (
        file.read_bytes() == serving_now and server.status()["model"]["digest"] == status["model"]["digest"]
    )

    # an approval, and a second run that is refused meanwhile
    waiting = threading.Thread(
        target=lambda: results.append(settings(url, folder, approval=True).run(tmp_path / "approval"))
    )
    results = []
    waiting.start()
    end = time.monotonic() + 120
    while not (runs := server.adaptations.runs()) or runs[0]["approval"] != "pending":
        assert time.monotonic() < end
        time.sleep(0.1)
    with pytest.raises(Refusal, match="adapts the model"):
        settings(url, folder).run(tmp_path / "second")
    server.adaptations.approve(runs[0]["run"], approved=False, by="operator")
    waiting.join(60)
    assert results[0].reason == "the operator rejected the candidate"
    assert verify_audit(folder / "audit").failed == 0


@pytest.mark.slow
def test_bad_settings_are_refused(served, tmp_path):
    _, url, file, folder = served
    with pytest.raises(UsageError, match="the server has no monitor"):
        settings(url, folder, trigger="alarm").run(tmp_path / "alarm")
    with pytest.raises(UsageError, match="code is run only if you allow it"):
        settings(url, folder, trust_code=False).run(tmp_path / "code")
    content = file.read_bytes()
    try:
        file.write_bytes(content[:-4] + b"abcd")
        with pytest.raises(TargetError, match="is not the model that is served"):
            settings(url, folder).run(tmp_path / "changed")
    finally:
        file.write_bytes(content)
    assert not any((tmp_path / name).exists() for name in ("alarm", "code", "changed"))
    labels = folder / "labels.csv"
    labels.write_text("request,label\nnone,1\n")
    with pytest.raises(UsageError, match="is not among the stored flagged inputs"):
        settings(url, folder, labels=str(labels)).run(tmp_path / "labels")


@pytest.mark.slow
def test_what_later_steps_need_is_checked_before_the_first_one(served, tmp_path, monkeypatch):
    server, url, _, folder = served

    def refused(name, message, **more):
        with pytest.raises(UsageError, match=message) as error:
            settings(url, folder, **more).run(tmp_path / name)
        assert not (tmp_path / name).exists(), "nothing was measured"
        return error.value

    monkeypatch.setattr(adapt, "hardened", lambda *_, **__: 1 / 0)  # nothing is trained
    few = refused("few", "the later step canary would fail: .* on 15 inputs; 19 suffice", sample=15)
    assert few.remedies == (Remedy("sample", 19),)
    with pytest.raises(ZeroDivisionError):  # with it, the run comes to its training
        settings(url, folder, sample=19).run(tmp_path / "enough")
    for gate in ("transfer_success <= 0.1", "churn <= 0.1", "mce <= 1 vs baseline"):
        refused(gate[:5], f"gate '{gate}'", gates=[gate])
    refused("budget", "the later step harden would fail: a budget of 1e-05 s is too small", budget="0.00001s")
    refused("threat", "the later step harden would fail: eps is 3", threat="linf:3")
    refused("monitor", "the later step trigger would fail: the server has no monitor", trigger="alarm")
    assert not server.adaptations.holder


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "URL is missing"),
        (["http://127.0.0.1:9"], "the data are missing"),
        (["127.0.0.1:9", "--data", "mnist-mini"], "is not the address of an operator's port"),
        (["http://127.0.0.1:9", "--data", "mnist-mini"], "cannot be reached"),
        (["http://127.0.0.1:9", "--data", "mnist-mini", "--trigger", "soon"], "trigger"),
        (["http://127.0.0.1:9", "--data", "mnist-mini", "--gate", "improved"], "improved"),
        (["http://127.0.0.1:9", "--data", "mnist-mini", "--key-file", "absent"], "key file"),
        (["http://127.0.0.1:9", "--data", "mnist-mini", "--resume"], "its folder is not given"),
    ],
)
def test_messages_of_the_command_line(words, reason, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command(["adapt", *words]) != 0
    assert reason in capsys.readouterr().err
