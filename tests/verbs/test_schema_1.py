"""Runs of schema 1, written by the version before schema 2, are read by every verb, and not resumed."""

import json
import shutil
from pathlib import Path

import jsonschema
import pytest

from holdfast.cli.app import run as command
from holdfast.core.errors import TargetError, UsageError
from holdfast.reports.numbers import strict
from holdfast.reports.summary import summary_schema
from holdfast.store.schema_1 import DETAILS, VERSION, document_of_schema_1, manifest_of_schema_1
from holdfast.store.verify import verify
from holdfast.verbs.assess import assess
from holdfast.verbs.stored_runs import open_run, runs_in
from verbs.fakes import data, order, subject

FOLDER = Path(__file__).parent / "schema_1"
NAMES = ("assessment", "hardening")
METRICS = json.loads((FOLDER / "metrics.json").read_text())
"""Value, ends of the interval and n of each metric, as the version reported them that wrote the runs."""
MODEL = ("mnist-cnn", "mnist-mini", "--threat", "linf:0.1", "--suite", "quick", "-n", "6")


@pytest.mark.parametrize("name", NAMES)
def test_the_metrics_are_those_of_the_version_that_wrote_the_run(name):
    assert json.loads((FOLDER / name / "run.json").read_text())["schema_version"] == VERSION
    metrics = open_run(FOLDER / name).metrics
    assert {k: strict([v.value, v.low, v.high, v.n]) for k, v in metrics.items()} == METRICS[name]


@pytest.mark.parametrize("name", NAMES)
def test_report_writes_every_format_with_the_keys_of_schema_2(name, tmp_path):
    formats = ("html", "json", "xml", "sarif", "md", "csv")
    outputs = [word for suffix in formats for word in ("-o", str(tmp_path / f"r.{suffix}"))]
    code = command(["report", str(FOLDER / name), *outputs])
    content = json.loads((tmp_path / "r.json").read_text())
    jsonschema.validate(content, summary_schema(), cls=jsonschema.Draft202012Validator)
    assert (content["schema_version"], content["exit_code"]) == (2, code)
    assert all((tmp_path / f"r.{suffix}").stat().st_size for suffix in formats)


def test_gates_doubts_tables_and_details_of_the_run_are_kept():
    old = open_run(FOLDER / "assessment")
    content = old.summary()
    assert [gate["condition"] for gate in content["gates"]] == ["robust_accuracy >= 0.1"]
    assert (content["verdict"], old.exit_code) == ("unclear", 4)
    assert {doubt["state"] for doubt in content["doubts"]} <= {"clear", "not measured", "not applicable"}
    assert all(doubt["message"] for doubt in content["doubts"])
    assert content["details"] and set(content["details"]) <= DETAILS
    assert content["notes"] == ["no doubt requires an adaptive attack, so none was run"]
    assert content["transfer"]["rows"][0]["computed_on"] == "mnist-cnn"
    assert content["data_transfer"]["rows"][0]["computed_on"] == "mnist-mini 1"
    assert [each["name"] for each in content["other_data"]] == ["mnist-mini"]
    assert content["curves"]["eps"]


@pytest.mark.parametrize("name", NAMES)
def test_verify_checks_the_files(name, tmp_path):
    copied = shutil.copytree(FOLDER / name, tmp_path / "run")
    assert verify(copied).complete
    document = copied / "verdict.json"
    document.write_text(document.read_text().replace('"exit_code": ', '"exit_code":  '))
    with pytest.raises(TargetError, match=r"verdict\.json' was changed"):
        verify(copied)


def test_the_list_of_runs_shows_them():
    by_name = {entry.path.name: entry for entry in runs_in(FOLDER)}
    assert set(by_name) == set(NAMES)
    assert by_name["assessment"].robust == pytest.approx(METRICS["assessment"]["robust_accuracy"][0])
    assert (by_name["hardening"].verb, by_name["hardening"].exit_code) == ("harden", 0)


def test_it_is_compared_with_a_new_run_and_serves_as_a_baseline(tmp_path):
    old, new, compared = str(FOLDER / "assessment"), tmp_path / "new", tmp_path / "c.json"
    gate = ("--baseline", old, "--gate", "regression <= 0.5 vs baseline")
    assert command(["assess", *MODEL, "--no-doubts", *gate, "--run", str(new), "-q"]) == 0
    assert command(["compare", old, str(new), "-o", str(compared), "-q"]) == 0
    content = json.loads(compared.read_text())
    jsonschema.validate(content, summary_schema("comparison-2"), cls=jsonschema.Draft202012Validator)
    assert content["n"] == 6
    assert content["paired"]["robust_accuracy"]["difference"]["value"] == 0
    assert content["runs"][0]["folder"] == old
    assert json.loads((new / "run.json").read_text())["schema_version"] == 2


def test_it_is_not_resumed_and_the_error_names_what_can_be_done(tmp_path, capsys):
    run = shutil.copytree(FOLDER / "assessment", tmp_path / "run")
    assert command(["assess", *MODEL, "--run", str(run), "--resume"]) == 2
    message = capsys.readouterr().err
    assert "schema 1" in message and "--run DIR" in message and f"holdfast report {run}" in message
    assert verify(run).complete
    with pytest.raises(UsageError, match="earlier version"):
        assess(subject(), data(), order(), run=run, resume=True)


def test_every_key_of_the_documents_is_converted():
    assert document_of_schema_1("adaptive", {"because": {}, "ways": [], "blind": False, "missed": []}) == {
        "reasons": {}, "bypassed": [], "no_detector_gradient": False, "unfinished": [],
    }  # fmt: skip
    doubts = {"doubts": [{"name": "scale", "says": "why"}], "fallen": {"noise": [1]}, "notes": []}
    assert document_of_schema_1("doubts", doubts) == {
        "doubts": [{"name": "scale", "message": "why"}], "broken": {"noise": [1]}, "notes": [],
    }  # fmt: skip
    assert document_of_schema_1("verdict", {"judged": "after", "exit_code": 0})["verdict_of"] == "after"
    rotation = {
        "right": 3, "rows": [{"who": "A5", "holds": "x", "word": "untouched", "says": "", "turned": [1]}],
        "instead": [{"who": "static", "clean": {}, "thief": {}, "white": {}, "says": ""}], "verdict": "none",
        "doubt": {"state": "raised", "says": "why"},
    }  # fmt: skip
    assert document_of_schema_1("rotation", rotation) == {
        "n_correct": 3, "conclusion": "none", "doubt": {"state": "raised", "message": "why"},
        "rows": [{"attacker": "A5", "has": "x", "effect": "not affected", "message": "", "broken_ids": [1]}],
        "alternatives": [
            {"alternative": "static", "clean_accuracy": {}, "stolen_set": {}, "white_box": {}, "message": ""}
        ],
    }  # fmt: skip
    assert document_of_schema_1("card", {"why": "requested"}) == {"why": "requested"}


@pytest.mark.parametrize(
    "odd", [{}, {"config": 3}, {"config": {"stages": {}}}, {"config": {"stages": [3]}, "notes": 3}]
)
def test_odd_manifests_are_left_to_the_check_of_their_form(odd):
    assert manifest_of_schema_1(dict(odd)).keys() >= odd.keys()
    assert document_of_schema_1("doubts", {"doubts": 3, **odd})["doubts"] == 3
