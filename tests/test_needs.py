"""What a later step needs is checked before anything is trained or stored."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import holdfast
from holdfast.audits import backdoor
from holdfast.audits import poison_steps as poison
from holdfast.audits.generator import audit as generator
from holdfast.core.errors import HoldfastError, Need, Remedy, TargetError, UsageError, refuse_unmet
from holdfast.rotation.steps import rotation_run
from holdfast.runs.harden import harden as hardening
from holdfast.verbs import rotate
from holdfast.verbs.adapt_served import candidate_calibrations, refuse_uncalibratable
from holdfast.verbs.settings import Calibrate, RotateSettings

CODE = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
"""


def examples(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs of two classes, which differ in their first value."""
    y = np.arange(n) % 2
    x = np.random.default_rng(seed).random((n, 4), dtype=np.float32)
    x[:, 0] = (x[:, 0] + y) / 2
    return x, y


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("needs")
    (path / "net.py").write_text(CODE)
    (x, y), (fit, labels) = examples(300, 0), examples(600, 1)
    np.savez(path / "data.npz", x_test=x, y_test=y, x_train=fit, y_train=labels)
    np.savez(path / "other.npz", x=x[:, :3], y=y)
    return path


@pytest.fixture
def model(folder: Path) -> holdfast.open_model:  # type: ignore[valid-type]
    return holdfast.open_model(f"{folder / 'net.py'}:make")


def forbid(monkeypatch: pytest.MonkeyPatch, module: object, name: str) -> None:
    """Let the call of a function, which begins to compute, fail the test."""

    def called(*_: object, **__: object) -> None:
        raise AssertionError(f"{name} was called")

    monkeypatch.setattr(module, name, called)


def test_the_message_names_the_step_and_keeps_kind_and_remedies() -> None:
    def refuse() -> None:
        raise TargetError("there is no room", Remedy("n", 5))

    called = list[str]()
    needs = [Need("first", lambda: called.append("first")), Need("second", refuse)]
    with pytest.raises(TargetError, match="the later step second would fail: there is no room") as refused:
        refuse_unmet([*needs, Need("third", lambda: called.append("third"))])
    assert called == ["first"] and refused.value.remedies == (Remedy("n", 5),)


def test_a_gate_that_the_assessments_of_a_hardening_do_not_measure(folder, model, tmp_path, monkeypatch):
    forbid(monkeypatch, hardening, "_Job")
    run = tmp_path / "run"
    for gate in ("transfer_success <= 0.1", "robust_accuracy@0.3 >= 0.5", "worst_group >= 0.1"):
        with pytest.raises(UsageError, match=f"gate '{gate}'"):
            holdfast.harden(model, str(folder / "data.npz"), "linf:0.05", "pgd", gates=[gate], run=run)
    assert not run.exists()


GUARD = "inputs: {{shape: [4], low: 0, high: 1}}\nfalse_positives: {rate}\nrules: {{energy: {{}}, {rule}}}\n"


def calibrated(folder: Path, tmp_path: Path, rule: str, rate: float) -> Calibrate:
    """The settings of the calibration of a guard of two rules, which is calibrated on the train split."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    (tmp_path / "guard.yaml").write_text(GUARD.format(rate=rate, rule=rule))
    common = {
        "model": str(tmp_path / "net.safetensors"),
        "arch": f"{folder / 'net.py'}:make",
        "data": str(folder / "data.npz"),
        "guard": str(tmp_path / "guard.yaml"),
    }
    Calibrate(**common, split="train").run()
    return Calibrate(**common)


def test_too_few_inputs_for_the_calibration_of_a_candidate(folder, tmp_path):
    settings = calibrated(folder, tmp_path, "squeezing: {median: 0}", 0.01)
    refuse_uncalibratable(settings)  # 300 inputs
    for key in ("n", "sample"):
        few = settings.model_copy(update={key: 150})
        with pytest.raises(UsageError, match="on 150 inputs; 199 suffice for its 2 rules") as refused:
            refuse_uncalibratable(few)
        (remedy,) = refused.value.remedies
        assert isinstance(remedy, Remedy) and (remedy.argument, remedy.value) == (key, 199)
        refuse_uncalibratable(settings.model_copy(update={key: remedy.value}))
    assert candidate_calibrations(settings) is None  # the served model is accepted already


def test_inputs_and_rules_that_no_calibration_of_a_candidate_accepts(folder, tmp_path):
    settings = calibrated(folder, tmp_path, "squeezing: {median: 0}", 0.05)
    wide = tmp_path / "wide.npz"
    x, y = examples(300, 0)
    np.savez(wide, x=1 - 2 * x, y=y)
    with pytest.raises(HoldfastError, match="range from -"):
        refuse_uncalibratable(settings.model_copy(update={"data": str(wide)}))
    (tmp_path / "fitted").mkdir()
    fitted = calibrated(folder, tmp_path / "fitted", "mahalanobis: {}", 0.05)
    with pytest.raises(
        UsageError, match="mahalanobis of guard.yaml is fitted on outputs of the served model"
    ):
        refuse_uncalibratable(fitted)


def test_needs_of_the_steps_of_a_rotation(folder, tmp_path, monkeypatch):
    forbid(monkeypatch, rotation_run, "collect")
    common = {
        "model": f"{folder / 'net.py'}:make",
        "data": str(folder / "data.npz"),
        "threat": "linf:0.05",
        "budget": "10s",
        "trust_code": True,
    }

    def refused(message: str, by: str | None = None, **more: object) -> None:
        run = tmp_path / "pool"
        request = rotate.run_request(RotateSettings(**common, **more), run, by=by, once=True, anyway=True)
        with pytest.raises(UsageError, match=message):
            rotation_run.run(request)
        assert not run.exists()

    refused("the later step admit would fail: gate 'worst_class >= 0.5'", gates=["worst_class >= 0.5"])
    refused(
        "the later step draw would fail: the collection has one set",
        "generator",
        source={"use": "seeds", "seeds": 1},
    )
    refused(
        "the later step collect would fail: no parameter's name begins with 'head'",
        source={"use": "subset", "names": ["head"]},
    )


def test_needs_of_audits(folder, model, tmp_path, monkeypatch):
    data, run = str(folder / "data.npz"), tmp_path / "run"
    for module in (backdoor, poison, generator):
        forbid(monkeypatch, module, "measure")
    with pytest.raises(UsageError, match="the later step strip would fail: .* have shape \\(3,\\)"):
        holdfast.audit.backdoor(model, data, stream=str(folder / "other.npz"), run=run)
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "out", tmp_path):
        with pytest.raises(TargetError, match="the later step trigger_out would fail"):
            holdfast.audit.backdoor(model, data, trigger_out=str(place), run=run)
        with pytest.raises(TargetError, match="the later step suspects would fail"):
            holdfast.audit.poison(data, model, suspects=str(place), run=run)
    np.savez(tmp_path / "samples.npz", x=examples(500, 2)[0])
    np.savez(tmp_path / "held.npz", x=examples(300, 3)[0])
    np.savez(tmp_path / "unlabelled.npz", x=examples(300, 4)[0])
    samples = {"model": str(tmp_path / "samples.npz"), "held_out": str(tmp_path / "held.npz"), "run": run}
    for gate, lacking in (("latent_sensitivity <= 5", "decode"), ("column_shapes >= 0.5", "rows of tables")):
        message = f"the later step gates would fail: gate '{gate}' cannot be judged: .* needs {lacking}"
        with pytest.raises(UsageError, match=message):
            holdfast.audit.generator(data=data, gates=[gate], **samples)
    with pytest.raises(UsageError, match="the training examples have no labels"):
        holdfast.audit.generator(data=str(tmp_path / "unlabelled.npz"), **samples)
    assert not run.exists()
