"""Everything that can be wrong on a command line: one clear message, the right exit code, no traceback."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from holdfast.cli import running
from holdfast.cli.app import run

pytestmark = pytest.mark.usefixtures("elsewhere")

FACTORIES = """
import atexit
import os
import signal
import time

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.linear, self.answer = nn.Linear(784, 10), answer

    def forward(self, x):
        return self.answer(self.linear(x.flatten(1)), x)


def picky(logits, x):
    if len(x) == 1:
        raise ValueError("expected more than one value per channel")
    return logits


def nan():
    return Net(lambda logits, x: logits * float("nan"))


def constant():
    return Net(lambda logits, x: logits * 0)


def tuple_():
    return Net(lambda logits, x: (logits, x))


def images():
    return Net(lambda logits, x: x)


def fine():
    return Net(lambda logits, x: logits)


def seven():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 7))


def colours():
    return nn.Sequential(nn.Conv2d(3, 1, 28), nn.Flatten(), nn.Linear(1, 10))


def not_for_one():
    return Net(picky)


def raises():
    raise RuntimeError("no such weights")


def late(by):
    atexit.register(lambda: (os.kill(os.getpid(), getattr(signal, by)), time.sleep(0.1)))
    return fine()


def stopped(by):
    os.kill(os.getpid(), getattr(signal, by))
    time.sleep(60)


number = 3
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with some models and data in it, which each test copies."""
    folder = tmp_path_factory.mktemp("files")
    with contextlib.chdir(folder):
        write_files()
    return folder


def write_files():
    Path("m.py").write_text(FACTORIES)
    x, y = np.random.default_rng(0).random((8, 1, 28, 28), dtype=np.float32), np.arange(8) % 10
    np.savez("good.npz", x=x, y=y)
    np.savez("bright.npz", x=x * 255, y=y)
    np.savez("small.npz", x=x[:, :, :14], y=y)
    np.savez("far.npz", x=x, y=y + 7)
    np.savez("below.npz", x=x, y=y - 1)
    np.savez("none.npz", x=x[:0], y=y[:0])
    np.savez("one.npz", x=x[:1], y=y[:1])
    np.savez("same.npz", x=x, y=y * 0)
    np.savez("hole.npz", x=np.where(x > 0.99, np.nan, x), y=y)
    np.savez("short.npz", x=x, y=y[:5])
    Path("cut.npz").write_bytes(Path("good.npz").read_bytes()[:500])
    Path("words.npz").write_text("not an archive")
    torch.save({"weight": torch.zeros(3, 3)}, "other.pt")
    Path("cut.pt").write_bytes(Path("other.pt").read_bytes()[:300])
    with zipfile.ZipFile("bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", b"\0" * 50_000_000)
    torch.save(torch.nn.Linear(2, 2), "code.pt")
    Path("table.csv").write_text("a,b,kind\n0.1,0.2,x\n0.3,oops,y\n")
    Path("bad.yaml").write_text("model: mnist-cnn\nthret: linf:0.1\n")
    Path("deep.yaml").write_text("model: mnist-cnn\ndata: mnist-mini\nattacks: [{use: PGD, stepz: 5}]\n")
    Path("code.yaml").write_text("model: m.py:fine\ndata: mnist-mini\n")
    Path("surrogate.yaml").write_text(
        "model: mnist-cnn\ndata: mnist-mini\nsurrogates: ['m.py:fine,skip=bn*']\n"
    )
    Path("file").write_text("in the way")


@pytest.fixture
def elsewhere(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with these models and data."""
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


ASSESS = ["assess", "mnist-cnn", "mnist-mini", "-n", "4", "--suite", "quick", "--threat", "linf:0.1"]


def with_model(model: str, *flags: str) -> list[str]:
    return ["assess", model, *ASSESS[2:], *flags]


def with_data(data: str, *flags: str) -> list[str]:
    return ["assess", "mnist-cnn", data, *ASSESS[5:], *flags]


