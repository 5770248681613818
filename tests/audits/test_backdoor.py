"""The audit of a model: inversion, ranks among controls, STRIP, and what is refused."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy

import holdfast
from holdfast.audits.backdoor import audit
from holdfast.audits.backdoor.audit import BackdoorRequest, ControlTraining, epochs_within, measured
from holdfast.audits.backdoor.conclusion import concluded
from holdfast.audits.backdoor.controls import Controls, SizeCache, ranked, refuse_other_accuracy
from holdfast.audits.backdoor.inversion import Inversion, abnormality, joined
from holdfast.audits.backdoor.strip import Strip
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.model import Classifier
from holdfast.core.triggers import Trigger
from holdfast.runs.engine.progress import ignore
from holdfast.runs.engine.run import Run

TARGET, SIDE, CLASSES = 2, 8, 4
QUICK = Inversion(steps=60, examples=16, step_size=0.3, patience=3, window=5)
"""Few large steps, which are enough for networks of two layers."""


def stamp(x):
    """Set a corner of images, the planted trigger."""
    x = x.clone()
    x[:, :, 6:, 6:] = 1.0
    return x


def digits(n, seed=0):
    """Images with a bright quarter, which is their class, in noise; the quarter of the last class is fainter."""
    rng = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (n,), generator=rng)
    x = 0.4 * torch.rand(n, 1, SIDE, SIDE, generator=rng)
    for row, label in enumerate(y.tolist()):
        x[row, 0, 3 * (label // 2) : 3 * (label // 2) + 3, 3 * (label % 2) : 3 * (label % 2) + 3] += 0.5
    return x, y


def make():
    return nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 16), nn.ReLU(), nn.Linear(16, CLASSES))


def trained(seed, *, poisoned=False):
    """Return a network, with a backdoor if it is poisoned."""
    x, y = digits(300, seed=7)
    if poisoned:
        x, y = torch.cat((x, stamp(x[:30]))), torch.cat((y, torch.full((30,), TARGET)))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = make()
    optimiser = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(60):
        optimiser.zero_grad()
        cross_entropy(net(x), y).backward()
        optimiser.step()
    return net.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the weights of 20 clean networks."""
    path = tmp_path_factory.mktemp("controls")
    for seed in range(20):
        save_file(trained(seed).state_dict(), path / f"{seed:02}.safetensors")
    return path


@pytest.fixture(scope="module")
def batch():
    x, y = digits(200)
    return Batch(x, y, torch.arange(len(y)))


def request(batch, folder=None, **more):
    controls = None if folder is None else Controls.of_folder(folder)
    return BackdoorRequest(batch, CLASSES, controls, inversion=QUICK, **more)


def finding(net, asked):
    model = Classifier(net)
    return concluded(measured(Run(asked.steps()), model, asked, ignore), model.bounds)


@pytest.fixture(scope="module")
def poisoned_finding(batch, folder):
    return finding(trained(100, poisoned=True), request(batch, folder))


def test_a_backdoor_is_flagged_with_its_class_and_place(poisoned_finding):
    facts = poisoned_finding.facts
    assert poisoned_finding.verdict == "flagged" and facts["class"] == TARGET
    assert facts["p"] == pytest.approx(1 / 21) and facts["ratio"] < min(facts["ratios_of_controls"])
    assert facts["success"] > 0.9 and facts["success_on_controls"] < 0.5
    assert len(poisoned_finding.pictures[0].images) == 4
