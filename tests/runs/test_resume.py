"""Whatever ends a run, the next process ends it with the same bytes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from disk import failing
from holdfast.attacks import PGD
from holdfast.core.constraints import Linf
from holdfast.core.errors import Interrupted, TargetError, UsageError
from holdfast.core.threat import ThreatModel
from holdfast.runs.assess.assess import assess
from holdfast.runs.engine.identity import repeatable, way_out
from holdfast.runs.harness.stage import Member
from holdfast.runs.store.verify import verify
from runs import fakes
from runs.fakes import FAST, THOROUGH, data, network, settled, subject

order = partial(fakes.order, shard_size=15)
"""An order of three shards, so that a run can be stopped between any two of them."""

HERE = Path(__file__).resolve().parent


def killed(tmp_path, *arguments):
    paths = os.pathsep.join(str(path) for path in (HERE.parents[1] / "src", HERE.parent))
    done = subprocess.run(
        [sys.executable, str(HERE / "killed.py"), str(tmp_path), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")


@pytest.mark.slow
@forks
def test_three_kills_change_no_byte(tmp_path):
    assert killed(tmp_path, "random", 1, 3) == {"hits": 3}


@forks
@pytest.mark.slow
def test_twenty_kills_change_no_byte(tmp_path):
    assert killed(tmp_path, "random", 2, 20) == {"hits": 20}


@forks
@pytest.mark.slow
def test_a_kill_at_any_call_to_the_disk_changes_no_byte(tmp_path):
    assert killed(tmp_path, "calls", 1)["calls"] > 40


@forks
@pytest.mark.slow
def test_a_hardening_that_is_killed_at_a_call_to_the_disk_resumes_to_the_same_bytes(tmp_path):
    assert killed(tmp_path, "hardening", 13)["calls"] > 100


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assess(subject(), data(), order(), run=run)
    return run


@pytest.mark.parametrize("step", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_a_full_disk_at_any_write_loses_nothing(tmp_path, monkeypatch, whole, step):
    with monkeypatch.context() as patch:
        calls = failing(patch, -1, ("write", "fsync"))
        assess(subject(), data(), order(), run=tmp_path / "counted")
        n = next(calls) - 1
    assert n > 40
    for at in range(1, n + 1, step):
        run = tmp_path / f"full-{at}"
        with monkeypatch.context() as patch:
            failing(patch, at, ("write", "fsync"))
            with pytest.raises(TargetError, match="the disk is full.*could not be written.*resume=True"):
                assess(subject(), data(), order(), run=run)
        assess(subject(), data(), order(), run=run, resume=True)
        assert settled(run) == settled(whole), at
        shutil.rmtree(run)


def test_a_finished_run_is_reported_again_without_measuring(whole, monkeypatch):
    def refused(*_, **__):
        raise AssertionError("measured again")

    first = assess(subject(), data(), order(), run=whole, resume=True)
    for name in ("measuring.ShardMeasure.__call__", "measuring.run_probes"):
        monkeypatch.setattr(f"holdfast.runs.assess.{name}", refused)
    before = settled(whole)
    again = assess(subject(), data(), order(), run=whole, resume=True)
    assert again.exit_code == first.exit_code
    assert again.gates == first.gates
    assert settled(whole) == before


def test_a_finished_run_may_be_judged_by_other_gates(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "copy")
    asked = order(gates=("robust_accuracy >= 0.99",))
    assert assess(subject(), data(), asked, run=run, resume=True).exit_code == 1
    assert assess(subject(), data(), order(), run=run, resume=True).exit_code != 1
    assert verify(run).complete


@pytest.mark.parametrize("made", [False, True])
def test_resuming_nothing_starts_it(tmp_path, whole, made):
    run = tmp_path / "run"
    if made:
        run.mkdir()
    assess(subject(), data(), order(), run=run, resume=True)
    assert settled(run) == settled(whole)


@pytest.mark.parametrize(
    "what, changes",
    [
        ("another configuration", {"order": order(seed=4)}),
        ("another configuration", {"order": order(FAST)}),
        ("another configuration", {"order": order(batch_size=7)}),
        ("other data", {"data": data(seed=2)}),
        ("another model", {"subject": subject(digest="b" * 64)}),
    ],
)
def test_a_run_of_another_kind_is_refused_by_name(whole, what, changes):
    asked = {"subject": subject(), "data": data(), "order": order()} | changes
    with pytest.raises(UsageError, match=f"a run with {what}[ ,]"):
        assess(asked["subject"], asked["data"], asked["order"], run=whole, resume=True)


def test_the_refusal_shows_what_differs(whole):
    with pytest.raises(UsageError, match=r"another configuration \(seed: 3 → 4\)"):
        assess(subject(), data(), order(seed=4), run=whole, resume=True)


@pytest.mark.parametrize(
    "asked, said",
    [
        (order(threat=ThreatModel(Linf(0.08))), "(threat: linf:0.06 → linf:0.08)"),
        (
            order(threat=ThreatModel(Linf(0.06), goal=1, queries=9), gates=()),
            "(threat: linf:0.06 → linf:0.06,goal=targeted:1,queries=9)",
        ),
        (order(FAST), "(attacks: PGD, PGD-again → PGD)"),
        (order(FAST, Member("PGD-again", PGD(steps=7, restarts=2))), "(PGD-again.steps: 6 → 7)"),
        (order(suite="other@1", attacked=False), "(suite: fake@1 → other@1; fixed pass: PGD-40 → none)"),
        (order(batch_size=7, full=True), "(batch_size: none → 7; full: false → true)"),
    ],
)
def test_the_refusal_names_each_setting_in_the_notation_of_the_user(whole, asked, said):
    with pytest.raises(UsageError, match=re.escape(f"another configuration {said}")):
        assess(subject(), data(), asked, run=whole, resume=True)


def test_other_code_is_refused(whole, monkeypatch):
    monkeypatch.setattr("holdfast.runs.documents.run_manifest.code_digest", lambda: "c" * 64)
    with pytest.raises(UsageError, match="a run with other code"):
        assess(subject(), data(), order(), run=whole, resume=True)


def test_a_used_folder_is_refused(whole, tmp_path):
    with pytest.raises(UsageError, match="contains a run already; give resume=True"):
        assess(subject(), data(), order(), run=whole)
    (tmp_path / "notes.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(UsageError, match=r"not a run folder \(it contains 'notes.txt'\)"):
            assess(subject(), data(), order(), run=tmp_path, resume=resume)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_folder_that_cannot_be_created_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        TargetError, match=r"file/run.*a file is in its path; give run=DIR for another folder"
    ):
        assess(subject(), data(), order(), run=tmp_path / "file" / "run")


@pytest.mark.slow
def test_the_times_and_the_lease_may_be_deleted_or_damaged(tmp_path, whole):
    for name, content in (("deleted", None), ("damaged", b'{"stage":7}\n[' * 500)):
        run = tmp_path / name
        stop_at(run, "2-pgd-again")
        (run / "times.jsonl").unlink()
        if content is not None:
            (run / "times.jsonl").write_bytes(content)
            (run / "lease.json").write_bytes(content)
        assess(subject(), data(), order(), run=run, resume=True)
        assert settled(run) == settled(whole)


def test_a_shard_that_is_not_whole_is_measured_again(tmp_path, whole):
    run = tmp_path / "run"
    stop_at(run, "2-pgd-again", shard=2)
    (shard,) = (run / "2-pgd-again").glob("00001*")
    shard.write_bytes(shard.read_bytes()[:-3])
    assess(subject(), data(), order(), run=run, resume=True)
    assert settled(run) == settled(whole)


def test_time_is_counted_over_all_attempts(tmp_path):
    run = tmp_path / "run"
    stop_at(run, "2-pgd-again")
    first = spent(run)["1-pgd"]
    result = assess(subject(), data(), order(), run=run, resume=True)
    assert result.attacks[0].cost.cpu_s == pytest.approx(first.cpu_s)
    assert spent(run)["2-pgd-again"].attempts == 3
    assert spent(run)["clean"].attempts == 3


def test_every_attempt_at_a_shard_is_counted(tmp_path):
    run = tmp_path / "run"
    stop_at(run, "2-pgd-again", shard=1)
    assess(subject(), data(), order(), run=run, resume=True)
    assert spent(run)["2-pgd-again"].attempts == 4  # three shards, the second of them twice


def spent(run):
    from holdfast.runs.store.leases import spent_in

    return spent_in(run)


class Stop(Exception):
    pass


def stop_at(run, stage, shard=0, signal_number=None):
    """Run until a stage has begun, and that many of its shards are done."""

    def progress(step):
        if step.stage == stage and step.done >= 15 * shard + bool(shard):
            if signal_number is None:
                raise Stop
            os.kill(os.getpid(), signal_number)

    with pytest.raises(Stop if signal_number is None else Interrupted) as caught:
        assess(subject(), data(), order(), run=run, progress=progress)
    return caught.value


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_run_and_states_how_to_resume(tmp_path, whole, number):
    run, handlers = tmp_path / "run", [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    error = stop_at(run, "2-pgd-again", signal_number=number)
    assert error.signal_number == number
    assert f"run='{run}', resume=True" in str(error)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assess(subject(), data(), order(), run=run, resume=True)
    assert settled(run) == settled(whole)


def test_the_way_to_go_on_is_the_command_that_was_given(tmp_path):
    def progress(step):
        os.kill(os.getpid(), signal.SIGINT)

    asked = replace(order(), command="holdfast assess a.onnx 'my data' --run x --resume")
    with pytest.raises(
        Interrupted, match=rf"holdfast assess a.onnx 'my data' --run {tmp_path}/run --resume$"
    ):
        assess(subject(), data(), asked, run=tmp_path / "run", progress=progress)


def test_the_folder_of_a_run_is_no_part_of_its_command():
    assert repeatable("holdfast assess m d --run r --resume -n 5") == "holdfast assess m d -n 5"
    assert repeatable("holdfast assess m d --run=r") == "holdfast assess m d"
    assert repeatable("holdfast harden m d --log csv:a -n 5 --log=csv:b") == "holdfast harden m d -n 5"
    assert "--log csv:a --run r --resume" in way_out("holdfast harden m d --log csv:a", Path("r"))


def signalled_in_a_write(*numbers):
    """What a write came to, in which those signals arrived one after the other."""
    from holdfast.runs.engine.progress import stoppable

    done = []
    with pytest.raises(Interrupted) as caught:
        with_signals(stoppable, numbers, done)
    assert caught.value.signal_number == numbers[-1]
    return done


def with_signals(stoppable, numbers, done):
    with stoppable("") as stopper, stopper.finishing():
        for number in numbers:
            os.kill(os.getpid(), number)
            done.append(number)


def test_a_signal_waits_for_a_write_and_a_second_one_does_not():
    assert signalled_in_a_write(signal.SIGTERM) == [signal.SIGTERM]
    assert signalled_in_a_write(signal.SIGINT, signal.SIGTERM) == [signal.SIGINT]


def test_a_second_process_is_refused(tmp_path):
    run, seen = tmp_path / "run", []

    def progress(step):
        if step.stage == "1-pgd" and not seen:
            with pytest.raises(
                UsageError, match=rf"is in use by process {os.getpid()} on .*; wait for it or stop it"
            ):
                assess(subject(), data(), order(), run=run, resume=True)
            seen.append(step)

    assess(subject(), data(), order(), run=run, progress=progress)
    assert seen


def test_a_run_outside_the_main_thread_leaves_signals_alone(tmp_path):
    results = []
    thread = threading.Thread(
        target=lambda: results.append(assess(subject(), data(), order(), run=tmp_path / "run"))
    )
    thread.start()
    thread.join()
    assert results[0].exit_code in {0, 4}


class Greedy(torch.nn.Module):
    """Runs out of memory above a batch size, a given number of times."""

    def __init__(self, most, times=10**9):
        super().__init__()
        self.net, self.most, self.times = network(), most, times

    def forward(self, x):
        if len(x) > self.most and self.times:
            self.times -= 1
            raise torch.OutOfMemoryError("out of memory")
        return self.net(x)


@pytest.mark.slow
def test_a_batch_is_halved_if_memory_runs_out(tmp_path):
    run = tmp_path / "run"
    result = assess(subject(Greedy(9)), data(), order(batch_size=16), run=run)
    plain = assess(subject(), data(), order(batch_size=16))
    assert torch.equal(result.evidence["success"], plain.evidence["success"])
    splits = json.loads((run / "splits.json").read_text())
    assert splits[0] == {"stage": "clean", "shard": 0, "at": 0, "size": 7}
    assert any("memory ran out" in note and "--batch-size" in note for note in result.evidence.notes)
    assert verify(run).complete


@pytest.mark.slow
def test_a_split_is_replayed_even_where_memory_would_do_today(tmp_path):
    """A machine that ran out of memory once, for one attempt, leaves the same bytes as one that was killed after it."""
    uninterrupted = tmp_path / "uninterrupted"
    assess(subject(Greedy(9, times=1)), data(), order(batch_size=16), run=uninterrupted)
    run = tmp_path / "run"

    def progress(step):
        if step.stage == "clean" and 0 < step.done < 15:
            raise Stop

    with pytest.raises(Stop):
        assess(subject(Greedy(9, times=1)), data(), order(batch_size=16), run=run, progress=progress)
    assess(subject(), data(), order(batch_size=16), run=run, resume=True)
    assert settled(run) == settled(uninterrupted)


def test_out_of_memory_with_a_batch_of_one_is_an_error(tmp_path):
    with pytest.raises(TargetError, match="memory ran out with .* at a time .*device"):
        assess(subject(Greedy(0)), data(), order(THOROUGH))
