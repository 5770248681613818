"""Class folders and text labels get the numbers of the model's classes, or are refused."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import holdfast
from holdfast.core.errors import TargetError, UsageError
from holdfast.io.data.data import open_data
from holdfast.io.data.labels import class_numbers
from holdfast.io.data.layouts import DeclaredData
from holdfast.io.data.loaders import as_data
from holdfast.io.remote.probing import ProbedClassifier
from holdfast.settings.table_rules import rules_from

NAMES = ("bird", "cat", "dog", "frog")


class Brightness(nn.Module):
    """Class k of four for a mean of (k + 0.5) / 4: of images by their mean, of tables by their column."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        middles = (torch.arange(4) + 0.5) / 4
        return -((x.flatten(1).mean(1, keepdim=True) - middles.to(x)) ** 2) * 20


def folders(root: Path, names: dict[str, int]) -> Path:
    for name, k in names.items():
        (root / name).mkdir(parents=True)
        for i in range(5):
            Image.new("L", (4, 4), int((k + 0.5) / 4 * 255) + i - 2).save(root / name / f"{i}.png")
    return root


def table(path: Path, names: dict[str, int]) -> Path:
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["a", "kind"])
        rows.writerows([(k + 0.5) / 4 + i / 100, name] for i in range(5) for name, k in names.items())
    return path


def made(kind: str, root: Path, names: dict[str, int]) -> dict[str, object]:
    if kind == "folders":
        return {"data": folders(root / "data", names)}
    return {"data": table(root / "t.csv", names), "label": "kind"}


def accuracy(data: dict[str, object], **options: object) -> float:
    model = holdfast.open_model(Brightness(), **options)
    examples = holdfast.open_data(data["data"], label=data.get("label"))
    found = holdfast.assess(model, examples, threat="linf:0.01", suite="quick", doubts=False)
    return found.metrics["clean_accuracy"].value


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folders", "table"])
def test_a_missing_class_is_refused_and_names_give_the_right_numbers(kind: str, tmp_path: Path) -> None:
    data = made(kind, tmp_path, {"bird": 0, "dog": 2, "frog": 3})
    with pytest.raises(TargetError, match=r"bird, dog, frog.* 4 classes.*class_names=.* with all 4 names"):
        accuracy(data)
    (tmp_path / "names.txt").write_text("bird\ncat\ndog\nfrog\n")
    for names in (NAMES, "bird,cat,dog,frog", f"@{tmp_path / 'names.txt'}"):
        assert accuracy(data, class_names=names) == 1
    with pytest.raises(TargetError, match=r"class_names has bird, cat, dog, fox.*correct the names"):
        accuracy(data, class_names="bird,cat,dog,fox")
    with pytest.raises(UsageError, match="has 3 classes .*, but the model has 4"):
        accuracy(data, class_names="bird,dog,frog")


@pytest.mark.parametrize("kind", ["folders", "table"])
def test_names_in_another_order_than_the_alphabet(kind: str, tmp_path: Path) -> None:
    data = made(kind, tmp_path, {"frog": 0, "dog": 1, "cat": 2, "bird": 3})
    assert accuracy(data, class_names=("frog", "dog", "cat", "bird")) == 1


def test_numeric_names_of_folders(tmp_path: Path) -> None:
    assert accuracy({"data": folders(tmp_path / "zero", {str(k): k for k in range(4)})}) == 1
    from_one = folders(tmp_path / "one", {str(k + 1): k for k in range(4)})
    with pytest.raises(TargetError, match="start at 0, and these names at 1"):
        accuracy({"data": from_one})
    assert accuracy({"data": from_one}, class_order="numeric") == 1


