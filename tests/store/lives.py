"""Pools whose processes are killed or meet: forked from one that has imported everything, so that a life costs little.

`python lives.py FOLDER` kills a life of a pool, and the beginning of one, at every call that changes the disk, a write
being cut in half; kills swaps at random moments; and lets processes ask for the same swap. Prints JSON.
"""

import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import torch

from holdfast.rotation.ledger import is_complete
from holdfast.rotation.pool import Pool

OWN = ("pool.json", "ledger.jsonl", "ledger.head", "ledger.lock", "sets")
CHANGING = ("write", "fsync", "replace", "unlink", "mkdir", "truncate", "chmod")


def weights(k):
    return {"w": torch.full((8,), float(k)), "b": torch.tensor([k])}


def begun(path, admitted):
    """A pool whose set 0 serves, and in which others wait."""
    pool = Pool.create(path, {"of": "a test"})
    for k in range(admitted + 1):
        pool.admit(pool.add(weights(k), {"k": k}))
    pool.swap()
    return pool


def life(work):
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    except BaseException:  # noqa: BLE001 (the child must not go on as a copy of its parent)
        traceback.print_exc()
        os._exit(1)


def dying(work, die_at, calls_file):
    """The work of a process that kills itself at a call to the disk."""
    calls = itertools.count(1)

    def counted(name, real):
        def call(*args, **kwargs):
            if next(calls) == die_at:
                if name == "write":
                    real(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    def run():
        for name in CHANGING:
            setattr(os, name, counted(name, getattr(os, name)))
        work()
        calls_file.write_text(str(next(calls) - 1))

    return run


def ended(pid):
    return os.waitpid(pid, 0)[1]


def day(path):
    """What one process does in its life; after a kill the next does the rest."""
    pool = Pool.open(path)
    ledger, base = pool.ledger, pool.ledger.terms[0].name
    if not any(member.deleted for member in ledger.members):
        bad = pool.add(weights(9), {"k": 9})
        if ledger.states[bad] == "candidate":
            pool.refuse(bad, "odd gradients")
        pool.delete(bad)
    new = pool.add(weights(2), {"k": 2}, bases=[base])
    if ledger.states[new] == "candidate":
        pool.admit(new, against=[base])
    pool.swap(epoch=1)
    if not ledger.terms[0].answers:
        pool.answered(1, {"ann": 5})
    if not ledger.exposed():
        pool.expose(base, "stolen")
    pool.keep("generator", weights(7), {})


def left(path):
    pool = Pool.open(path)
    told = [(term.name, term.epoch, term.answers) for term in pool.ledger.terms]
    return {
        "states": pool.ledger.states,
        "terms": told,
        "exposed": [exposure.name for exposure in pool.ledger.exposed()],
        "files": sorted(str(file.relative_to(path)) for file in path.rglob("*")),
    }


def holds(path, allowed):
    """Whoever opens the pool next finds the chain whole, an old or a new set serving, and no file that is none's."""
    pool = Pool.open(path)
    serving = pool.serving
    assert (serving.epoch, float(pool.weights(serving.name)["b"])) in allowed, serving
    files = {file.name for file in (path / "sets").iterdir()}
    assert files == {f"{member.name}.sealed" for member in pool.ledger.members if not member.deleted}
    assert {file.name for file in path.iterdir()} <= {*OWN, "generator.sealed"}
    return serving.epoch


def killed_at_calls(folder):
    begun(folder / "first", 1)
    calls_file = folder / "calls"

    def copy(name):
        return Path(shutil.copytree(folder / "first", folder / name))

    whole = copy("whole")
    assert ended(life(dying(lambda: day(whole), None, calls_file))) == 0
    calls, wanted, epochs = int(calls_file.read_text()), left(whole), set()
    for die_at in range(1, calls + 1):
        path = copy(f"killed-{die_at}")
        assert os.WTERMSIG(ended(life(dying(lambda p=path: day(p), die_at, calls_file)))) == signal.SIGKILL
        epochs.add(holds(path, {(1, 0.0), (2, 1.0)}))
        day(path)
        assert left(path) == wanted, die_at
        shutil.rmtree(path)
    return {"calls": calls, "epochs": sorted(epochs)}


def begun_at_calls(folder):
    calls_file = folder / "calls"
    assert ended(life(dying(lambda: begun(folder / "whole", 0), None, calls_file))) == 0
    calls = int(calls_file.read_text())
    for die_at in range(1, calls + 1):
        path = folder / f"killed-{die_at}"
        assert (
            os.WTERMSIG(ended(life(dying(lambda p=path: begun(p, 0), die_at, calls_file)))) == signal.SIGKILL
        )
        if not is_complete(path):
            begun(path, 0)
        pool = Pool.open(path)
        assert pool.add(weights(0), {}) in pool.ledger.states, die_at
    return {"calls": calls}


def swapping(path, told):
    """Adds, admits and swaps for ever; the set of epoch k is number k - 1."""
    pool = Pool.open(path)
    for k in itertools.count(pool.serving.epoch):
        name = pool.add(weights(k), {"k": k})
        if pool.ledger.states[name] == "candidate":
            pool.admit(name)
        os.write(told, b"%d\n" % pool.swap().epoch)
        pool.answered(k, {"ann": 1})


def killed_at_random(folder, seed, kills):
    rng, path, epoch = random.Random(seed), folder / "pool", 1
    begun(path, 0)
    for _ in range(kills):
        hears, told = os.pipe()
        pid = life(lambda to=told: swapping(path, to))
        os.close(told)
        with os.fdopen(hears) as file:
            first = file.readline()
            time.sleep(rng.uniform(0, 0.03))
            os.kill(pid, signal.SIGKILL)
            assert os.WIFSIGNALED(ended(pid))
            said = [int(line) for line in (first, *file)][-1]
        epoch = holds(path, {(k, k - 1.0) for k in (said, said + 1)})
    assert [term.epoch for term in Pool.open(path).ledger.terms] == list(range(1, epoch + 1))
    return {"epoch": epoch}


def together(folder, n):
    path = folder / "pool"
    begun(path, n)
    waits, go = os.pipe()

    def asked():
        pool = Pool.open(path)
        os.close(go)
        os.read(waits, 1)  # returns when the parent closes its end
        pool.swap(epoch=1)
        for k in range(100, 110):
            Pool.open(path).add(weights(k), {})

    pids = [life(asked) for _ in range(n)]
    os.close(go)
    assert [ended(pid) for pid in pids] == [0] * n
    holds(path, {(2, 1.0)})
    ledger = Pool.open(path).ledger
    return {"epoch": ledger.serving.epoch, "sets": len(ledger.states) - n - 1}


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.fsync = lambda handle: None  # a kill leaves what was written; only a power cut would not
    told = {}
    for name, experiment in {
        "calls": killed_at_calls,
        "begun": begun_at_calls,
        "random": partial(killed_at_random, seed=1, kills=20),
        "together": partial(together, n=6),
    }.items():
        folder = Path(sys.argv[1]) / name
        folder.mkdir()
        told[name] = experiment(folder)
    print(json.dumps(told))
