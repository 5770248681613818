"""Classes and groups without examples: what is measured on the others is no statement about them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import holdfast
from holdfast.io.data.data import open_data
from holdfast.runs.assess.result import Result
from holdfast.statistics.intervals import against_majority

X = np.random.default_rng(0).random((300, 2)).astype("f4")
Y = np.repeat([0, 1, 2], 100)
X[:, 0] = (X[:, 0] + Y) / 3
GROUPS = np.repeat(["a", "b", "c"], 100)


def net() -> nn.Module:
    """A network that never predicts class 2."""
    net = nn.Linear(2, 3)
    net.weight.data[:] = torch.tensor([[-60.0, 0], [0, 0], [0, 0]])
    net.bias.data[:] = torch.tensor([20.0, 0, -1])
    return net


@pytest.fixture(scope="module")
def part() -> Result:
    """The first two classes and groups of a file that is sorted by them."""
    gates = ["worst_class >= 0.5", "worst_group >= 0.5"]
    return holdfast.assess(net(), (X, Y), "linf:0.001", "quick", n=200, gates=gates, groups=GROUPS)


def test_a_gate_on_the_worst_class_or_group_is_unclear_while_one_has_no_examples(part: Result) -> None:
    assert part.metrics["worst_class"].low == 0 == part.metrics["worst_group"].low
    assert part.metrics["worst_class"].value > 0.9
    assert [gate.verdict for gate in part.gates] == ["unclear", "unclear"]
    notes = part.summary()["notes"]
    assert any("no examples of class 2" in note for note in notes), notes
    assert any("no examples of group c" in note for note in notes), notes
    assert any(
        "first 200 examples have 2 of the 3 classes" in note and "--sample 200" in note for note in notes
    )


def test_groups_by_label_count_a_class_of_the_model_without_examples() -> None:
    gates = ["worst_group >= 0.5"]
    part = holdfast.assess(net(), (X, Y), "linf:0.001", "quick", n=200, gates=gates, groups="label")
    assert part.gates[0].verdict == "unclear"
    assert part.gates[0].too_few is not None and dict(part.gates[0].too_few.counts) == {"2": 0}


def test_a_class_that_fails_still_fails_the_gate() -> None:
    last = holdfast.assess(net(), (X[100:], Y[100:]), "linf:0.001", "quick", gates=["worst_class >= 0.5"])
    assert last.gates[0].verdict == "fail"


def test_chance_is_that_of_all_classes_of_the_model() -> None:
    correct = torch.arange(60) % 5 < 2  # 40 %
    y = torch.arange(60) % 2
    assert against_majority(correct, y).at_chance
    assert not against_majority(correct, y, 10).at_chance
    assert against_majority(correct & (y > 1), y, 10).at_chance


def test_the_first_examples_of_a_sorted_file_are_noted_and_random_ones_are_not(tmp_path: Path) -> None:
    np.savez(tmp_path / "sorted.npz", x=X, y=Y)
    first, random, mixed = (
        open_data(str(tmp_path / "sorted.npz"), **chosen)
        for chosen in ({"n": 60}, {"sample": 60}, {"n": 201})
    )
    assert any("1 of the 3 classes" in note and "sample=60" in note for note in first.notes)
    assert not any("classes of the data" in note for note in (*random.notes, *mixed.notes))
