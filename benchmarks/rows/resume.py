"""Hardenings that are killed while they train, and go on: to the weights of one that was not, to the last bit."""

import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch

from benchmarks.record import Cells, Claim, Outcome
from holdfast.runs.harden.checkpoints import LAST, Point, saved
from holdfast.runs.harden.hardened import MODEL
from holdfast.runs.store.files import CHECKPOINTS

WHAT = "hardenings that are killed ten times while they train, on a CPU: weights that differ from an uninterrupted run"
KILLS, EPOCHS, SEED = 10, 24, 0
COMMAND = "harden mnist-cnn mnist-mini --threat linf:0.1 --device cpu -n 40 --suite quick --no-doubts"
RECIPES = {
    "fgsm-rs, its guard on": "--recipe fgsm-rs",
    "atta, whose attacks are kept": "--recipe atta",
    "trades, weights perturbed, plain mean of the last": "--recipe trades --set recipe.steps=2 "
    "--set recipe.training.awp=0.005 --set recipe.training.averaging=swa",
    "pgd, sgd, images moved": "--recipe pgd --set recipe.steps=2 --set recipe.training.optimizer=sgd "
    "--set recipe.training.lr=0.05 --set recipe.training.augment=shift",
}


def measured() -> Outcome:
    table: list[Cells] = []
    claims: list[Claim] = []
    for name, recipe in RECIPES.items():
        words = [*COMMAND.split(), *recipe.split(), "--set", f"recipe.training.epochs={EPOCHS}"]
        with tempfile.TemporaryDirectory(prefix="holdfast-") as place:
            found = killed(words, Path(place), KILLS)
        table.append({"recipe": name, **found})
        claims += [
            Claim(f"{name}: kills that met a training >= {KILLS}", found["kills"], KILLS, least=True),
            Claim(f"{name}: tensors that differ <= 0", found["tensors that differ"], 0),
            Claim(f"{name}: new models that differ <= 0", found["files of the new model that differ"], 0),
        ]
    config: Cells = {"command": f"holdfast {COMMAND}", "recipes": RECIPES, "epochs": EPOCHS, "seed": SEED}
    return Outcome(table, claims, config)


def killed(words: Sequence[str], place: Path, kills: int) -> Cells:
    """What is left of a command that is killed so often, each time in an epoch after one that it has finished."""
    command = [sys.executable, "-m", "holdfast", *words, "--run"]
    whole, run = place / "whole", place / "killed"
    subprocess.run([*command, str(whole)], check=True, capture_output=True)
    rng = random.Random(SEED)
    hit: list[int] = []
    begun = time.monotonic()
    for _ in range(kills):
        before = _written(run)
        life = subprocess.Popen([*command, str(run), "--resume"], stderr=subprocess.DEVNULL)
        while life.poll() is None and _written(run) == before:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, _curve(run)[-1].wall_s))
        life.kill()
        if life.wait() == -signal.SIGKILL:
            hit.append(len(_curve(run)))
    subprocess.run([*command, str(run), "--resume"], check=True, capture_output=True)
    one, other = (safetensors.torch.load_file(each / CHECKPOINTS / LAST) for each in (whole, run))
    differ = one.keys() ^ other.keys() | {
        name for name in one.keys() & other.keys() if not torch.equal(one[name], other[name])
    }
    same = (whole / MODEL).read_bytes() == (run / MODEL).read_bytes()
    return {
        "kills": sum(epochs < len(_curve(whole)) for epochs in hit),
        "epochs done by then": ", ".join(map(str, hit)),
        "of": len(_curve(whole)),
        "tensors": len(one),
        "tensors that differ": len(differ),
        "files of the new model that differ": int(not same),
        "wall s": round(time.monotonic() - begun, 1),
    }


def _written(run: Path) -> int:
    """When the last checkpoint was; 0 before the first."""
    path = run / CHECKPOINTS / LAST
    return path.stat().st_mtime_ns if path.exists() else 0


def _curve(run: Path) -> tuple[Point, ...]:
    found = saved(run / CHECKPOINTS, LAST)
    return () if found is None else found.curve
