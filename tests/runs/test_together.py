"""Several processes that train one network: the weights of one process, and what only one of them does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from holdfast.runs.harden.checkpoints import LAST, saved
from holdfast.runs.store.files import CHECKPOINTS

pytestmark = pytest.mark.slow  # each test starts torch three times or more

SCRIPT = """
import os, sys, time
import torch, holdfast
from holdfast.recipes.training.fit import Training
from holdfast.recipes import ATTA, IKL, PGDTraining, SingleStep, TRADES, VAT

def examples(n, seed):
    x = torch.rand(n, 1, 6, 6, generator=torch.Generator().manual_seed(seed)).to(exact)
    return x, (x[:, 0, :3].sum((1, 2)) > x[:, 0, 3:].sum((1, 2))).long()

def make():
    torch.manual_seed(int(os.environ.get("RANK", "0")))  # that of the first process counts
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(64, 2))
    return net.to(exact)

def how(**more):
    return Training(epochs=3, batch=25, **more)

recipes = {
    "mixed": PGDTraining(steps=2, training=how(awp=0.01, cutmix=0.5)),
    "trades": TRADES(steps=2, training=how(averaging="swa", augment="shift")),
    "guarded": SingleStep(training=how(averaging="none")),
    "means": IKL(steps=2, training=how()),
    "lost": PGDTraining(steps=1, training=how(lr=1e30, optimizer="sgd")),
    "kept": ATTA(training=how()),
    "one": PGDTraining(training=Training(epochs=1, batch=1)),
    "budget": PGDTraining(steps=1, training=Training(batch=25)),  # whose epochs the plan sets
    "unknown": VAT(training=how()),
    "other": PGDTraining(steps=1, training=how()),
    "stopped": PGDTraining(steps=2, training=how()),
    "exact": PGDTraining(steps=2, training=Training(epochs=20, batch=700, averaging="none")),  # one update an epoch
}
folder, *names = sys.argv[1:]
rank = os.environ.get("RANK", "0")
if os.environ.get("STOP") and rank == "0":  # as a first process that is killed within the second epoch
    from holdfast.runs.harden import checkpoints
    save_within = checkpoints.save_within
    def killed(place, checkpoint, *rest):
        save_within(place, checkpoint, *rest)
        if checkpoint.epoch:
            os._exit(9)
    checkpoints.save_within = killed
if names == ["budget"] and rank == "1":  # whose clock says another thing about every trial
    from holdfast.runs.harden import candidates, pace
    class Slow:
        perf_counter = staticmethod(lambda: 1e4 * time.perf_counter())
    pace.time = candidates.time = Slow
for name in names:
    exact = torch.float64 if name == "exact" else torch.float32
    more = {"budget": "20s"} if name == "budget" else {}
    if name == "stopped":
        more["checkpoint_every"] = 10
    if name == "unknown":
        more["unlabelled"] = examples(300, 3)[0]
    made = holdfast.harden(
        make(), examples(32, 1), "linf:0.05", recipes[name], fit=examples(700, int(rank) if name == "other" else 0),
        suite="quick", run=f"{folder}/{name}", resume=True, **more,
    )
    torch.save(dict(made.model.state_dict()), f"{folder}/{name}-{rank}.pt")
    with open(f"{folder}/{name}-{rank}.txt", "w") as measured:  # lines of two processes on one stdout may mix
        measured.write(str(made.after.metrics["robust_accuracy"].value))
tasks = "/proc/self/task"  # a thread of the group that outlives it may abort the process as it ends
for task in os.listdir(tasks) if os.path.isdir(tasks) else ():
    try:
        thread = open(f"{tasks}/{task}/comm").read()
    except OSError:  # it has ended meanwhile
        continue
    assert "gloo" not in thread, thread
"""
TOGETHER = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def started(*words, cwd=None, **more):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **more}
    return subprocess.run(
        [str(word) for word in words],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        cwd=cwd,
    )


def ran(tmp_path, *names, together, **more):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    begin = TOGETHER if together else (sys.executable,)
    place = tmp_path / ("two" if together else "one")
    place.mkdir(exist_ok=True)
    return started(*begin, script, place, *names, **more), place


TRAINED = ("mixed", "trades", "guarded", "means")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folders of one process, and of two, that trained several networks one after another."""
    path = tmp_path_factory.mktemp("trained")
    names = (*TRAINED, "exact", "stopped")
    folders = []
    for together in (False, True):
        done, place = ran(path, *names, together=together)
        assert done.returncode == 0, done.stderr
        folders.append(place)
    return folders