CASES = [
    # files that are absent, cut or hostile
    (with_model("gone.pt"), 3, "gone.pt"),
    (with_data("gone.npz"), 3, "gone.npz"),
    (["assess", "gone.pt"], 3, "gone.pt"),
    (with_data("gone.csv"), 3, "gone.csv"),
    (with_model("cut.pt", "--arch", "mlp"), 3, "cut.pt"),
    (with_data("cut.npz"), 3, "cut.npz"),
    (with_data("words.npz"), 3, "words.npz"),
    (with_model("bomb.pt", "--arch", "mlp"), 3, "compressed"),
    (with_model("code.pt", "--arch", "mlp"), 3, "code"),
    (with_model("other.pt", "--arch", "mlp"), 3, "weight"),
    (with_model("m.py:gone"), 2, "gone"),
    (with_model("m.py:raises"), 3, "no such weights"),
    (with_model("m.py:number"), 2, "number"),
    # data that cannot be meant
    (with_data("bright.npz"), 3, "255"),
    (with_data("small.npz"), 3, "shape"),
    (with_data("far.npz"), 3, "label"),
    (with_data("below.npz"), 3, "label"),
    (with_data("none.npz"), 3, "empty"),
    (with_data("hole.npz"), 3, "nan"),
    (with_data("short.npz"), 3, "label"),
    (with_data("table.csv"), 2, "--label"),
    (with_data("table.csv", "--label", "kint"), 2, "kind"),
    (with_data("table.csv", "--label", "kind"), 3, "give --drop b"),
    (with_data("table.csv", "--label", "kind", "--drop", "c"), 2, "no column 'c' to drop"),
    (
        with_data("good.npz", "--split", "val"),
        2,
        "contains x, y, but no split 'val'; save x_val and y_val in it; leave out --split",
    ),
    # models that answer nonsense
    (with_model("m.py:tuple_"), 3, "tuple"),
    (with_model("m.py:images"), 3, "logits"),
    (with_model("m.py:fine", "--classes", "7"), 3, "7 classes"),
    # words that do not exist
    (with_model("mnist-cn"), 2, "mnist-cnn"),
    (with_data("mnist-mimi"), 2, "mnist-mini"),
    (["assess", "mnist-cnn", "mnist-mini", "--suite", "standart"], 2, "standard"),
    ([*ASSESS, "--gate", "robust_acuracy >= 0.5"], 2, "robust_accuracy"),
    ([*ASSESS, "--gate", "robust_accuracy > 0.5"], 2, ">="),
    ([*ASSESS, "--gate", "regression <= 0.01 vs baseline"], 2, "--baseline"),
    ([*ASSESS, "--only", "sprnt"], 2, "did you mean 'sprint'"),
    ([*ASSESS, "--config", "bad.yaml"], 2, "threat"),
    (["assess", "--config", "deep.yaml"], 2, "steps"),
    (["assess", "--config", "code.yaml"], 2, "--trust-code"),
    (["assess", "mnist-cnn", ""], 2, "the address of the data is empty"),
    ([*ASSESS, "--set", "thret=linf:0.1"], 2, "threat"),
    ([*ASSESS, "--set", "seed=["], 2, "yaml"),
    ([*ASSESS, "--accept-doubt", "noize=I know"], 2, "noise"),
    ([*ASSESS, "--accept-doubt", "noise="], 2, "give --accept-doubt noise=REASON"),
    ([*ASSESS, "--bounds", "0,inf"], 2, "bounds"),
    ([*ASSESS, "--resume"], 2, "--run"),
    ([*ASSESS[:-1], "linf:-0.1"], 2, "eps"),
    ([*ASSESS[:-1], "linf:1.5"], 2, "1.5"),
    ([*ASSESS[:-1], "l2:50"], 2, "28"),
    ([*ASSESS[:-1], "l0:785"], 2, "784"),
    ([*ASSESS[:-1], "lin:0.1"], 2, "linf"),
    ([*ASSESS[:-1], "linf:0.1,goal=targeted:10"], 2, "9"),
    ([*ASSESS[:-1], "linf:0.1,access=scores"], 2, "black-box"),
    ([*ASSESS[:-1], "linf:0.1,access=none"], 2, "--surrogate"),
    ([*ASSESS, "--surrogate", "mnist-cn"], 2, "mnist-cnn"),
    ([*ASSESS[:-4], "-t", "corruptions:3", "--surrogate", "mnist-cnn"], 2, "leave out --surrogate"),
    (
        [*ASSESS[:-1], "spatial:rotate=20", "--surrogate", "mnist-cnn"],
        2,
        "under spatial:rotate=20, because whole images are transformed; leave out --surrogate",
    ),
    ([*ASSESS[:-1], "spatial:rotate=20,access=none"], 2, "be seen; the threat can allow more"),
    ([*ASSESS[:-3], "transfer", "-t", "spatial:rotate=20"], 2, "give the attacker access to the model"),
    ([*ASSESS[:-1], "l1:5,access=labels"], 2, "no attack under l1 works with labels alone"),
    ([*ASSESS[:-1], "patch:8x8,access=scores"], 2, "only; the threat can allow more"),
    ([*ASSESS, "--surrogate", "nowhere.pt,arch=cnn"], 3, "nowhere.pt"),
    ([*ASSESS, "--surrogate", "good.npz"], 2, "good.npz"),
    ([*ASSESS, "--surrogate", "m.py:fine,skip=layer*.bn2"], 2, "'layer*.bn2'"),
    ([*ASSESS, "--across", "mnist-min"], 2, "mnist-mini"),
    ([*ASSESS, "--across", "nowhere.npz"], 3, "nowhere.npz"),
    ([*ASSESS, "--across", "mnist-cnn.safetensors"], 3, "mnist-cnn.safetensors"),
    ([*ASSESS, "--surrogate", "http://localhost:1/v2/models/m"], 2, "weights"),
    (["harden", "http://localhost:1/v2/models/m", "mnist-mini"], 2, "whose weights cannot be trained"),
    ([*ASSESS, "--surrogate", "m.py:seven"], 3, "7 classes"),
    ([*ASSESS, "--surrogate", "m.py:colours"], 3, "inputs of the model, of shape (1, 28, 28)"),
    ([*ASSESS, "--surrogate", "m.py:fine,mean=0.5,mean=0.1"], 2, "twice"),
    (
        ["assess", "--config", "surrogate.yaml"],
        2,
        "give --surrogate 'm.py:fine,skip=bn*', or give --trust-code",
    ),
    ([*ASSESS, "-o", "report.pdf"], 2, ".html"),
    ([*ASSESS, "--batch-size", "0"], 2, "--batch-size is 0; expected at least 1"),
    (["assess", "mnist-cnn", "mnist-mini", "-n", "0"], 2, "-n is 0; expected at least 1"),
    ([*ASSESS, "--set", "seed=abc"], 2, "--set seed is 'abc'; expected a whole number"),
    ([*ASSESS, "-t", "linf:0.2"], 2, "--threat is given twice"),
    ([*ASSESS, "-s", "quick"], 2, "--suite is given twice"),
    ([*ASSESS, "--curve", "--no-curve"], 2, "--curve is given twice"),
    (["data", "show", "mnist-mini", "--split", "a", "--split", "b"], 2, "--split is given twice"),
    ([*ASSESS, "--device", "tpu"], 2, "tpu"),
    (["assess", "mnist-cnn"], 2, "DATA"),
    (["assess"], 2, "MODEL"),
    (["attacks", "PDG"], 2, "PGD"),
    (["attacks", "pgdd"], 2, "did you mean 'PGD'"),
    (["data", "show", "mnits"], 2, "mnist"),
    (["report", "nowhere"], 3, "nowhere"),
    (["verify", "nowhere"], 3, "nowhere"),
    (["verify", "."], 3, "run.json"),
    (["compare", ".", "."], 3, "run.json"),
    ([*ASSESS, "--baseline", "."], 3, "run.json"),
    # disks
    ([*ASSESS, "--run", "file/run"], 3, "file"),
    ([*ASSESS, "-o", "file/report.html"], 3, "file"),
]