@pytest.mark.parametrize(
    "found, classes, refused",
    [
        (["cat", "dog"], 2, ""),
        (["cat", "dog"], None, ""),
        (["00", "01", "02"], 3, ""),
        (["a-b", "a1", "a2"], 3, ""),
        (["-1", "1"], 2, ""),
        (["0", "1", "10", "2"], None, "lexical order"),
        (["class1", "class10", "class2"], 3, "lexical order"),
        (["2", "7"], None, "class numbers start at 0"),
        (["-1", "0", "1"], None, "class numbers start at 0"),
        (["0", "1", "3"], None, "not consecutive"),
        (["0", "1", "readme"], 3, "others, such as 'readme', are not"),
        (["cat"], 2, "the model has 2 classes; it is not clear which are missing"),
    ],
)
def test_the_order_of_names_is_used_where_it_is_unambiguous(
    found: list[str], classes: int | None, refused: str
) -> None:
    if refused:
        with pytest.raises(TargetError, match=refused):
            class_numbers(found, DeclaredData(), classes, "data", "class folders")
    else:
        assert class_numbers(found, DeclaredData(), classes, "data", "class folders") == tuple(found)


def test_a_refusal_of_an_order_names_each_cause_once() -> None:
    with pytest.raises(TargetError) as refused:
        class_numbers(["1", "10", "2"], DeclaredData(), 3, "photos", "class folders")
    assert refused.value.message == (
        "photos has 3 class folders (1, 2, 10), and the model has 3 classes; the lexical order of the names (1, 10, 2) "
        "differs from the numeric order, and class numbers start at 0, and these names at 1"
    )
    assert [(each.argument, str(each.value)) for each in refused.value.remedies] == [
        ("class_order", "lexical"),
        ("class_order", "numeric"),
        ("class_names", "A,B,C"),
    ]


def test_a_declared_order_decides() -> None:
    found = ["0", "1", "10", "2"]
    numeric, lexical = (
        class_numbers(found, DeclaredData(class_order=order), 4, "data", "class folders")
        for order in ("numeric", "lexical")
    )
    assert numeric == ("0", "1", "2", "10") and lexical == ("0", "1", "10", "2")


def test_an_archive_that_names_its_classes_in_another_order_is_renumbered(tmp_path: Path) -> None:
    x = ((np.arange(40) % 4 + 0.5) / 4)[:, None].astype(np.float32)
    order = ("dog", "frog", "bird", "cat")
    y = np.array([order.index(NAMES[k]) for k in np.arange(40) % 4])
    np.savez(tmp_path / "d.npz", x=x, y=y, classes=np.array(order))
    assert accuracy({"data": tmp_path / "d.npz"}, class_names=NAMES) == 1


@pytest.mark.parametrize("row", [0, 3, 30])
def test_the_range_of_all_labels_is_refused_wherever_the_wrong_one_is(row: int, tmp_path: Path) -> None:
    x, y = np.full((600, 1), 0.4, np.float32), np.arange(600) % 4
    y[row] = 4
    np.savez(tmp_path / "d.npz", x=x, y=y)
    for data in ((x, y), (torch.from_numpy(x), torch.from_numpy(y)), tmp_path / "d.npz"):
        for n in (None, 40):
            with pytest.raises(
                TargetError, match="range from 0 to 4, but the model has 4 classes"
            ) as refused:
                holdfast.assess(Brightness(), data, "linf:0.01", "quick", n=n)
            assert "subtract" not in str(refused.value)
    findings = {f.check: f for f in holdfast.doctor(Brightness(), (x, y))}
    assert "range from 0 to 4" in findings["labels"].message and "subtract" not in findings["labels"].way_out


def test_labels_from_1_are_refused_with_that_remark(tmp_path: Path) -> None:
    x, y = np.full((60, 1), 0.4, np.float32), np.arange(60) % 4 + 1
    with pytest.raises(TargetError, match="count from 1: subtract 1"):
        holdfast.assess(Brightness(), (x, y), "linf:0.01", "quick")
    data = table(tmp_path / "t.csv", {str(k + 1): k for k in range(4)})
    with pytest.raises(TargetError, match="count from 1: subtract 1"):
        accuracy({"data": data, "label": "kind"})


