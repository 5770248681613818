"""Whoever measures the shards, and however often one of them dies, the bytes are the same."""

import importlib
import inspect
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import holdfast
from holdfast.attacks import PGD
from holdfast.attacks.parts import ascent, losses
from holdfast.core.errors import TargetError, UsageError
from holdfast.runs.assess.assess import assess
from holdfast.runs.engine.processes import import_path
from holdfast.runs.harness.kinds.attack import SuiteAttack
from holdfast.runs.harness.measure import task_of
from holdfast.runs.harness.stage import Member, Stage
from holdfast.runs.store.verify import verify
from runs.fakes import data, network, order, settled, subject
from waiting import until


def asked(**changes):
    """The fakes' order; its functions are those that their modules have now, which watch shapes."""
    first = PGD(steps=3, loss=losses.cross_entropy, schedule=ascent.flat)
    again = PGD(steps=6, restarts=2, loss=losses.margin_loss, schedule=ascent.flat)
    return order(Member("PGD", first), Member("PGD-again", again), **changes)


def called_by(name):
    """Whether a function of that name is on the stack."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_name != name:
        frame = frame.f_back
    return frame is not None


class InWorkers(torch.nn.Module):
    """The fake network, which does something inside an attack, in a process other than the one it was made in."""

    def __init__(self, mark: Path, times: int = 1) -> None:
        super().__init__()
        self.net, self.mark, self.times, self.home = network(), mark, times, os.getpid()

    def forward(self, x):
        marks = list(self.mark.parent.glob(f"{self.mark.name}-*"))
        if os.getpid() != self.home and len(marks) < self.times and called_by("returned"):
            self.mark.with_name(f"{self.mark.name}-{os.getpid()}").touch()
            self.act()
        return self.net(x)


class Deadly(InWorkers):
    """Kills the process that asks."""

    def act(self):
        os.kill(os.getpid(), signal.SIGKILL)


class Broken(InWorkers):
    """Raises."""

    def act(self):
        raise ValueError("no such thing")


class Greedy(InWorkers):
    """Runs out of memory in the middle of an attack."""

    def act(self):
        raise torch.OutOfMemoryError("out of memory")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of a run without worker processes, and its result."""
    run = tmp_path_factory.mktemp("alone") / "run"
    return run, assess(subject(), data(), asked(doubts="all"), run=run)


@pytest.fixture(scope="module")
def one(alone):
    """The folder of a run without worker processes."""
    return alone[0]


@pytest.mark.slow
def test_any_number_of_workers_leaves_the_same_bytes(alone, tmp_path):
    result = assess(subject(), data(), asked(doubts="all", workers=2), run=tmp_path / "run")
    run, expected = alone
    assert settled(tmp_path / "run") == settled(run)
    for name, values in expected.evidence.columns.items():
        assert torch.equal(values, result.evidence[name]), name
    assert result.cost.queries == expected.cost.queries
    assert all(record.cost.cpu_s > 0 and record.cost.wall_s > 0 for record in result.attacks)


@pytest.mark.slow
def test_every_worker_makes_the_surrogates_ready(tmp_path):
    seconds = (subject(network(1), "c" * 64),)
    for workers in (None, 1):
        wanted = replace(asked(workers=workers), surrogates=seconds)
        result = assess(subject(), data(), wanted, run=tmp_path / str(workers))
        assert "transfer_success" in result.metrics
    assert settled(tmp_path / "None") == settled(tmp_path / "1")


