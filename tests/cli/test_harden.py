"""Hardening from the command line, end to end: what a user types, and what is said, written and returned."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.rows.resume import killed
from cli.few import FEW, write_few
from holdfast.cli.app import run
from holdfast.verbs.harden import _open_options
from holdfast.verbs.settings import Harden

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a few training images."""
    monkeypatch.chdir(tmp_path)
    write_few(2000)
    return tmp_path


SHORT = ["--set", "recipe.training.epochs=2"]
JUDGED = ["-n", "40", "--suite", "quick", "--no-doubts"]
PGD = [
    "harden",
    "mnist-cnn",
    "mnist-mini",
    "--threat",
    "linf:0.1",
    "--recipe",
    "pgd",
    "--set",
    "recipe.steps=2",
    *SHORT,
    *FEW,
]


def assert_its_command_opens(card):
    """The command on the card of `hardened/` opens its model, typed as it is: it measures what the card states."""
    first, *words = card["opened_by"].split()
    assert first == "holdfast" and card["opened_by"] in Path("hardened/card.md").read_text()
    assert run([*words, *JUDGED, "-o", "again.json"]) == 0
    again = json.loads(Path("again.json").read_text())
    for name, estimate in card["after"]["metrics"].items():
        assert again["metrics"][name]["value"] == estimate["value"]


@pytest.mark.slow
def test_a_new_model_is_made_judged_and_opened_by_its_path_and_a_finished_run_is_reported_again(capsys):
    words = [*PGD, *JUDGED, "--run", "r", "-o", "hardened/"]
    assert run(words) == 0
    said = capsys.readouterr()
    assert "robust_accuracy" in said.err
    assert run(words) == 2
    assert "contains a run already" in capsys.readouterr().err
    assert run([*words, "--resume"]) == 0
    expected_time, *others = said.err.splitlines()
    epochs = [line for line in others if line.startswith("training pgd, epoch ")]
    assert expected_time.startswith("expected total time: the training, about ")
    assert [line.split(":")[0] for line in epochs] == [f"training pgd, epoch {n} of 2" for n in (1, 2)]
    assert "of 200 held-out examples, about" in epochs[0]
    resumed = [line for line in others if line not in epochs and not line.startswith("training by pgd")]
    assert capsys.readouterr().err.splitlines() == ["training by pgd is complete", *resumed]
    assert sorted(path.name for path in Path("hardened").iterdir()) == [
        "card.json",
        "card.md",
        "curve.svg",
        "model.safetensors",
    ]
    card = json.loads(Path("hardened/card.json").read_text())
    assert card["recipe"] == "pgd"
    assert card["settings"]["steps"] == 2
    told = Path("hardened/card.md").read_text()
    assert "Hardened against linf:0.1 with" in told and "Evaluated under linf:0.1." in told
    assert (
        card["before"]["metrics"]["robust_accuracy"]["value"]
        < card["after"]["metrics"]["robust_accuracy"]["value"]
    )
    assert_its_command_opens(card)


@pytest.mark.slow
def test_a_training_that_is_killed_repeatedly_resumes_to_the_same_weights(tmp_path):
    words = [*PGD, "--set", "recipe.training.epochs=8", *JUDGED]
    found = killed(words, tmp_path, 2)
    assert found["kills"] == 2  # each within a training that was not done
    assert found["tensors that differ"] == found["files of the new model that differ"] == 0


@pytest.mark.slow
def test_a_signal_during_an_assessment_states_how_to_resume_the_whole_run():
    words = [*PGD, "-n", "1000", "--suite", "standard", "--run", "r"]
    started = subprocess.Popen([sys.executable, "-m", "holdfast", *words], stderr=subprocess.PIPE, text=True)
    while started.poll() is None and not list(Path("r/before").glob("*.json")):
        time.sleep(0.05)
    time.sleep(0.5)
    started.send_signal(signal.SIGINT)
    _, said = started.communicate()
    assert started.returncode == 130
    assert said.strip().endswith("--run r --resume")
    assert "resume with: holdfast harden mnist-cnn mnist-mini" in said