@pytest.mark.parametrize("name", TRAINED)
def test_two_processes_train_the_weights_of_one(trained, name):
    alone, both = trained
    one, first, second = (
        torch.load(path) for path in (alone / f"{name}-0.pt", *sorted(both.glob(f"{name}-*.pt")))
    )
    for key, value in one.items():
        torch.testing.assert_close(first[key], value, atol=1e-4, rtol=1e-3)
        assert torch.equal(first[key], second[key])
    measured = [path.read_text() for path in sorted(both.glob(f"{name}-*.txt"))]
    assert len(measured) == 2
    assert measured[0] == measured[1]
    assert "2 processes" in json.loads((both / name / "run.json").read_text())["hardware"]


def test_two_processes_open_a_finished_run_again(trained):
    again, _ = ran(trained[1].parent, "trades", together=True)
    assert again.returncode == 0, again.stderr


def test_twenty_updates_in_float64_differ_in_the_order_of_sums_only(trained):
    alone, both = trained
    last = Path("exact", CHECKPOINTS, LAST)
    one, two = (safetensors.torch.load_file(place / last) for place in (alone, both))
    assert one["memory.0.step"] == two["memory.0.step"] == 20
    weights = [key for key in one if key.startswith("weights.")]
    assert len(weights) == 4
    for key in weights:
        assert one[key].dtype == torch.float64
        torch.testing.assert_close(two[key], one[key], atol=1e-8, rtol=0)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lost", "the loss is not finite"),
        ("kept", "2 processes share them"),
        ("one", "a batch of 1 is too small for 2 processes"),
        ("unknown", "2 processes share them"),
        ("other", "this process has other data than the first one"),
    ],
)
def test_settings_that_exclude_two_processes_are_refused(tmp_path, name, said):
    done, _ = ran(tmp_path, name, together=True)
    assert done.returncode != 0
    assert said in done.stderr


def measured_in(run):
    found = saved(run / CHECKPOINTS, LAST)
    return [(point.loss, point.accuracy, point.forwards) for point in found.curve]


def test_two_processes_go_on_to_the_weights_of_an_uninterrupted_training(trained, tmp_path):
    stopped, place = ran(tmp_path, "stopped", together=True, STOP="1")
    assert stopped.returncode != 0
    assert not list(place.glob("*.pt"))
    assert (place / "stopped" / "checkpoints" / "last.safetensors").is_file()
    on, _ = ran(tmp_path, "stopped", together=True)
    assert on.returncode == 0, on.stderr
    curve, uninterrupted = (measured_in(path / "stopped") for path in (place, trained[1]))
    assert curve == uninterrupted and len(curve) == 3
    one, *both = (torch.load(path) for path in (trained[0] / "stopped-0.pt", *sorted(place.glob("*.pt"))))
    for key, value in one.items():
        for other in both:
            torch.testing.assert_close(other[key], value, atol=1e-4, rtol=1e-3)


def test_two_processes_plan_alike(tmp_path):
    done, _ = ran(tmp_path, "budget", together=True)
    assert done.returncode == 0, done.stderr


def test_what_one_process_refuses_is_no_internal_error_of_the_other(tmp_path):
    words = ["harden", "mnist-cnn", "mnist-mini", "-t", "linf:5", "--recipe", "fgsm-rs", "--run", "run"]
    done = started(*TOGETHER, "-m", "--", "holdfast", *words, cwd=tmp_path)
    assert done.returncode != 0
    assert "no two inputs inside the bounds are further apart" in done.stderr
    assert "internal error" not in done.stderr


def test_the_command_line_trains_in_two_processes_of_which_one_writes_messages(tmp_path):
    asked = "harden mnist-cnn mnist-mini -t linf:0.1 --recipe fgsm-rs --suite quick -n 50 --run run -o made/"
    words = [*asked.split(), "-o", "report.json", "--set", "recipe.training.epochs=2"]
    done = started(*TOGETHER, "-m", "--", "holdfast", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Robust accuracy") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"run", "made", "report.json"}
    assert (tmp_path / "made" / "model.safetensors").is_file()
    again = started(*TOGETHER, "-m", "--", "holdfast", *words, "--resume", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("Robust accuracy") == 1
