"""Steps of `holdfast adapt` that a kill, a failed reload or a server of somebody else interrupts."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from holdfast.adaptation.journal import Journal
from holdfast.api import adapted_guard, adapting
from holdfast.api.verb_settings import Adapt
from holdfast.core.errors import TargetError
from holdfast.guard.calibration import Calibration, read_calibration, write_calibration


class Server:
    """An operator's port whose reloads fail, unless the file has the content that is served."""

    url = "http://a"

    def __init__(self, file, **stated):
        self.file, self.reload = file, "none"
        self.stated = {"model": str(file), **stated}

    def get(self, path):
        model = {"digest": "old", "set": "old", "reload": self.reload, "reason": "it is damaged"}
        canary = {"state": "none", "reason": ""}
        workers = [{"set": "old"}]
        return {
            "model": {**model, "settings": self.stated},
            "workers": workers,
            "canary": canary,
            "sets": {},
        }

    def post(self, path, body):
        if path == "/reload":
            self.reload = "failed"
        return {}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run whose candidate passed all steps before the promotion."""
    file, folder = tmp_path / "model.safetensors", tmp_path / "run"
    file.write_bytes(b"old")
    opened = SimpleNamespace(digest="new")
    monkeypatch.setattr(adapting._Adaptation, "_opened", lambda self, path, settings: opened)
    journal = Journal.opened(folder, "http://a", "s", resume=False)
    (folder / "candidate").mkdir()
    (folder / "candidate" / adapting.MODEL).write_bytes(b"new")
    (folder / "incumbent.safetensors").write_bytes(b"old")
    begun = {"set": "old", "model": str(file), "digest": "old", "settings": {}}
    adaptation = adapting._Adaptation(Adapt(canary_time="1s"), journal, Server(file), None, lambda text: None)
    return adaptation, begun, file


def test_settings_of_the_server_that_could_name_code_are_not_used(run, monkeypatch):
    adaptation, _, file = run
    monkeypatch.setattr(
        adapting._Adaptation, "_opened", lambda self, path, settings: SimpleNamespace(digest="old")
    )
    adaptation.port = Server(file, data="other.py:load", trust_code=True, mean=[0.5])
    assert adaptation._begin()["settings"] == {"model": str(file), "mean": [0.5]}


def test_a_reload_that_fails_puts_the_earlier_file_back(run):
    adaptation, begun, file = run
    adaptation.journal.add("begin", begun)
    assert "could not reload the model: it is damaged" in adaptation._promote()["ends"]
    assert file.read_bytes() == b"old"


def test_a_rollback_that_was_interrupted_is_finished(run):
    adaptation, begun, _ = run
    adaptation.journal.add("begin", begun)
    assert "put back" in adaptation._watch()["ends"]  # the file is the earlier one


def test_the_guard_accepts_the_served_model_at_every_moment(run, monkeypatch):
    adaptation, begun, file = run
    guard, place = file.with_name("guard.yaml"), file.with_name("guard.calibration.json")
    guard.write_text("inputs: {shape: [4]}\nrules: {energy: {}}\n")
    begun = {**begun, "settings": {"guard": str(guard)}, "calibration": str(place)}
    adaptation.journal.add("begin", begun)
    before = Calibration(0.01, 1000, 5, {"energy": 1.0}, "settings", ("old",))
    write_calibration(before, place)
    adaptation._guard.store()
    both, alone = replace(before, models=("old", "new")), replace(before, models=("new",))
    monkeypatch.setattr(adapted_guard, "candidate_calibrations", lambda settings: (both, alone))
    adaptation._extend_guard()
    assert read_calibration(place) == both
    adaptation._guard.accept_candidate()
    assert read_calibration(place) == alone
    adaptation._guard.accept_both()
    assert read_calibration(place) == both
    # neither the file of the guard nor a changed copy decides what is written where
    guard.write_text("inputs: {shape: [4]}\nrules: {energy: {}}\ncalibration: other.json\n")
    with pytest.raises(TargetError, match="is another file now"):
        adaptation._extend_guard()
    adaptation._restore_guard()
    assert read_calibration(place) == before and not file.with_name("other.json").exists()
    adaptation._guard.accept_candidate()
    (adaptation.journal.folder / "guard.calibration.json").write_text("chosen content")
    with pytest.raises(TargetError, match="is not a calibration"):
        adaptation._restore_guard()
    assert read_calibration(place) == alone