@pytest.mark.parametrize(
    "words, said",
    [
        (["--recipe", "trade"], "there is no recipe 'trade'; did you mean 'trades'"),
        (["--set", "recipe.betas=3", "--recipe", "trades"], "has no setting 'betas'"),
        (["--set", "recipe.beta=-1", "--recipe", "trades"], "beta"),
        (["--budget", "0.01s"], "one update takes about"),
        (
            ["--set", "recipe.training.epochs=1"],
            "is 1, and the budget of recipe auto is 10min, which determines them",
        ),
        (
            ["--recipe", "pgd", "--budget", "1min", "--set", "recipe.training.epochs=1"],
            "and the budget is 1min, which",
        ),
        (["--budget", "soon"], "holdfast: budget is 'soon'; expected a duration"),
        (["--transform", "rotate=15"], "no such option '--transform'; it is an option of assess"),
        (["-o", "hardened"], "-o hardened has no suffix; write -o hardened/ for a folder"),
    ],
)
def test_impossible_values_are_refused(capsys, words, said):
    assert run(["harden", "mnist-cnn", "mnist-mini", "--threat", "linf:0.1", *JUDGED, *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_an_eps_beyond_the_box_is_refused(capsys):
    assert run(["harden", "mnist-cnn", "mnist-mini", "--threat", "linf:2", *JUDGED]) == 2
    assert "no two inputs inside the bounds are further apart" in capsys.readouterr().err

    assert run([*PGD[:4], "linf:2", *JUDGED, "--budget", "1min", "--run", "r"]) == 2
    assert not Path("r").exists()  # where the run that is meant goes
    words = ["--recipe", "multi-norm", "--set", "recipe.others=l2:900", "--run", "r"]
    assert run([*PGD[:4], "linf:0.1", *JUDGED, *words]) == 2
    assert "in l2" in capsys.readouterr().err


CODE = """
import torch

def make(width="8"):
    torch.manual_seed(0)
    layers = (torch.nn.Flatten(), torch.nn.Linear(784, int(width)), torch.nn.ReLU(), torch.nn.Linear(int(width), 10))
    return torch.nn.Sequential(*layers)
"""


@pytest.mark.slow
def test_the_command_on_the_card_opens_and_judges_what_was_made(capsys):
    Path("net.py").write_text(CODE)
    words = ["--threat", "linf:0.05", "--recipe", "standard", "--mean", "0.1307", "--std", "0.3081"]
    made = ["--model-args", "width=12", *SHORT, *JUDGED, "-o", "hardened/"]
    assert run(["harden", "net.py:make", "mnist-mini", *words, *made]) == 0
    card = json.loads(Path("hardened/card.json").read_text())
    assert card["after"]["metrics"]["clean_accuracy"]["value"] > 0.5
    assert_its_command_opens(card)


@pytest.mark.slow
def test_the_command_opens_what_was_made_of_a_classifier_that_a_factory_declares(capsys):
    declared = CODE.replace("return torch", "from holdfast import Bounds, Classifier\n    net = torch")
    Path("net.py").write_text(
        f"{declared}    return Classifier(net, bounds=Bounds(0, 1), mean=[0.5], std=[0.25])\n"
    )
    words = ["--threat", "linf:0.05", "--recipe", "standard", *SHORT, *JUDGED, "-o", "hardened/"]
    assert run(["harden", "net.py:make", "mnist-mini", *words]) == 0
    assert_its_command_opens(json.loads(Path("hardened/card.json").read_text()))


@pytest.mark.slow
def test_the_command_names_the_columns_of_a_table(capsys):
    Path("net.py").write_text("import torch\n\ndef make():\n    return torch.nn.Linear(2, 2)\n")
    draws = torch.rand(700, 2, generator=torch.Generator().manual_seed(0)).tolist()
    rows = [
        f"{k},{a:.6f},{b:.6f},{int(a > b)},{'test' if k < 100 else 'train'}" for k, (a, b) in enumerate(draws)
    ]
    Path("t.csv").write_text("\n".join(["id,a,b,y,split", *rows]) + "\n")
    words = ["--threat", "linf:0.01", "--recipe", "standard", *SHORT, *JUDGED, "-o", "hardened/"]
    assert run(["harden", "net.py:make", "t.csv", "--label", "y", "--drop", "id", *words]) == 0
    card = json.loads(Path("hardened/card.json").read_text())
    assert card["opened_by"].endswith("--label y --drop id")
    assert_its_command_opens(card)


@pytest.mark.parametrize(
    ("bounds", "flags"),
    [({"a": (0, 1), "b": (0, 2)}, ["--bounds", "@FILE"]), ((0, 2), []), (None, [])],
    ids=["of each feature", "of all", "none"],
)
def test_the_command_requires_bounds_if_the_file_has_none(bounds, flags):
    settings = Harden(
        model="net.py:make", data="t.csv", threat="linf:0.1", **({} if bounds is None else {"bounds": bounds})
    )
    words = _open_options(settings, SimpleNamespace(card={"architecture": "linear"})).split()
    assert words == ["--threat", "linf:0.1", *flags]


def test_labels_that_are_no_classes_are_refused_before_anything_is_timed(capsys):
    Path("net.py").write_text(CODE.replace("10)", "4)"))
    words = ["--threat", "linf:0.05", "--budget", "1min", *JUDGED]
    assert run(["harden", "net.py:make", "mnist-mini", *words]) == 3
    assert "range from 0 to 9, but the model has 4 classes" in capsys.readouterr().err


@pytest.mark.slow
def test_attacks_that_are_learned_learn_on_the_training_examples():
    learned = [
        "-n",
        "20",
        "--no-doubts",
        "--set",
        "attacks=[{use: Universal, steps: 2, fits: 1, examples: 100}]",
    ]
    assert run([*PGD, *learned, "--set", "recipe.training.epochs=1", "--run", "r"]) == 0
    assert run(["report", "r", "-o", "r.json"]) == 0
    (attack,) = json.loads(Path("r.json").read_text())["attacks"]
    assert attack["forwards"] > 20  # more than the judged examples ask for
