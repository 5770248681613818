"""Steps of `holdfast adapt` that a kill, a failed reload or a server of somebody else interrupts."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from holdfast.adaptation.journal import open_journal
from holdfast.core.errors import TargetError, UsageError
from holdfast.guard.calibration import Calibration, read_calibration, write_calibration
from holdfast.verbs import adapt, adapt_served
from holdfast.verbs.settings import Adapt


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
def opened(monkeypatch):
    """The model of a file, of whatever content."""
    opened = SimpleNamespace(digest="new")
    monkeypatch.setattr(adapt._Adaptation, "_opened", lambda self, path, settings: opened)
    return opened


@pytest.fixture
def run(tmp_path, opened):
    """A run whose candidate passed all steps before the promotion."""
    file, folder = tmp_path / "model.safetensors", tmp_path / "run"
    file.write_bytes(b"old")
    begun = {"set": "old", "model": str(file), "digest": "old", "settings": {}}
    with open_journal(folder, {"server": "http://a"}, resume=False) as journal:
        journal.keep("candidate.safetensors", b"new")
        journal.keep("incumbent.safetensors", b"old")
        yield (
            adapt._Adaptation(Adapt(canary_time="1s"), journal, Server(file), None, lambda text: None),
            begun,
            file,
        )


def test_settings_of_the_server_that_could_name_code_are_not_used(run, opened):
    adaptation, _, file = run
    opened.digest = "old"
    adaptation.port = Server(file, data="other.py:load", trust_code=True, mean=[0.5])
    assert adaptation._described()["settings"] == {"model": str(file), "mean": [0.5]}


def test_a_reload_that_fails_puts_the_earlier_file_back(run):
    adaptation, begun, file = run
    adaptation.journal.take("begin", lambda: begun)
    assert "could not reload the model: it is damaged" in adaptation._promote()["ends"]
    assert file.read_bytes() == b"old"


def test_a_run_that_was_killed_before_it_sent_its_last_step_sends_it(run):
    adaptation, begun, _ = run
    adaptation.journal.take("begin", lambda: {**begun, "ends": "the gate did not pass"})
    sent = []
    adaptation.port.post = lambda path, body: sent.append((body["step"], body["facts"].get("ends")))
    adaptation.finish()
    assert sent == [("begin", "the gate did not pass"), ("end", None)]
    assert adaptation.journal.stored().outcome == "not promoted"


def test_a_rollback_that_was_interrupted_is_finished(run):
    adaptation, begun, _ = run
    adaptation.journal.take("begin", lambda: begun)
    assert "put back" in adaptation._watch()["ends"]  # the file is the earlier one


def test_the_guard_accepts_the_served_model_at_every_moment(run, monkeypatch):
    adaptation, begun, file = run
    guard, place = file.with_name("guard.yaml"), file.with_name("guard.calibration.json")
    guard.write_text("inputs: {shape: [4]}\nrules: {energy: {}}\n")
    begun = {**begun, "settings": {"guard": str(guard)}, "calibration": str(place)}
    adaptation.journal.take("begin", lambda: begun)
    before = Calibration(0.01, 1000, 5, {"energy": 1.0}, "settings", ("old",))
    write_calibration(before, place)
    adaptation._guard.store()
    both, alone = replace(before, models=("old", "new")), replace(before, models=("new",))
    monkeypatch.setattr(adapt_served, "candidate_calibrations", lambda settings: (both, alone))
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


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("model", "shared', .* has the mode 0777"),
        ("guard", "shared', .* has the mode 0777"),
        ("arch", "shared', .* has the mode 0777"),
        ("calibration", "is not in the folder of the guard"),
        ("link", "is not in the folder of the guard"),
        ("unparsed", "is not a calibration"),
    ],
)
def test_files_of_others_and_calibrations_elsewhere_are_refused(place, reason, run, opened, tmp_path):
    adaptation, _, file = run
    opened.digest = "old"
    adaptation.settings = Adapt(canary_time="1s", trust_code=True)
    shared, guard, calibration = (
        tmp_path / "shared",
        tmp_path / "guard.yaml",
        tmp_path / "guard.calibration.json",
    )
    shared.mkdir()
    shared.chmod(0o777)
    for name in ("model.safetensors", "guard.yaml", "net.py"):
        (shared / name).write_text("inputs: {shape: [4]}\nrules: {energy: {}}\n")
    guard.write_bytes((shared / "guard.yaml").read_bytes())
    if place == "calibration":
        guard.write_text(guard.read_text() + "calibration: shared/other.json\n")
    elif place == "link":
        calibration.symlink_to(tmp_path / "run" / "other.json")
    elif place == "unparsed":
        calibration.write_text("chosen content")
    stated = {
        "model": {"model": str(shared / "model.safetensors")},
        "guard": {"guard": str(shared / "guard.yaml")},
        "arch": {"arch": f"{shared / 'net.py'}:make"},
    }
    adaptation.port = Server(file, **stated.get(place, {"guard": str(guard)}))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(TargetError, match=reason):
        adaptation._begin()
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path for path in after if after[path] != before.get(path)} <= {
        tmp_path / "run" / "incumbent.safetensors"
    }
    assert not (tmp_path / "run" / "guard.calibration.json").exists()


def test_a_server_elsewhere_needs_keys(tmp_path):
    with pytest.raises(UsageError, match="is not an address of this machine"):
        Adapt(server="http://192.0.2.1:8081", data="mnist-mini").run(tmp_path / "run")
    assert not (tmp_path / "run").exists()
