"""`harden` with the recipes `generated`, `augment-policy` and `tune`: cards, stopped runs, files of images."""

import numpy as np
import pytest
import torch
from torch import nn

import holdfast
from holdfast.core.errors import Interrupted, UsageError
from holdfast.core.model import Classifier
from holdfast.recipes.generated import COMPARED

RECIPES = {
    "generated": {"use": "generated", "generator": 0.4, "confidence": 0.0, "steps": 1},
    "augment-policy": {"use": "augment-policy", "period": 2, "steps": 1},
    "tune": {"use": "tune", "candidates": 2, "steps": 1},
}
NOTES = {
    "generated": "generated images replaced",
    "augment-policy": "the policy augments by",
    "tune": "of 2 settings",
}


X = torch.rand(600, 1, 4, 4, generator=torch.Generator().manual_seed(5))
Y = (4 * X.flatten(1).argmax(1) // 16) % 4


def network():
    torch.manual_seed(1)
    return Classifier(nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))).eval()


def run(spec, **more):
    """A hardening of three epochs, which measures on other images of the same kind."""
    spec = {**spec, "training": {"epochs": 3, "batch": 64, "lr": 0.01}}
    options = {"suite": "quick", "doubts": False, "fit": (X[60:], Y[60:]), **more}
    return holdfast.harden(network(), (X[:60], Y[:60]), "linf:0.06", spec, **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_stopped_run_ends_with_the_same_bytes_and_the_card_has_what_was_chosen(tmp_path, name, set_limit):
    set_limit("holdfast.recipes.generated._ALIKE", 0.0)  # a generator of twenty updates
    whole = run(RECIPES[name], run=tmp_path / "whole")

    def stop(step):
        if step.stage.startswith("training") and step.done >= 2:
            raise Interrupted("stopped", signal_number=2)

    with pytest.raises(Interrupted):
        run(RECIPES[name], run=tmp_path / "stopped", progress=stop)
    resumed = run(RECIPES[name], run=tmp_path / "stopped", resume=True)
    assert resumed.weights == whole.weights
    assert resumed.card["follow_up"] == whole.card["follow_up"]
    starts = (NOTES[name], "up to the chosen checkpoint")
    assert any(note.startswith(starts) for note in whole.card["notes"])
    assert holdfast.verify(tmp_path / "whole").complete


def test_a_file_of_generated_images_identifies_a_run_and_may_not_have_test_images(tmp_path):
    path = tmp_path / "generated.npz"
    spec = {"use": "generated", "samples": str(path), "steps": 1}

    def write(x, y):
        np.savez(path, x=x.numpy(), y=y.numpy())

    write(X.flip(2), Y)
    first = run(spec, run=tmp_path / "first")
    assert first.card["follow_up"]["copies"]["generated"] == COMPARED
    write(X[1:].flip(2), Y[1:])
    with pytest.raises(UsageError, match="data"):
        run(spec, run=tmp_path / "first", resume=True)
    write(X[30:], Y[30:])
    with pytest.raises(UsageError, match="30 of 570 generated examples are also test examples") as refused:
        run(spec)
    assert refused.value.remedies[0].argument == "recipe.samples"
