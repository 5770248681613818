"""The main job from the command line, end to end: what a user types, and what is said, written and returned."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from holdfast.attacks.suites import SUITES, VARIANTS
from holdfast.cli.app import run
from holdfast.core.catalogue import ATTACKS
from holdfast.settings.grammar import ADAPTIVE

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


QUICK = ["-n", "40", "--threat", "linf:0.2", "--suite", "quick", "--no-doubts"]
FAST = ["-n", "40", "--threat", "linf:0.2", "--suite", "fast", "--no-doubts"]


def test_a_gate_that_fails_ends_with_1_and_writes_every_report(capsys):
    outputs = ["r.html", "r.json", "r.xml", "r.md", "r.csv"]
    flags = [word for name in outputs for word in ("-o", name)]
    code = run(["assess", "mnist-cnn", "mnist-mini", *QUICK, "--gate", "robust_accuracy >= 0.5", *flags])
    said = capsys.readouterr()
    assert code == 1
    assert "fail" in said.err
    assert "holdfast-runs/" in said.err
    assert "Sprint" in said.out
    assert all(Path(name).stat().st_size > 100 for name in outputs)
    content = json.loads(Path("r.json").read_text())
    assert content["exit_code"] == 1
    assert content["gates"][0]["verdict"] == "fail"
    assert content["suite"] == "quick@1"
    rows = list(csv.DictReader(Path("r.csv").read_text().splitlines()))
    assert len(rows) == 40
    robust = sum(row["robust"] == "true" for row in rows) / 40
    assert robust == pytest.approx(content["metrics"]["robust_accuracy"]["value"])


def test_common_corruptions_are_measured_one_by_one(capsys):
    flags = ["-n", "60", "--threat", "corruptions:3"]
    assert run(["assess", "mnist-cnn", "mnist-mini", *flags, "--run", "first", "-o", "x.json"]) == 0
    said = capsys.readouterr()
    assert "corruptions@1" in said.out
    assert "Corruption error rate" in said.out
    assert "survive every corruption tried" in said.err and "attack tried" not in said.err
    content = json.loads(Path("x.json").read_text())
    metrics = {name: estimate["value"] for name, estimate in content["metrics"].items()}
    each = [metrics[f"{attack['name']}_accuracy"] for attack in content["attacks"]]
    assert len(each) == 15
    assert metrics["corruption_error_rate"] == pytest.approx(1 - sum(each) / 15)
    assert metrics["worst_corruption"] == pytest.approx(min(each))
    assert metrics["robust_accuracy"] <= min(each)
    assert content["threat"]["constraint"] == "corruptions:3"
    assert run(["verify", "first"]) == 0
    assert run(["report", "first", "-o", "again.json"]) == 0
    assert json.loads(Path("again.json").read_text())["metrics"] == content["metrics"]


@pytest.mark.slow
def test_corruptions_beside_a_baseline_are_relative_to_it(capsys):
    data = ["mnist-mini", "-n", "60", "--threat", "corruptions:5", "--only", "frost,fog"]
    assert run(["assess", "mnist-cnn", *data, "--run", "first"]) == 0
    gate = ["--baseline", "first", "--gate", "mce <= 1.5 vs baseline"]
    assert run(["assess", "mnist-cnn", *data, *gate, "-o", "y.json"]) in (0, 4)
    content = json.loads(Path("y.json").read_text())
    assert content["metrics"]["mce"]["value"] == pytest.approx(1.0)
    other = ["mnist-cnn", "mnist-mini", "-n", "60", "--threat", "corruptions:5", "--only", "frost"]
    assert run(["assess", *other, "--baseline", "first", "-o", "z.json"]) == 0
    content = json.loads(Path("z.json").read_text())
    assert "mce" not in content["metrics"]
    assert any("with the same corruptions" in note for note in content["notes"])
    light = ["mnist-cnn", "mnist-mini", "-n", "5", "--threat", "corruptions:1", "--only", "brightness"]
    assert run(["assess", *light, "--run", "spotless"]) == 0
    assert run(["assess", *light, "--baseline", "spotless", "-o", "s.json"]) == 0
    (note,) = [note for note in json.loads(Path("s.json").read_text())["notes"] if "mce" in note]
    assert "the baseline makes no error under brightness" in note
    capsys.readouterr()
    assert run(["assess", *other, *gate]) == 2
    assert "with the same corruptions" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--threat", "corruptions:9"], "severity of 1 to 5"),
        (["--threat", "corruptions"], "severity of 1 to 5"),
        (["--threat", "corruptions:3,goal=targeted:1"], "have no target class"),
        (["--threat", "corruptions:3", "--suite", "quick"], "give --suite corruptions"),
        (["--threat", "linf:0.1", "--suite", "corruptions"], "give --threat corruptions:3"),
        (["--threat", "corruptions:3", "--curve"], "leave out --curve"),
    ],
)
def test_what_no_corruption_can_be_is_one_clear_error(flags, said, capsys):
    assert run(["assess", "mnist-cnn", "mnist-mini", "-n", "4", *flags]) == 2
    assert said in capsys.readouterr().err


def test_a_table_cannot_be_corrupted(capsys):
    Path("net.py").write_text("import torch\n\ndef make():\n    return torch.nn.Linear(3, 2)\n")
    Path("t.csv").write_text("a,b,c,y\n0.1,0.2,0.3,0\n0.4,0.5,0.6,1\n")
    words = ["assess", "net.py:make", "t.csv", "--label", "y", "--threat", "corruptions:3"]
    assert run(words) == 2
    assert "need images of 1 or 3 channels" in capsys.readouterr().err


def test_a_hardened_model_passes(capsys):
    code = run(["assess", "mnist-cnn-hardened", "mnist-mini", *QUICK, "--gate", "robust_accuracy >= 0.5"])
    assert code == 0
    assert "pass" in capsys.readouterr().err


def test_json_on_stdout_is_all_that_is_there(capsys):
    assert run(["assess", "mnist-cnn", "mnist-mini", *QUICK, "-q", "-o", "-"]) == 0
    said = capsys.readouterr()
    content = json.loads(said.out)
    assert {
        "metrics",
        "attacks",
        "suite",
        "doubts",
        "gates",
        "threat",
        "model",
        "data",
        "cost",
        "exit_code",
    } <= set(content)
    assert content["metrics"]["robust_accuracy"]["n"] == 40


def test_eps_0_is_clean_accuracy(capsys):
    words = ["assess", "mnist-cnn", "mnist-mini", "-n", "100", "--threat", "linf:0", "--suite", "quick"]
    assert run([*words, "--no-doubts", "-o", "-"]) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    assert metrics["robust_accuracy"]["value"] == metrics["clean_accuracy"]["value"]


@pytest.mark.slow
def test_a_suite_without_an_eps_shows_what_each_attack_found(capsys):
    words = ["assess", "mnist-cnn", "mnist-mini", "-n", "20", "-t", "l2", "-s", "minimum-norm", "--no-doubts"]
    assert run([*words, "--run", "r"]) == 0
    shown = capsys.readouterr().out
    assert all(heading in shown for heading in ("found", "median", ": the smallest changes found"))
    for name in ("DeepFool", "ALMA", "PDPGD"):
        assert f" {name} " in shown
        (line,) = (line for line in shown.splitlines() if line.startswith(f" {name} "))
        assert line.split()[1:4] == ["20", "100.0", "%"]
    assert run(["report", "r"]) == 0
    assert capsys.readouterr().out == shown


def test_an_expired_time_is_reported_for_each_attack_with_its_meaning(capsys):
    words = ["assess", "mnist-cnn", "mnist-mini", *QUICK, "--time-budget", "0.001s", "-o", "r.html"]
    assert run(words) == 0
    said = capsys.readouterr()
    meaning = "a longer run may break more, so robust accuracy is an upper bound"
    assert f"note: time ran out: Sprint finished none; {meaning}" in said.err
    assert [line.split()[1:3] for line in said.out.splitlines() if " Sprint " in line] == [["not", "run"]]
    assert Path("r.html").read_text().count("not run</td>") == 1


def test_an_expired_time_is_reported_once_if_a_doubt_states_it(capsys):
    asked = [word for word in QUICK if word != "--no-doubts"]
    assert run(["assess", "mnist-cnn", "mnist-mini", *asked, "--time-budget", "0.001s"]) == 0
    said = capsys.readouterr().err
    assert said.lower().count("time ran out: sprint finished none") == 1
    assert "doubt not-exhausted open: Time ran out" in said


def test_a_resume_without_a_run_is_refused(capsys):
    words = ["assess", "mnist-cnn", "mnist-mini", *QUICK, "--run", "r", "--resume"]
    said = "note: 'r' contains no run to resume, so a new run is started"
    assert run(words) == 0
    assert said in capsys.readouterr().err
    assert run(words) == 0
    assert said not in capsys.readouterr().err


def test_how_the_attacks_are_made_quick_is_a_detail(capsys):
    words = ["assess", "mnist-cnn", "mnist-mini", *QUICK, "-o", "r.html", "-o", "r.json"]
    detail = "matrix product"
    assert run(words) == 0
    assert detail not in capsys.readouterr().err
    assert detail in " ".join(json.loads(Path("r.json").read_text())["details"])
    assert detail in Path("r.html").read_text().partition("<details>")[2]
    assert run([*words, "-v"]) == 0
    assert detail in capsys.readouterr().err


def test_a_finished_run_is_reported_again_and_compares_with_another(capsys):
    one = ["assess", "mnist-cnn", "mnist-mini", *QUICK, "--gate", "robust_accuracy >= 0.5", "--run", "one"]
    other = ["assess", "mnist-cnn-hardened", "mnist-mini", *QUICK, "--run", "other"]
    assert run(one) == 1
    assert run(other) == 0
    assert run([*one, "--resume"]) == 1
    assert run(one) == 2
    assert "--resume" in capsys.readouterr().err
    assert run(["report", "one", "-o", "again.html"]) == 1
    assert Path("again.html").exists()
    assert run(["verify", "one"]) == 0
    assert run(["compare", "one", "other", "-o", "c.json"]) == 0
    compared = json.loads(Path("c.json").read_text())
    assert compared
    assert run(["runs", "."]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("other ")]
    assert run(["report", "other", "-o", "other.json"]) == 0
    measured = json.loads(Path("other.json").read_text())["metrics"]["robust_accuracy"]["value"]
    assert line.split()[1:5] == [f"{100 * measured:.1f}", "%", "exit", "0"]


def test_a_comparison_under_two_threats_begins_with_a_note(capsys):
    for eps in ("0.1", "0.2"):
        words = ["assess", "mnist-cnn", "mnist-mini", "-n", "8", "-t", f"linf:{eps}", "--suite", "quick"]
        assert run([*words, "--no-doubts", "--run", eps]) == 0
    capsys.readouterr()
    assert run(["compare", "0.1", "0.2", "-o", "c.md", "-o", "c.html", "-o", "c.json"]) == 0
    said = "The threat models differ: linf:0.1 in the first run, linf:0.2 in the second"
    shown = capsys.readouterr()
    assert shown.out.startswith(said)
    headline = json.loads(Path("c.json").read_text())["headline"]
    assert headline not in shown.out and shown.err.startswith(headline)  # after the tables, as every verdict
    assert Path("c.md").read_text().startswith(f"**{said}")
    assert said in Path("c.html").read_text()
    assert json.loads(Path("c.json").read_text())["caution"].startswith(said)


def test_a_run_of_another_config_is_refused_by_name(capsys):
    words = ["assess", "mnist-cnn", "mnist-mini", *QUICK, "--run", "r"]
    assert run(words) == 0
    assert run([*words, "--seed", "1", "--resume"]) == 2
    assert "config" in capsys.readouterr().err


def test_the_configuration_is_the_flags(capsys):
    assert run(["init"]) == 0
    assert run(["init"]) == 2
    assert run(["validate", "holdfast.yaml"]) == 0
    Path("mine.yaml").write_text(
        "model: mnist-cnn\ndata: mnist-mini\nn: 20\nthreat: linf:0.1\ndoubts: false\n"
        "attacks:\n  - {use: PGD, steps: 3, loss: cross_entropy}\n"
    )
    assert run(["validate", "mine.yaml"]) == 0
    capsys.readouterr()
    assert (
        run(["assess", "--config", "mine.yaml", "--set", "attacks.0.steps=5", "--set", "seed=3", "-o", "-"])
        == 0
    )
    content = json.loads(capsys.readouterr().out)
    assert content["attacks"][0]["settings"]["steps"] == 5
    assert content["seed"] == 3
    assert not content["suite"]


@pytest.mark.slow
def test_only_and_skip_choose_by_name(capsys):
    assert run(["assess", "mnist-cnn", "mnist-mini", *FAST, "--skip", "square,apgd-t,relay", "-o", "-"]) == 0
    left = [attack["name"] for attack in json.loads(capsys.readouterr().out)["attacks"]]
    assert left == ["Sprint", "FMN", "Relay-2"]
    assert run(["assess", "mnist-cnn", "mnist-mini", *FAST, "--only", "Apgd-T", "-o", "-"]) == 0
    assert [attack["name"] for attack in json.loads(capsys.readouterr().out)["attacks"]] == ["APGD-T"]
    assert run(["assess", "mnist-cnn", "mnist-mini", *FAST, "--only", "apgdt"]) == 2
    assert "apgd-t" in capsys.readouterr().err


def test_a_factory_in_a_file(elsewhere, capsys):
    (elsewhere / "net.py").write_text(
        "from torch import nn\n\n\n"
        "def make(width: int = 4) -> nn.Module:\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 10))\n"
    )
    words = ["assess", "net.py:make", "mnist-mini", "--model-args", "width=8", *QUICK]
    assert run(words) == 0


def test_a_table_with_names_in_it_is_measured_without_them(elsewhere, capsys):
    rows = "".join(f"n{k},{k / 8},{1 - k / 8},{k % 2}\n" for k in range(8))
    Path("t.csv").write_text(f"name,a,b,kind\n{rows}")
    Path("m.py").write_text("import torch\n\n\ndef build():\n    return torch.nn.Linear(2, 2)\n")
    words = ["assess", "m.py:build", "t.csv", "--label", "kind", "-t", "linf:0.1", "-s", "quick"]
    assert run([*words, "--drop", "name", "--no-doubts", "-o", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["n"] == 8
    assert run(["data", "show", "t.csv", "--label", "kind", "--drop", "name"]) == 0
    assert ["shape", "2"] in [line.split() for line in capsys.readouterr().out.splitlines()]


@pytest.mark.slow
def test_a_dry_run_keeps_nothing(elsewhere, capsys):
    assert (
        run(["assess", "mnist-cnn", "mnist-mini", "--threat", "linf:0.1", "--suite", "quick", "--dry-run"])
        == 0
    )
    assert "forward passes" in capsys.readouterr().out
    assert not list(elsewhere.iterdir())


def test_a_doubt_can_be_accepted_only_by_name(capsys):
    words = ["assess", "mnist-cnn", "mnist-mini", *QUICK, "--accept-doubt", "blackbox=why not"]
    assert run(words) == 2
    assert "black-box" in capsys.readouterr().err


EVERY_PRINTED = {*ATTACKS, *VARIANTS, *ADAPTIVE, *SUITES}
"""Names that a table of attacks may print."""


def test_attacks_models_and_data_are_listed(capsys):
    assert run(["attacks"]) == 0
    assert run(["attacks", "PGD"]) == 0
    assert run(["attacks", "AutoAttack"]) == 0
    assert run(["attacks", "gaussian_noise"]) == 0
    assert run(["models"]) == 0
    assert run(["data", "show", "mnist-mini"]) == 0
    said = capsys.readouterr().out
    assert "arXiv:1706.06083" in said
    assert set(re.findall(r"[\w-]+", said)) >= EVERY_PRINTED
    assert "standard is a suite of attacks" in said
    assert "needs no access" in said
    assert "mnist-cnn-hardened" in said
    assert "1 x 28 x 28" in said


def test_the_doctor_finds_a_missing_normalisation(elsewhere, capsys):
    assert run(["doctor", "mnist-cnn", "mnist-mini"]) == 0
    assert run(["doctor", "mnist-cnn", "mnist-mini", "--mean", "2", "--std", "0.5"]) == 3
    assert "normalisation" in capsys.readouterr().out


@pytest.mark.slow
def test_the_demo_runs_offline_in_a_minute_and_ends_with_0(elsewhere):
    ended = subprocess.run(
        [sys.executable, "-m", "holdfast", "demo"], capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("robust accuracy at most ") > 1  # a pipe sees how far it has come
    report = elsewhere / ended.stdout.strip().splitlines()[-1]
    assert report.stat().st_size < 2_000_000
    content = json.loads(report.with_suffix(".json").read_text())
    assert [gate["verdict"] for gate in content["gates"]] == ["pass", "fail"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("claim", "code", "closed"), [(">= 0.99", 1, ["stdout"]), (">= 0", 0, ["stdout", "stderr"])]
)
def test_reports_and_exit_code_do_not_need_a_reader(claim: str, code: int, closed: list[str]):
    words = [
        "assess",
        "mnist-cnn",
        "mnist-mini",
        *QUICK,
        "--gate",
        f"robust_accuracy {claim}",
        "--run",
        "run",
    ]
    assert run(words) == code
    reading, writing = os.pipe()
    os.close(reading)
    ends = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE} | dict.fromkeys(closed, writing)
    outputs = ["-o", "r.html", "-o", "r.json"]
    command = [sys.executable, "-m", "holdfast", "report", "run"]
    done = subprocess.run([*command, *outputs], check=False, text=True, **ends)
    assert done.returncode == code
    assert done.stderr is None or ("r.html" in done.stderr and "Error" not in done.stderr)
    assert all(Path(name).stat().st_size > 100 for name in ("r.html", "r.json"))
    on_stdout = subprocess.run([*command, "-o", "-"], check=False, text=True, **ends)
    assert on_stdout.returncode == code
    os.close(writing)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [["attacks"], ["attacks", "pgd"], ["--help"], ["report", "--help"], ["runs"]]
)
def test_a_closed_output_is_no_failed_gate(words: list[str]):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "holdfast", *words],
        check=False,
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writing)
    assert done.returncode == 0
    assert "Error" not in done.stderr


def test_a_run_ends_as_soon_as_its_condition_is_decided(capsys):
    until = ["mnist-cnn", "mnist-mini", "--threat", "linf:0.2", "--suite", "quick", "--no-doubts"]
    until += ["--until", "robust_accuracy >= 0.5", "--run", "r"]
    assert run(["assess", *until, "-o", "r.json", "-o", "r.xml", "-o", "r.html"]) == 1
    said = capsys.readouterr()
    content = json.loads(Path("r.json").read_text())
    (gate,) = content["gates"]
    assert gate["looks"] == {"look": 1, "examples": 32, "of": 1000, "ended": "decided"} and content["n"] == 32
    assert gate["estimate"]["high"] < 0.5
    sentence = (
        "it was judged at look 1, after 32 of 1,000 examples, by an interval that is valid at every look"
    )
    assert all(sentence in text for text in (said.err, Path("r.xml").read_text(), Path("r.html").read_text()))
    assert "--until 'robust_accuracy >= 0.5'" in content["reproduce"] and "--gate" not in content["reproduce"]
    assert run(["verify", "r"]) == 0
    assert run(["report", "r", "-o", "again.json"]) == 1
    assert json.loads(Path("again.json").read_text())["gates"] == content["gates"]
    assert run(["assess", *until, "--resume"]) == 1
    capsys.readouterr()
    assert run(["assess", *until[:-4], "--until", "robust_margin >= 0.5"]) == 2
    assert "expected a condition on a share of all examples" in capsys.readouterr().err