@pytest.mark.parametrize(
    ("words", "code", "named"), CASES, ids=lambda value: " ".join(value) if isinstance(value, list) else None
)
def test_one_clear_message(words, code, named, capsys):
    assert run(words) == code
    said = capsys.readouterr()
    assert named.lower() in said.err.lower()
    assert "Traceback" not in said.err
    assert said.err.startswith("holdfast: ")
    assert len(said.err.splitlines()) <= 3


@pytest.mark.parametrize("model", ["m.py:nan", "m.py:constant"])
def test_a_model_with_non_finite_outputs_is_broken_and_doubted(model, capsys):
    assert run(with_model(model, "--gate", "robust_accuracy >= 0.0")) in (0, 4)
    assert "doubt" in capsys.readouterr().err


@pytest.mark.parametrize("data", ["one.npz", "same.npz"])
def test_one_image_and_one_class_are_measured(data):
    assert run(with_data(data)) == 0


@pytest.mark.parametrize("data", ["one.npz", "good.npz"])
def test_a_model_that_refuses_some_batch_sizes_is_measured_with_a_note(data, capsys):
    assert run(["assess", "m.py:not_for_one", data, *ASSESS[5:]]) == 0
    said = "the model does not accept all batch sizes; each batch is padded to a multiple of 2"
    assert f"note: {said}" in capsys.readouterr().err
    run(["doctor", "m.py:not_for_one", data])
    assert said in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", ["apgd-t", "APGD-T"])
def test_an_attack_is_shown_by_the_name_that_a_suite_gives_it(name, capsys):
    assert run(["attacks", name]) == 0
    shown = capsys.readouterr().out
    assert "APGD-T is the name of APGD" in shown
    assert "shrink" in shown


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["attacks", "PGD", "-q", "-q"],
        [*ASSESS[:-2], "--dry-run", "--gate", "f1 >= 0", "--gate", "f1 <= 1"],
        [*ASSESS, "--suite", "quick", "--help"],
    ],
)
def test_what_may_be_repeated_is_taken(words):
    assert run(words) == 0


