"""Two small finished runs, each made once in a process, which tests copy and change."""

import atexit
import shutil
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from holdfast.attacks import PGD
from holdfast.core.batch import Batch
from holdfast.core.constraints import Linf
from holdfast.core.threat import ThreatModel
from holdfast.recipes import PGDTraining
from holdfast.recipes.training.fit import Training
from holdfast.runs.assess.assess import assess
from holdfast.runs.assess.request import HardenRequest
from holdfast.runs.harden.candidates import Candidate
from holdfast.runs.harden.harden import harden
from holdfast.runs.harness.stage import Member
from runs import fakes

WEAK = Member("PGD", PGD(steps=1, reach=0.1))


@cache
def _folder() -> Path:
    folder = tempfile.mkdtemp(prefix="holdfast-test-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@cache
def assessment() -> Path:
    """Return the folder of a finished assessment whose passes outside the suite broke further examples."""
    run = _folder() / "assessment"
    assess(fakes.subject(), fakes.data(), fakes.order(WEAK, doubts="all"), run=run)
    return run


@cache
def hardening() -> Path:
    """Return the folder of a finished hardening of three epochs."""
    return hardened(_folder() / "hardening")


def hardened(run: Path, *, shown: bool = True) -> Path:
    """Harden a network in three epochs, store examples for the reports if `shown`, and return the folder of the run."""
    x = torch.rand(600, fakes.FEATURES, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    recipe = PGDTraining(steps=2, training=Training(epochs=3, batch=64, lr=0.01))
    candidates = (Candidate("PGDTraining", recipe, {}),)
    judge = fakes.order(fakes.FAST, gates=(), shard_size=fakes.N)
    judge = replace(judge, plan=replace(judge.plan, shown=shown))
    y = fakes.network()(x).argmax(1)
    y[:12] = torch.arange(12) % fakes.CLASSES  # a few of each class
    batch = Batch(x, y, torch.arange(len(x)))
    model = fakes.subject(fakes.network(1).requires_grad_(), digest="1" * 64)
    harden(
        model, batch, fakes.data(), HardenRequest("pgd", candidates, ThreatModel(Linf(0.06)), judge), run=run
    )
    return run