@pytest.mark.slow
def test_without_a_folder_nothing_is_left(started_copies, monkeypatch, temporary_files, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    result = assess(subject(), data(), asked(workers=1))
    assert result.folder is None
    assert "folder" not in result.about
    assert torch.equal(result.evidence["success"], assess(subject(), data(), asked()).evidence["success"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_worker_that_is_killed_is_replaced(one, tmp_path):
    run = tmp_path / "run"
    assess(subject(Deadly(tmp_path / "killed")), data(), asked(doubts="all", workers=1), run=run)
    assert list(tmp_path.glob("killed-*"))
    assert settled(run) == settled(one)


@pytest.mark.slow
def test_a_shard_that_kills_every_worker_ends_the_run_with_the_way_out(tmp_path):
    deadly = subject(Deadly(tmp_path / "killed", times=99))
    with pytest.raises(
        TargetError, match="a worker died 3 times on shard 0 of 1-pgd, .* status -9; .*smaller batches"
    ):
        assess(deadly, data(), asked(workers=1), run=tmp_path / "run")


@pytest.mark.slow
def test_an_error_of_a_worker_is_reported_by_the_run(tmp_path):
    with pytest.raises(TargetError, match="the model raised ValueError .*: no such thing"):
        assess(subject(Broken(tmp_path / "raised", times=99)), data(), asked(workers=1), run=tmp_path / "run")


@pytest.mark.slow
def test_a_split_in_a_worker_is_recorded(tmp_path):
    run = tmp_path / "run"
    result = assess(subject(Greedy(tmp_path / "spent")), data(), asked(workers=1), run=run)
    assert any("memory ran out" in note for note in result.evidence.notes)
    (split,) = json.loads((run / "splits.json").read_text())
    assert split["stage"] == "1-pgd"
    assert 0 < split["size"] < 20
    assert verify(run).complete


@pytest.mark.slow
def test_a_worker_imports_nothing_from_the_current_folder_but_what_a_script_there_does(
    started_copies, tmp_path, monkeypatch
):
    hostile = "from pathlib import Path\nPath('RAN').touch()\nraise ImportError\n"
    for name in ("torch.py", "random.py", "pickle.py", "holdfast.py", "sitecustomize.py"):
        (tmp_path / name).write_text(hostile)
    monkeypatch.chdir(tmp_path)
    for folder in (str(tmp_path), ""):
        monkeypatch.syspath_prepend(folder)
    assess(subject(), data(), asked(workers=1))
    assert not (tmp_path / "RAN").exists()
    assert not {"", str(tmp_path)} & set(import_path())
    (tmp_path / "nets_of_a_script.py").write_text("from torch.nn import Identity as Net\n")
    importlib.import_module("nets_of_a_script")
    assert import_path()[-1] == str(tmp_path)


def test_a_model_that_no_other_process_can_take_over_is_refused():
    class Local(torch.nn.Module):
        def forward(self, x):
            return x

    x, y = torch.rand(4, 3), torch.zeros(4, dtype=torch.int64)
    attack = PGD(steps=3, loss=losses.margin_loss, schedule=ascent.flat)
    with pytest.raises(
        UsageError,
        match="a worker process cannot receive the model.*Local.*file.py:factory; leave out workers",
    ):
        holdfast.assess(Local(), (x, y), "linf:0.1", [attack], workers=2)


@pytest.mark.slow
def test_an_expired_time_is_reported(tmp_path):
    result = assess(subject(), data(), asked(workers=1, time_budget_s=1e-9), run=tmp_path / "run")
    assert any("time ran out: PGD and PGD-again finished none" in note for note in result.evidence.notes)


@pytest.mark.slow
def test_a_changed_model_is_refused_by_the_worker(tmp_path):
    opening = partial(_another, data())
    with pytest.raises(TargetError, match="the model changed while a worker opened it"):
        assess(subject(), data(), asked(workers=1), opening=opening, run=tmp_path / "run")


def _another(examples):
    return subject(network(1), "b" * 64), examples, ()


@pytest.mark.slow
def test_a_run_that_was_killed_with_its_workers_resumes_with_another_number(tmp_path):
    words = [
        "assess",
        "mnist-cnn-hardened",
        "mnist-mini",
        "-n",
        "600",
        "-t",
        "linf:0.2",
        "-s",
        "quick",
        "--no-doubts",
    ]
    command = [sys.executable, "-m", "holdfast", *words]
    run = tmp_path / "run"
    first = subprocess.Popen([*command, "--run", str(run), "--workers", "2", "-q"])
    until((run / "1-sprint").is_dir, seconds=120)
    first.kill()
    assert first.wait() == -signal.SIGKILL
    done = subprocess.run([*command, "--run", str(run), "--workers", "1", "--resume", "-q"], check=False)
    assert done.returncode == 0
    whole = tmp_path / "whole"
    assert (
        subprocess.run([*command, "--run", str(whole), "--workers", "1", "-q"], check=False).returncode == 0
    )
    assert settled(run) == settled(whole)


class Talkative(torch.nn.Module):
    """The fake network, opened by a factory whose child process reads standard input, and which prints."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def __setstate__(self, state) -> None:
        self.__dict__.update(state)
        print("printed while it was opened")
        os.write(1, b"written while it was opened\n")
        self.child = subprocess.run(["cat"], stdout=subprocess.DEVNULL, check=True, timeout=60).args

    def forward(self, x):
        return self.net(x)


@pytest.mark.slow
def test_pipes_of_a_worker_are_its_own(one, tmp_path, monkeypatch, new_processes):
    (tmp_path / "sitecustomize.py").write_text("print('printed by Python before the worker starts')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    assess(subject(Talkative()), data(), asked(doubts="all", workers=1), run=tmp_path / "run")
    assert settled(tmp_path / "run") == settled(one)


class Forking(InWorkers):
    """Starts a copy of the process, which keeps its pipes open for longer than it lives, and then kills it."""

    def act(self):
        if not os.fork():
            time.sleep(120)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_dead_worker_is_noticed_while_a_copy_of_it_lives(one, tmp_path):
    begun = time.monotonic()
    assess(
        subject(Forking(tmp_path / "forked")), data(), asked(doubts="all", workers=1), run=tmp_path / "run"
    )
    assert time.monotonic() - begun < 100
    assert settled(tmp_path / "run") == settled(one)


def test_a_task_is_not_larger_than_its_shard():
    big = {"id": torch.arange(100_000), "correct": torch.ones(100_000, dtype=torch.bool)}
    stage = Stage("1-pgd", SuiteAttack(), Member("PGD", PGD()))
    task = task_of(
        stage, 0, (0, 10), big["correct"], None, None, {"clean": {**big, "eligible": big["correct"]}}
    )
    assert len(pickle.dumps(task)) < 5_000
