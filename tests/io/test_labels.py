"""Targets that are no classes, and inputs that are no numbers, are refused with what they are."""

import numpy as np
import pytest
import torch

from holdfast.core.errors import TargetError
from holdfast.io.data.data import open_data
from holdfast.io.data.loaders import as_data

RNG = np.random.default_rng(0)
X = RNG.random((6, 4), dtype=np.float32)
ONE_HOT = np.eye(3)[[0, 1, 2, 0, 1, 2]]

NO_CLASSES = {
    "regression": (RNG.random(6), "with values such as .*--task"),
    "several targets": (RNG.normal(size=(6, 2)), "several numbers per example.*--task"),
    "several classes": (np.maximum(ONE_HOT, np.eye(3)[0]), "row 1 has 2 classes"),
    "no class": (ONE_HOT * (np.arange(6) != 3)[:, None], "1 of the rows, first row 3, have no class"),
    "soft labels": (0.7 * ONE_HOT + 0.1, "probabilities of the classes"),
    "masks": (np.zeros((6, 2, 2), np.int64), r"shape \(6, 2, 2\); one class number"),
    "missing": (np.array([0, 1, np.nan, 2, 0, 1]), "the label of row 2 of .* is nan"),
}


@pytest.mark.parametrize("case", NO_CLASSES)
@pytest.mark.parametrize("kind", ["array", "tensor", "archive"])
def test_targets_that_are_no_classes_are_refused_with_what_they_are(case, kind, tmp_path):
    y, message = NO_CLASSES[case]
    np.savez(tmp_path / "d.npz", x=X, y=y)
    opened = {
        "array": lambda: as_data(X, y),
        "tensor": lambda: as_data(X, torch.as_tensor(y)),
        "archive": lambda: open_data(str(tmp_path / "d.npz")),
    }
    with pytest.raises(TargetError, match=message) as refused:
        opened[kind]()
    assert "astype" not in str(refused.value)
    assert ("argmax" in str(refused.value)) == (case == "no class")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_whole_numbers_stored_as_floats_are_labels(dtype, tmp_path):
    y = np.array([2, 0, 1, 2, 0, 1])
    assert as_data(X, y.astype(dtype)).read(0, 6).y.tolist() == y.tolist()
    assert as_data(X, torch.tensor(y.astype(dtype))[:, None]).read(0, 6).y.tolist() == y.tolist()
    np.savez(tmp_path / "d.npz", x=X, y=y.astype(dtype))
    assert open_data(str(tmp_path / "d.npz")).read(0, 6).y.tolist() == y.tolist()


@pytest.mark.parametrize(
    "x",
    [
        RNG.integers(0, 99, (6, 4)),
        RNG.integers(0, 30_000, (6, 4)),
        torch.randint(0, 99, (6, 4)),
        np.array(["a text", "another"] * 3),
        ["a text", "another"] * 3,
        np.array([["a", "b"]] * 6, dtype=object),
    ],
    ids=["ids", "many ids", "tensor of ids", "text", "list of text", "objects"],
)
def test_inputs_that_are_no_numbers_are_refused_with_the_kinds_that_are_supported(x):
    with pytest.raises(TargetError, match="images, signals or tables of numbers") as refused:
        as_data(x, np.arange(6) % 2)
    assert "reshape" not in str(refused.value) and "/ 99" not in str(refused.value)


@pytest.mark.parametrize("x", [X.reshape(6, 1, 2, 2), X], ids=["images", "a table"])
@pytest.mark.parametrize("kind", ["array", "tensor", "archive"])
def test_swapped_inputs_and_labels_are_named(x, kind, tmp_path):
    y = np.arange(6) % 3
    np.savez(tmp_path / "d.npz", x=y, y=x)
    opened = {
        "array": lambda: as_data(y, x),
        "tensor": lambda: as_data(torch.tensor(y), torch.tensor(x)),
        "archive": lambda: open_data(str(tmp_path / "d.npz")),
    }
    with pytest.raises(TargetError, match="which seem to be swapped") as refused:
        opened[kind]()
    if kind == "archive":
        assert refused.value.on_command_line().endswith("give --x y --y x")
        assert len(open_data(str(tmp_path / "d.npz"), x="y", y="x")) == 6
