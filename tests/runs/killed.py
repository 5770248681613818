"""Runs that are killed: forked from a process that has imported everything, so that a life costs milliseconds.

`python killed.py FOLDER random SEED KILLS` kills at random moments; `python killed.py FOLDER calls STEP` kills at every
STEP-th call that changes the disk, and `python killed.py FOLDER hardening STEP` does so with a hardening. Prints JSON:
how many kills met a living process, or how many calls there are.
"""

import itertools
import json
import os
import random
import signal
import sys
import time
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from holdfast.recipes import SingleStep
from holdfast.runs.assess.assess import assess
from holdfast.runs.engine.identity import code_digest
from holdfast.runs.harden.harden import harden
from holdfast.runs.harden.hardened import MODEL
from holdfast.statistics.intervals import clopper_pearson
from runs.fakes import FAST, data, order, settled, subject
from runs.test_hardening import HOW, trainable, training, wish

CHANGING = ("write", "fsync", "replace", "unlink", "mkdir", "rmdir", "truncate")


def assessment(run):
    assess(subject(), data(), order(doubts="all"), run=run, resume=True)


def small(run):
    assess(subject(), data(10), order(FAST, shard_size=5, attacked=False), run=run, resume=True)


def hardening(run):
    recipe = SingleStep(training=replace(HOW, epochs=2, averaging="swa"))
    judge = order(FAST, shard_size=5, attacked=False, gates=())
    harden(trainable(), training(), data(10), replace(wish(recipe), assessment=judge), run=run, resume=True)


def life(work, run, *, die_at=None):
    """The process of one attempt; `die_at` is the call to the disk at which it kills itself."""
    pid = os.fork()
    if pid:
        return pid
    try:
        calls = itertools.count(1)

        def counted(real):
            def call(*args, **kwargs):
                if next(calls) == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            return call

        os.fsync = lambda handle: None  # a kill leaves what was written; only a power cut would not
        for name in CHANGING:
            setattr(os, name, counted(getattr(os, name)))
        work(run)
        (run.parent / "calls").write_text(str(next(calls) - 1))
        os._exit(0)
    except BaseException:  # noqa: BLE001 (the child must not go on as a copy of its parent)
        traceback.print_exc()
        os._exit(1)


def ended(pid):
    return os.waitpid(pid, 0)[1]


def killed_at_random(folder, seed, kills):
    rng, hits = random.Random(seed), 0
    begun = time.perf_counter()
    assert ended(life(assessment, folder / "whole")) == 0
    longest = 0.5 * (time.perf_counter() - begun)
    run = folder / "killed"
    for _ in range(10 * kills):
        if hits == kills:
            break
        pid = life(assessment, run)
        time.sleep(rng.uniform(0, longest))
        os.kill(pid, signal.SIGKILL)
        hit = os.WIFSIGNALED(ended(pid))
        hits += hit
        if not hit:  # it had ended: the first life was slower than this one
            longest *= 0.9
        if (run / "verdict.json").exists():  # finished: begin the next one
            assert ended(life(assessment, run)) == 0
            assert settled(run) == settled(folder / "whole")
            run = folder / f"killed-{hits}"
    assert ended(life(assessment, run)) == 0
    assert settled(run) == settled(folder / "whole")
    return {"hits": hits}


def killed_at_calls(folder, step, work=small):
    assert ended(life(work, folder / "whole")) == 0
    calls, whole = int((folder / "calls").read_text()), left(folder / "whole")
    for die_at in range(1, calls + 1, step):
        run = folder / f"killed-{die_at}"
        assert os.WTERMSIG(ended(life(work, run, die_at=die_at))) == signal.SIGKILL
        assert ended(life(work, run)) == 0, die_at
        assert left(run) == whole, die_at
    return {"calls": calls}


def left(run):
    """Bytes of all that must be equal between equal runs; of a hardening with those of the two that it holds."""
    if not (run / "after").exists():
        return settled(run)
    kept = {name: (run / name).read_bytes() for name in ("run.json", "card.json", "chain.jsonl", MODEL)}
    return kept | {side: settled(run / side) for side in ("before", "after")}


if __name__ == "__main__":
    torch.set_num_threads(1)
    code_digest()  # once for all lives, for the code may be edited meanwhile
    clopper_pearson(1, 2)  # brings scipy
    folder, how, *numbers = sys.argv[1:]
    experiment = {
        "random": killed_at_random,
        "calls": killed_at_calls,
        "hardening": partial(killed_at_calls, work=hardening),
    }[how]
    print(json.dumps(experiment(Path(folder), *map(int, numbers))))
