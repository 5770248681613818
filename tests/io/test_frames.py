"""Data frames of pandas, read as the CSV file with the same columns is."""

from pathlib import Path

import numpy as np
import pytest

import holdfast
from holdfast.core.errors import TargetError, UsageError
from holdfast.io.data.arrays import Choice
from holdfast.io.data.data import open_data
from holdfast.io.data.tables import open_frame
from holdfast.verbs.checked_settings import DataReference
from holdfast.verbs.opening.declared import expected
from holdfast.verbs.opening.resolve import open_object, open_subject
from holdfast.verbs.settings import Assess

pandas = pytest.importorskip("pandas")


def frame(labels: list[object]) -> "pandas.DataFrame":
    rng = np.random.default_rng(0)
    found = pandas.DataFrame(rng.random((6, 2)), columns=["a", "b"])
    found["flag"] = [True, False] * 3
    return found.assign(label=labels, split=["train"] * 2 + ["test"] * 4).iloc[::-1]


@pytest.mark.parametrize("labels", [[0, 1, 1, 0, 0, 1], ["no", "yes", "yes", "no", "no", "yes"]])
@pytest.mark.parametrize("kind", ["object", "category"])
def test_a_frame_is_read_as_its_csv_file(tmp_path: Path, labels: list[object], kind: str) -> None:
    table = frame(labels)
    table.to_csv(tmp_path / "t.csv", index=False)
    written = open_data(str(tmp_path / "t.csv"), label="label", drop=("b",), n=3)
    held = open_frame(table.astype({"label": kind}), label="label", drop=("b",), choice=Choice(n=3))
    apart = open_frame((table[["a", "flag", "split"]], table["label"].astype(kind)), choice=Choice(n=3))
    for other in (held, apart):
        assert np.array_equal(written.x, other.x) and np.array_equal(written.y, other.y)
        assert written.classes == other.classes and np.array_equal(written.ids, other.ids)


def test_a_verdict_on_a_frame_is_exact() -> None:
    table = pandas.DataFrame({"a": np.linspace(0.01, 0.99, 50), "b": 0.5})
    table["label"] = (table.a > 0.5).astype(int)

    def model(x):
        return 10 * (x[:, :1] - 0.5) * x.new_tensor([-1, 1])

    found = holdfast.assess(
        model, holdfast.open_data(table, label="label"), "linf:0.1", "quick", doubts=False, n=100
    )
    assert found.metrics["robust_accuracy"].value == (abs(table.a - 0.5) > 0.1).mean()
    (example, *_) = found.summary()["examples"]
    assert example["changes"][0]["feature"] == "a"
    assert "100 examples were requested, and the data have 50: all of them were used" in found.evidence.notes
    short = holdfast.doctor(model, (table[["a", "b"]], table.label))
    assert {finding.check: finding.level for finding in short}["accuracy"] == "good"


def test_bad_frames_are_refused() -> None:
    table = frame([0, 1, 1, 0, 0, 1])
    with pytest.raises(
        UsageError, match="the label column of the data frame is not stated; its columns are a, b"
    ):
        open_frame(table)
    with pytest.raises(TargetError, match=r"has 6 rows and the labels have shape \(2,\)"):
        open_frame((table[["a"]], table.label[:2]))
    with pytest.raises(UsageError, match="labels were given separately as well"):
        open_frame((table[["a"]], table.label), label="label")
    with pytest.raises(
        TargetError, match="the value of a in row 2 of the data frame is missing; fill or drop such rows"
    ):
        open_frame(pandas.concat([table[:2], table[2:].assign(a=None)]), label="label", drop=("b", "flag"))
    with pytest.raises(TargetError, match=r"same index in another order; give labels\.loc\[frame\.index\]"):
        open_frame((table[["a"]], table.label.sort_index()))
    with pytest.raises(TargetError, match="several columns named 'a'"):
        open_frame(table.rename(columns={"b": "a"}), label="label")


def test_a_split_of_other_examples_in_a_frame_is_used() -> None:
    table = frame([0, 1, 1, 0, 0, 1])
    sources = Assess(model=lambda x: x, data="mnist-mini")
    model = open_subject(sources).model
    for split, count in (("train", 2), ("test", 4)):
        data = DataReference(data=table, label="label", split=split)
        assert len(open_object(data, expected(sources, model, data))) == count
