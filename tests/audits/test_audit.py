"""The run of an audit: its folder, its reports and its gates."""

import json
from dataclasses import replace

import pytest
import torch

import holdfast
from holdfast.audits.audit import AuditRequest, audited, is_audit, open_audit
from holdfast.audits.finding import Finding, Picture, Table
from holdfast.cli.app import run as command
from holdfast.core.errors import TargetError, UsageError
from holdfast.gates.judging import EXIT_CODES
from holdfast.runs.store.column_forms import Form

REQUEST = AuditRequest(
    "backdoor",
    {"images": 3},
    {"name": "net", "digest": "0" * 64},
    {"name": "digits", "digest": "1" * 64},
    ("scores",),
    ("no-backdoor",),
    notes=("a note",),
)


def measure(run, verdict="flagged"):
    scores = {"id": torch.arange(3), "score": torch.tensor([0.5, 1.0, 9.0])}
    run.stage("scores", lambda: scores)
    run.document("state", lambda: {"verdict": verdict})
    return lambda: {"trigger": torch.rand(2, 1, 8, 8), "row": torch.rand(3)}


def concluded(steps):
    scores = steps.columns("scores", {"score": Form()})
    pictures = [Picture("trigger", "The recovered trigger", ("mask", "pattern")), Picture("row", "A row", ())]
    return Finding(
        steps.document("state", dict[str, str])["verdict"],
        "the trigger of class 2 is smaller than those of all controls",
        ("p = 0.048",),
        {"largest": float(scores["score"].max())},
        tables=(Table("Classes", ("class", "size"), [("<b>", 12.34567), (1, float("inf"))], "in pixels"),),
        pictures=steps.pictures(pictures),
        limits=("It does not prove that there is no other backdoor.",),
    )


@pytest.fixture(autouse=True)
def conclusion(monkeypatch):
    """An audit of one stage and one document."""
    monkeypatch.setattr("holdfast.audits.audit.CONCLUSIONS", {"backdoor": concluded})


@pytest.mark.parametrize(
    ("verdict", "judged"), [("flagged", "fail"), ("not flagged", "pass"), ("unclear", "unclear")]
)
def test_the_gate_passes_only_if_nothing_is_flagged(verdict, judged):
    result = audited(REQUEST, lambda run: measure(run, verdict))
    assert result.verdict == verdict and result.exit_code == EXIT_CODES[judged]


def test_an_audit_without_examples_stores_no_picture(tmp_path):
    run = tmp_path / "one"
    result = audited(replace(REQUEST, examples=False), measure, run)
    usual = audited(REQUEST, measure)
    for content in (result.content, open_audit(run).content):
        assert content["pictures"] == [] and "stores no pictures" in content["notes"][-1]
        assert content["verdict"] == usual.content["verdict"] and content["facts"] == usual.content["facts"]
    assert usual.content["pictures"] and "data:image" not in result.write(tmp_path / "a.html").read_text()
    assert not any(b"data:image" in path.read_bytes() for path in run.iterdir())
    with pytest.raises(UsageError, match="examples: false"):
        audited(REQUEST, measure, run, resume=True)


def test_a_killed_audit_continues_after_its_stored_steps(tmp_path):
    def killed(run):
        measure(run)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        audited(REQUEST, killed, tmp_path / "run")
    with pytest.raises(TargetError, match="not finished"):
        open_audit(tmp_path / "run")

    def again(run):
        assert run.store.stage("scores") is not None
        return measure(run)

    result = audited(REQUEST, again, tmp_path / "run", resume=True)
    assert result.content == open_audit(tmp_path / "run").content


def test_the_functions_of_audits_are_listed_for_completion():
    assert dir(holdfast.audit) == ["backdoor", "generator", "membership", "poison", "privacy"]


def test_a_stored_audit_is_reported_listed_and_verified(tmp_path, capsys):
    run = tmp_path / "runs" / "one"
    result = audited(REQUEST, measure, run)
    assert repr(result) == f"<AuditResult: {result} in {run}>" and str(result).startswith("Flagged: ")
    assert is_audit(run)
    places = [tmp_path / f"report.{suffix}" for suffix in ("html", "json", "md", "xml")]
    assert command(["report", str(run), *(word for place in places for word in ("-o", str(place)))]) == 1
    out = capsys.readouterr()
    assert "12.3" in out.out and out.err.startswith("Flagged: the trigger of class 2")
    page = places[0].read_text()
    assert "&lt;b&gt;" in page and page.count("data:image/png") == 2
    assert json.loads(places[1].read_text())["facts"] == {"largest": 9.0}
    assert 'failures="1"' in places[3].read_text()
    assert command(["verify", str(run)]) == 0 and command(["runs", str(tmp_path / "runs")]) == 0
    assert "audit backdoor" in capsys.readouterr().out
    assert command(["compare", str(run), str(run)]) == 3
    assert "is an audit" in capsys.readouterr().err


def test_a_changed_finding_and_gates_that_do_not_follow_are_refused(tmp_path):
    run = tmp_path / "run"
    audited(REQUEST, measure, run)
    stored = (run / "verdict.json").read_text()
    (run / "verdict.json").write_text(stored.replace('"fail"', '"pass"'))
    with pytest.raises(TargetError, match=r"verdict.json.*chain"):
        open_audit(run)