def shifted(n: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Inputs of the first three of four classes, and their labels counted from 1."""
    y = np.arange(n) % 3
    return ((y + 0.5) / 4).astype(np.float32)[:, None], y + 1


def test_labels_from_1_within_the_outputs_of_a_model_are_refused_when_data_are_opened(tmp_path: Path) -> None:
    x, y = shifted()
    with (tmp_path / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["a", "kind"], *zip(x[:, 0], y, strict=True)])
    np.savez(tmp_path / "t.npz", x=x, y=y)
    says = "range from 1 to 3, .*: accuracy is 0%, but 100% with labels -1; they count from 1: subtract 1"
    with pytest.raises(TargetError, match=says):
        holdfast.explain(Brightness(), x, y, "linf:0.01")
    with pytest.raises(TargetError, match=says):
        holdfast.harden(Brightness(), str(tmp_path / "t.npz"), "linf:0.01", "standard")
    with pytest.raises(TargetError, match=says):
        holdfast.assess(
            Brightness(), holdfast.open_data(str(tmp_path / "t.csv"), label="kind"), "linf:0.01", n=9
        )


def test_a_note_names_labels_from_1_on_which_a_model_is_at_chance() -> None:
    x, y = shifted()
    guesses = torch.nn.Linear(1, 4)
    for parameter in guesses.parameters():
        torch.nn.init.zeros_(parameter)

    def notes(net: nn.Module, labels: np.ndarray, outputs: int = 4) -> tuple[str, ...]:
        model = holdfast.Classifier(net, classes=outputs)
        return as_data(x, labels, expected=DeclaredData(probe=ProbedClassifier(model))).notes

    assert any("no better on them than chance; if they count from 1" in note for note in notes(guesses, y))
    assert not notes(guesses, y - 1)
    assert not notes(Brightness(), y - 1)
    assert not notes(Brightness(), np.where(y == 1, 3, y - 1))
    later = ((np.arange(60) % 3 + 1.5) / 4).astype(np.float32)[:, None]  # the first class has no examples
    model = holdfast.Classifier(Brightness(), classes=4)
    assert not as_data(later, y, expected=DeclaredData(probe=ProbedClassifier(model))).notes


@pytest.mark.parametrize("names", [NAMES, ("bird ", "cat", " dog", "frog"), None])
@pytest.mark.parametrize("kind", ["folders", "table", "array"])
def test_class_names_are_compared_without_spaces_at_their_ends(
    kind: str, names: tuple[str, ...] | None, tmp_path: Path
) -> None:
    spaced = {" bird": 0, " cat": 1, "dog ": 2, "frog": 3}
    expected = DeclaredData(class_names=names)
    if kind == "array":
        data = as_data(np.zeros((4, 1), np.float32), np.array([*spaced]), expected=expected)
    else:
        given = made(kind, tmp_path, spaced)
        data = open_data(str(given["data"]), label=given.get("label"), expected=expected)
    assert data.classes == (names or NAMES)
    assert sorted(data.read(0, len(data)).y.unique().tolist()) == [0, 1, 2, 3]
    assert any("spaces at their ends" in note and "' cat' as 'cat'" in note for note in data.notes)


def test_labels_that_differ_only_by_spaces_are_one_class(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,kind\n1, yes\n2,yes\n3,no\n4,no \n")
    data = open_data(
        str(tmp_path / "t.csv"), label="kind", expected=DeclaredData(bounds=holdfast.Bounds(0, 9))
    )
    assert data.classes == ("no", "yes") and data.read(0, 4).y.tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("values", [["Private", "State-gov"], [" Private", "State-gov "]])
def test_categories_of_rules_are_compared_without_spaces_at_their_ends(
    values: list[str], tmp_path: Path
) -> None:
    content = {"columns": {"age": {"min": 0, "max": 99}, "work": {"type": "category", "values": values}}}
    rules = rules_from(content | {"budget": {"norm": "l0", "eps": 1}}, "the rules")
    (tmp_path / "t.csv").write_text("age,work,y\n30, Private,0\n40,Private,1\n50, State-gov,1\n")
    expected = DeclaredData(bounds=holdfast.Bounds(0, 99), rules=rules, words=("work",))
    data = open_data(str(tmp_path / "t.csv"), label="y", expected=expected)
    assert data.read(0, 3).x[:, 1].tolist() == [0, 0, 1]
    assert any("the column 'work'" in note and "spaces at their ends" in note for note in data.notes)
    (tmp_path / "t.csv").write_text("age,work,y\n30, Privat,0\n")
    with pytest.raises(TargetError, match="has ' Privat' in the column 'work'"):
        open_data(str(tmp_path / "t.csv"), label="y", expected=expected)
