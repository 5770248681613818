"""Steps of `holdfast adapt` that a kill, a failed reload or a server of somebody else interrupts."""

from types import SimpleNamespace

import pytest

from holdfast.adaptation.journal import Journal
from holdfast.api import adapting
from holdfast.api.verb_settings import Adapt


class Server:
    """An operator's port whose reloads fail, unless the file has the content that is served."""

    def __init__(self, file, **stated):
        self.file, self.reload = file, "none"
        self.stated = {"model": str(file), **stated}

    def get(self, path):
        model = {"digest": "old", "set": "old", "reload": self.reload, "reason": "it is damaged"}
        return {"model": {**model, "settings": self.stated}, "workers": [{"set": "old"}]}

    def post(self, path, body):
        if path == "/swap":
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
    adaptation.journal.add("begin", {**begun, "settings": {"guard": str(file.with_name("guard.yaml"))}})
    live = []
    monkeypatch.setattr(adapting, "candidate_calibrations", lambda settings: ("both", "alone"))
    monkeypatch.setattr(
        adapting, "write_calibration", lambda content, path, mode: path.write_text(content), raising=False
    )
    monkeypatch.setattr(adapting, "read_guard_settings", lambda guard: None)
    monkeypatch.setattr(adapting, "calibration_path", lambda settings, guard: file)
    monkeypatch.setattr(adapting, "write_candidate", lambda guard, content: live.append(content))
    adaptation._extend_guard()
    assert live == ["both"]
    assert (adaptation.journal.folder / "candidate.calibration.json").read_text() == "alone"
