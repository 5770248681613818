"""What the rows of the benchmarks stand on: settings whose network is absent are left out, and said to be."""

import importlib
import json
import time

import pytest
import torch

from benchmarks import gpu, networks, record
from benchmarks.__main__ import ROWS
from benchmarks.absent import Absent
from benchmarks.hardened import hardened_in_cpu_time
from benchmarks.rows import standard


@pytest.mark.parametrize("row", ROWS)
def test_every_row_states_what_it_shows_and_measures(row):
    module = importlib.import_module(f"benchmarks.rows.{ROWS[row]}")
    assert module.WHAT
    assert callable(module.measured)


def test_a_setting_whose_network_or_images_are_absent_is_a_note(monkeypatch):
    def only_here(name: str) -> networks.Network:
        if name == "gone":
            raise Absent("not trained yet")
        return networks.Network(name, name, torch.nn.Identity(), "")

    def only_digits(data: str, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        if data != "digits":
            raise Absent("not fetched yet")
        return torch.zeros(n, 1), torch.zeros(n)

    for name, loaded in {"network": only_here, "images": only_digits}.items():
        monkeypatch.setattr(networks, name, loaded)
    notes = []
    settings = (("gone", 0.1), ("letters", 0.2), ("digits", 0.3, "more"))
    found = [(net.name, len(x), len(y), *rest) for net, x, y, *rest in networks.present(settings, 5, notes)]
    assert found == [("digits", 5, 5, 0.3, "more")]
    assert notes == ["gone: not trained yet", "letters: not fetched yet"]


def test_a_budget_of_cpu_time_reaches_the_training(monkeypatch):
    arguments = {}
    monkeypatch.setattr("holdfast.verbs.harden.harden", lambda *_, **more: arguments.update(more))
    hardened_in_cpu_time("mnist-cnn", "mnist-mini", threat="linf:0.1", recipe="pgd", budget="1min")
    assert arguments["clock"] is time.process_time


def test_a_row_without_results_is_absent_for_the_noted_reasons():
    with pytest.raises(Absent, match="^one: not here; two: not here either$"):
        record.Outcome([], [], {}, notes=["one: not here", "two: not here either", "one: not here"])


@pytest.fixture
def folder_of_records(monkeypatch, tmp_path):
    monkeypatch.setattr(record, "FOLDER", tmp_path)
    return tmp_path


def test_a_note_is_written_once(folder_of_records):
    claim = record.Claim("a <= 1", 0.5, 1.0)
    at = record.write("row", "what", record.Outcome([], [claim], {}, notes=["absent", "slow", "absent"]))
    assert json.loads(at.with_suffix(".json").read_text())["notes"] == ["absent", "slow"]
    assert at.read_text().count("- absent") == 1


def test_a_row_may_stand_on_the_newest_record_of_another(folder_of_records):
    with pytest.raises(Absent, match="^there is no record of row; make it first, by --only row$"):
        record.newest("row")
    for name in ("2026-01-02-row", "2026-01-10-row", "2026-02-01-best-row"):
        (folder_of_records / f"{name}.json").write_text(json.dumps({"made": name}))
    assert record.newest("row") == {"made": "2026-01-10-row"}


def test_the_rate_beyond_the_references_own_is_over_all_pairs_of_runs():
    def runs(*broken):
        return [torch.tensor([c == "." for c in code]) for code in broken]

    theirs, mine = runs("xx..", "x..."), runs("x...", "x..x")
    assert standard.broken_rate(theirs, mine) == 12.5  # one of four, in two of the four pairs
    assert standard.own_rate(theirs) == 12.5
    assert standard.own_rate(theirs[:1]) == 0.0
    same = runs("xx..", "xx..", "xx..")
    assert standard.jackknifed(same, same) == 0.0
    assert standard.jackknifed([*theirs, *theirs[:1]], [*mine, *mine[:1]]) > 0


def test_the_measurement_on_an_accelerator_records_what_it_has_even_if_a_part_fails_or_is_late(tmp_path):
    def failing(device, sizes, end):
        yield {"what": "one", "ok": True}
        raise ValueError("no such operation")

    def late(device, sizes, end):
        while True:
            try:
                time.sleep(60)
            except Exception:  # noqa: BLE001 - as code that handles every failure
                pytest.fail("code of a part handled the time limit")
        yield {}

    path = tmp_path / "gpu.json"
    parts = (gpu.Part("a", 60, failing), gpu.Part("b", 1, late))
    rows = gpu.measured(torch.device("cpu"), gpu.Sizes(), parts, path)
    assert [(row["part"], row["ok"]) for row in rows] == [("a", True), ("a", False), ("b", False)]
    assert rows[1]["what"] == "ValueError: no such operation" and rows[2]["what"] == "stopped after 1 s"
    assert json.loads(path.read_text())["table"] == rows


@pytest.mark.slow
@pytest.mark.parametrize(
    "part", [part for part in gpu.PARTS if part.name != "laws"], ids=lambda part: part.name
)
def test_a_part_of_the_measurement_on_an_accelerator_runs_on_a_processor(part, data_folder, models_folder):
    small = gpu.Sizes(verdicts=2, exact=1, certified=2, training=16, judged=4, width=2, batch=8)
    rows = list(part.rows(torch.device("cpu"), small, time.monotonic() + 5))
    assert rows and all(row["ok"] for row in rows)


def test_without_an_accelerator_nothing_is_measured(monkeypatch, command_line, capsys, tmp_path):
    command_line(["gpu", "--record", str(tmp_path / "gpu.json")])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main() == 2
    assert "torch finds no accelerator" in capsys.readouterr().err and not list(tmp_path.iterdir())
