"""Runs on training examples that are read by index, in processes of their own.

`python streaming.py killed FOLDER` stops a run by Ctrl-C within an epoch, kills it in a later one, resumes it, and
compares it with a run in memory. `python streaming.py memory FOLDER MEGABYTES` measures by how much the memory of a run
grows. Both print JSON.
"""

import json
import os
import signal
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

import holdfast
from holdfast.core.errors import Interrupted
from holdfast.io.data.layouts import DeclaredData
from holdfast.io.data.streamed import open_by_index
from holdfast.recipes import Standard
from holdfast.recipes.training.fit import Training, _Loop
from holdfast.runs.harden.harden import harden
from runs import fakes
from runs.killed import left
from runs.test_hardening import trainable, training, wish

SIDE, PER_EPOCH = 96, 8


class Stored(Dataset):
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.data.x[index], self.data.y[index]


def run(folder, data):
    judge = fakes.order(fakes.FAST, shard_size=5, attacked=False, gates=())
    harden(trainable(), data, fakes.data(10), replace(wish(), assessment=judge), run=folder, resume=True)


def life(folder, *, at=None, number=None):
    """A process that reads with two workers, and is sent a signal at an update; with the message of its end."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.setsid()
        code = 1
        try:
            update, calls = _Loop._update, iter(range(10**6))

            def counted(*args):
                if next(calls) == at:
                    os.killpg(0, number)
                return update(*args)

            _Loop._update = counted
            loader = DataLoader(Stored(training()), batch_size=9, shuffle=True, num_workers=2)
            run(folder, open_by_index(loader, DeclaredData()))
            code = 0
        except Interrupted as error:
            os.write(write, str(error).split(";")[0].encode())
        except BaseException:  # noqa: BLE001 (the child must not go on as a copy of its parent)
            traceback.print_exc()
        os._exit(code)
    os.close(write)
    _, status = os.waitpid(pid, 0)
    with os.fdopen(read, "rb") as pipe:
        message = pipe.read().decode()
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return status, message, False
    return status, message, True


def killed(folder):
    _, stopped, remain = life(folder / "killed", at=PER_EPOCH + 5, number=signal.SIGINT)
    status, _, _ = life(folder / "killed", at=PER_EPOCH + 4, number=signal.SIGKILL)
    hits = bool(stopped) + os.WIFSIGNALED(status)
    ended, _, _ = life(folder / "killed")
    run(folder / "whole", training())
    equal = left(folder / "killed") == left(folder / "whole")
    return {"stopped": stopped, "remain": remain, "hits": hits, "equal": not ended and equal}


class Large(Dataset):
    """Images that are made from their numbers."""

    def __init__(self, megabytes):
        self.n = megabytes * 2**20 // (4 * SIDE**2)

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        x = np.random.default_rng(index).random((1, SIDE, SIDE), dtype=np.float32)
        return torch.from_numpy(x), index % 2


def peak_mb():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def memory(megabytes):
    net = torch.nn.Sequential(torch.nn.AvgPool2d(32), torch.nn.Flatten(), torch.nn.Linear(9, 2))
    test = tuple(next(iter(DataLoader(Large(5), batch_size=20))))
    recipe = Standard(training=Training(epochs=1, batch=32))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins at the present size
    before = peak_mb()
    settings = {"threat": "linf:0.01", "recipe": recipe, "suite": "quick", "doubts": False}
    holdfast.harden(net, test, fit=DataLoader(Large(megabytes), num_workers=2), **settings)
    return {"grown_mb": round(peak_mb() - before)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    how, folder, *numbers = sys.argv[1:]
    print(json.dumps(killed(Path(folder)) if how == "killed" else memory(int(numbers[0]))))
