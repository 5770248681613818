"""The run of an audit: its folder, its reports and its gates."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

import holdfast
from benchmarks.forging import accepted_fields, rechain
from conclusions import concluding
from holdfast.audits.audit import AuditRequest, audited, is_audit, judged, open_audit
from holdfast.audits.finding import Finding, Picture, Table
from holdfast.cli.app import run as command
from holdfast.core.catalogue import AUDITS, names
from holdfast.core.errors import TargetError, UsageError
from holdfast.gates.judging import EXIT_CODES
from holdfast.reports.audit import failing_gate
from holdfast.runs.store import columns as column_files
from holdfast.runs.store.columns import Form, flag, validated_columns, whole
from holdfast.verbs.audit.generator import AuditGenerator

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
def conclusion():
    """An audit of one stage and one document."""
    with concluding(concluded):
        yield


@pytest.mark.parametrize(
    ("verdict", "judged"), [("flagged", "fail"), ("not flagged", "pass"), ("unclear", "unclear")]
)
def test_the_gate_passes_only_if_nothing_is_flagged(verdict, judged):
    result = audited(REQUEST, lambda run: measure(run, verdict))
    assert result.verdict == verdict and result.exit_code == EXIT_CODES[judged]


@pytest.mark.parametrize("kind", [kind for kind, entry in AUDITS.items() if entry.gate])
def test_the_gate_that_is_named_for_a_flagged_audit_fails(kind):
    finding = {"verdict": "flagged", "metrics": {}}
    gate = failing_gate({**finding, "kind": kind, "gates": []})
    (result,) = judged(kind, finding, [gate])
    assert result["verdict"] == "fail"
    assert AuditGenerator(latent=0, gates=["not-flagged"]).gates == ["not-flagged"]  # it needs no search
    for verdict in ("not flagged", "unclear"):
        assert failing_gate({"verdict": verdict, "kind": kind, "gates": []}) == ""
    assert failing_gate({**finding, "kind": kind, "gates": [result]}) == ""


def test_the_gate_of_another_audit_is_refused_with_the_name_of_the_own_one():
    with pytest.raises(
        UsageError, match="'no-backdoor' is not one of audit generator, whose gate is not-flagged"
    ):
        AuditGenerator(gates=["no-backdoor"])


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
    assert dir(holdfast.audit) == sorted(name for name, entry in AUDITS.items() if entry.settings)


def test_a_stored_audit_is_reported_listed_and_verified(tmp_path, capsys):
    run = tmp_path / "runs" / "one"
    result = audited(REQUEST, measure, run)
    assert repr(result) == f"<AuditResult: {result} in {run}>" and str(result).startswith("Flagged: ")
    assert is_audit(run)
    places = {suffix: tmp_path / f"report{suffix}" for suffix in names("reports")}
    outputs = [word for place in places.values() for word in ("-o", str(place))]
    assert command(["report", str(run), *outputs]) == 1
    out = capsys.readouterr()
    assert "12.3" in out.out and out.err.startswith("Flagged: the trigger of class 2")
    page = places[".html"].read_text()
    assert "&lt;b&gt;" in page and page.count("data:image/png") == 2
    assert json.loads(places[".json"].read_text())["facts"] == {"largest": 9.0}
    assert 'failures="1"' in places[".xml"].read_text()
    assert command(["verify", str(run)]) == 0 and command(["runs", str(tmp_path / "runs")]) == 0
    assert "audit backdoor" in capsys.readouterr().out
    assert command(["compare", str(run), str(run)]) == 3
    assert "has no returns of a policy" in capsys.readouterr().err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished audit, which tests copy and change."""
    with concluding(concluded):
        run = tmp_path_factory.mktemp("audit") / "run"
        audited(REQUEST, measure, run)
    return run


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def with_columns(run, stage, **columns):
    """Change columns of a stage, or leave out those that are None, and compute the digests again."""
    stored = column_files.read(run / f"{stage}.safetensors")
    kept = {name: values for name, values in {**stored.columns, **columns}.items() if values is not None}
    column_files.write(run / f"{stage}.safetensors", kept, stored.about)
    rechain(run)


def test_a_changed_finding_and_gates_that_do_not_follow_are_refused(run):
    stored = (run / "verdict.json").read_text()
    (run / "verdict.json").write_text(stored.replace('"fail"', '"pass"'))
    with pytest.raises(TargetError, match=r"verdict.json.*chain"):
        open_audit(run)
    for gate in ('"fail"', '"no-backdoor"'):
        (run / "verdict.json").write_text(stored.replace(gate, '"pass"'))
        rechain(run)
        with pytest.raises(TargetError, match="does not follow from the finding"):
            open_audit(run)


def test_a_forged_finding_is_refused_wherever_it_is_opened(finished, run, tmp_path, capsys):
    assert not accepted_fields(finished, 20, tmp_path / "copy")
    finding = json.loads((finished / "finding.json").read_text())
    (run / "finding.json").write_text(json.dumps({**finding, "verdict": "not flagged"}))
    rechain(run)
    for words in (["verify"], ["report"], ["report", "--annex", "aisvs"]):
        assert command([words[0], str(run), *words[1:]]) == 3
        assert (
            "verdict in" in (error := capsys.readouterr().err) and "does not follow from its columns" in error
        )
    with pytest.raises(TargetError, match="does not follow from its columns"):
        audited(REQUEST, measure, run, resume=True)