def test_debug_shows_the_traceback(capsys):
    assert run(["assess", "gone.pt", "--debug"]) == 3
    assert "Traceback" in capsys.readouterr().err


SLIPS = [
    [*ASSESS[:-1], "lin:0.1"],
    [*ASSESS, "--suit", "x"],
    ["assess", "gone.pt"],
    ["asess"],
    ["attacks", "pgdd"],
    with_model("mnist-cn"),
    with_data("mnits"),
    [*ASSESS, "--only", "sprnt"],
    [*ASSESS, "--skip", "sqare"],
    [*ASSESS, "-o", "report.pdf"],
    [*ASSESS, "--baseline", "."],
    ["report", "."],
    ["verify", "."],
    ["compare", ".", "."],
]


def test_slips_of_the_pen_are_answered_before_torch_is_imported():
    """All in one process, which ends at the first that succeeds or imports torch."""
    code = f"""
import sys
from holdfast.cli.app import run
for words in {SLIPS!r}:
    if not run(words) or "torch" in sys.modules:
        sys.exit(f"failed at {{words}}")
"""
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_before_the_run_is_reported(name, code):
    words = [*with_model("m.py:stopped", "--model-args", f"by={name}")]
    ended = subprocess.run(
        [sys.executable, "-m", "holdfast", *words], check=False, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == code
    assert f"stopped by {name}; finished steps are stored; resume with: holdfast assess" in ended.stderr
    assert "--run holdfast-runs/" in ended.stderr and ended.stderr.endswith(" --resume\n")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "; start again, or add --run DIR --resume\n"),
        (["--run=r"], "; repeat the command with --resume\n"),
        (["--run", "r", "--resume"], "; repeat the command\n"),
    ],
)
def test_a_signal_before_the_settings_are_read_fits_the_command(more, said, monkeypatch, capsys):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    for verb in ("harden", "assess"):  # the former imports from the latter
        monkeypatch.setattr(
            f"holdfast.cli.{'improve' if verb == 'harden' else 'measure'}.settings_from", stopped
        )
        assert run([verb, *ASSESS[1:], *more]) == 130
        assert capsys.readouterr().err.endswith(said)


def test_a_resume_without_the_model_is_refused_with_the_command_of_the_run(capsys):
    assert run([*ASSESS, "--no-doubts", "--run", "r"]) == 0
    capsys.readouterr()
    assert run(["assess", "--run", "r", "--resume"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("holdfast: MODEL is missing")
    assert "resume with: holdfast " in said and said.endswith(" --run r --resume\n")


def test_a_signal_in_a_command_that_keeps_no_run_names_none(monkeypatch, capsys):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("holdfast.verbs.exhibition.exhibition", stopped)
    assert run(["demo", "--gallery"]) == 130
    assert capsys.readouterr().err.endswith("holdfast: stopped by SIGINT; start it again\n")


def test_a_configuration_in_the_current_folder_is_suggested(capsys):
    assert run(["init", "-q"]) == 0
    for command in ("assess", "doctor"):
        assert run([command]) == 2
        assert f"try holdfast {command} -c holdfast.yaml (a file in this folder)" in capsys.readouterr().err
    Path("holdfast.yaml").unlink()
    assert run(["assess"]) == 2
    assert "try holdfast assess mnist-cnn mnist-mini" in capsys.readouterr().err
    assert run(["audit", "membership", "mnist-cnn"]) == 2
    assert "audit membership mnist-cnn mnist-mini --references 16" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_while_reports_are_written_states_how_to_resume(name, code, monkeypatch, capsys):
    def told(*_, **__):
        os.kill(os.getpid(), getattr(signal, name))
        time.sleep(60)

    with monkeypatch.context() as patched:
        patched.setattr(running, "tell", told)
        assert run([*ASSESS, "--no-doubts", "--run", "r"]) == code
    assert capsys.readouterr().err.endswith(" --run r --resume\n")
    assert run(["report", "r"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_after_the_last_word_leaves_the_exit_code_alone(name):
    words = with_model(
        "m.py:late", "--model-args", f"by={name}", "--no-doubts", "--gate", "clean_accuracy >= 1"
    )
    ended = subprocess.run(
        [sys.executable, "-m", "holdfast", *words], check=False, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full to write to")
def test_a_full_disk_behind_stdout_is_no_internal_error():
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "holdfast", "attacks"],
            check=False,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert ended.returncode == 3
    assert "No space left" in ended.stderr


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no folder here that refuses root")
def test_a_folder_that_takes_no_file_is_found_before_anything_runs(capsys):
    assert run(["demo", "-o", "/proc/here"]) == 3
    assert "no file can be created in /proc" in capsys.readouterr().err