def test_numbers_that_differ_by_their_rounding_are_those_of_a_finding(run):
    finding = json.loads((run / "finding.json").read_text())
    largest = finding["facts"]["largest"]
    for factor, accepted in ((1 + 1e-9, True), (1 + 1e-5, False)):
        (run / "finding.json").write_text(json.dumps({**finding, "facts": {"largest": largest * factor}}))
        rechain(run)
        if accepted:
            assert open_audit(run).facts == {"largest": largest}
        else:
            with pytest.raises(TargetError, match=r"facts\.largest in"):
                open_audit(run)


def test_an_audit_of_an_earlier_version_is_refused_with_its_version(run):
    manifest = json.loads((run / "run.json").read_text())
    manifest["versions"]["holdfast"] = "0.1"
    del manifest["config"]["format"]
    (run / "run.json").write_text(json.dumps(manifest))
    rechain(run)
    with pytest.raises(TargetError, match=r"written by holdfast 0\.1 in another format.* audit again"):
        open_audit(run)


@pytest.mark.parametrize(
    ("score", "fault"),
    [
        (None, "has no column 'score'"),
        (torch.arange(3), "the data type int64"),
        (torch.zeros(3, dtype=torch.complex64), "the data type complex64"),
        (torch.zeros(3, 1), r"the shape \(3, 1\)"),
        (torch.tensor(1.0), r"the shape \(\)"),
        (torch.tensor([0.0, torch.nan, 1.0]), "values that are not a number"),
        (torch.tensor([0.0, torch.inf, 1.0]), "values from 0 to inf"),
        (torch.tensor([0.0, 1e308, 1.0], dtype=torch.float64), r"values from 0 to 1e\+308"),
    ],
)
def test_columns_of_another_form_are_refused(run, score, fault):
    with_columns(run, "scores", score=score)
    with pytest.raises(TargetError, match=fault):
        open_audit(run)


@pytest.mark.parametrize(
    ("form", "values", "fault"),
    [
        (whole("n", high=9), torch.tensor([1, 2**62, 3]), "values from 1 to"),
        (whole("n"), torch.tensor([0, -1, 3]), "values from -1 to 3"),
        (flag("n"), torch.tensor([0.0, 1.0, 0.0]), "the data type float32"),
        (Form((4,)), torch.zeros(3), r"the shape \(3,\)"),
        (Form(("id",)), torch.zeros(3), r"the shape \(3,\).*with id = 5"),
        (Form(rows=(1, 2)), torch.zeros(3), "3 rows"),
    ],
)
def test_a_form_states_types_sizes_and_ranges(form, values, fault):
    with pytest.raises(TargetError, match=fault):
        validated_columns("file", {"values": values}, {"values": form}, {"id": 5})
    usual = {"nan": torch.tensor([torch.nan, -torch.inf]), "id": torch.zeros(2, 7, dtype=torch.int64)}
    forms = {"nan": Form(nan=True, infinite=True), "id": Form(("n",), further=True, whole=True)}
    assert validated_columns("file", usual, forms, {}) == {"n": 2}


@pytest.mark.parametrize(
    ("name", "old", "new", "fault"),
    [
        ("finding", '"largest": 9.0', '"largest": Infinity', "not valid JSON"),
        ("finding", '"largest": 9.0', '"largest": 1e308', "does not follow"),
        ("finding", "p = 0.048", "\\ud800", "does not follow"),
        ("run", '"seed": 0', '"seed": 1e999', "not valid JSON"),
        ("run", '"seed": 0', '"seed": 1e308', "seed is 1e"),
        ("verdict", '"no-backdoor"', '"\\ud800"', "does not follow"),
    ],
)
def test_odd_numbers_and_texts_in_documents_are_refused(run, name, old, new, fault, capsys):
    text = (run / f"{name}.json").read_text()
    assert old in text
    (run / f"{name}.json").write_text(text.replace(old, new))
    rechain(run)
    assert command(["verify", str(run)]) == 3
    assert fault in capsys.readouterr().err


def test_pictures_are_bound_by_their_digest_and_the_report_states_so(run, tmp_path, capsys):
    images = column_files.read(run / "pictures.safetensors").columns["trigger"]
    with_columns(run, "pictures", trigger=255 - images)
    result = open_audit(run)
    for suffix in {*names("reports")} - {".csv"}:  # which has the tables alone
        assert "of the pictures only the digest" in result.write(tmp_path / f"r{suffix}").read_text()
    assert "of the pictures only the digest" in result.text()
    with_columns(run, "pictures", trigger=images[:1])
    with pytest.raises(TargetError, match="2 images of at most"):
        open_audit(run)
    with_columns(run, "pictures", trigger=None)
    with pytest.raises(TargetError, match="pictures in .* does not follow"):
        open_audit(run)


def test_the_head_of_an_audit_is_compared_with_an_expected_one(run, capsys):
    assert command(["verify", str(run)]) == 0
    head = capsys.readouterr().out.split()[-1]
    assert command(["verify", str(run), "--expect-head", head]) == 0
    with_columns(run, "scores", score=torch.tensor([0.5, 2.0, 9.0]))
    assert command(["verify", str(run)]) == 0  # a consistent forgery
    capsys.readouterr()
    assert command(["verify", str(run), "--expect-head", head]) == 3
    assert f"no record of the chain of '{run}' has the digest {head[:16]}" in capsys.readouterr().err
    assert command(["verify", str(run), "--expect-head", "1"]) == 2
