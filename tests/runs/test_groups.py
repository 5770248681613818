"""Groups of examples, from the data to the report: what states them, what is refused, and what is computed again."""

import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import nn

import holdfast
from disk import failing
from holdfast.cli.app import run as command_line
from holdfast.core.batch import Batch
from holdfast.core.errors import HoldfastError, TargetError, UsageError
from holdfast.io.data.labels import Groups
from holdfast.reports.json_schemas import summary_schema
from holdfast.runs.assess.assess import assess
from holdfast.verbs.reports import report, verify
from runs.fakes import N, data, order, settled, subject
from store.test_foreign import rewritten

rng = np.random.default_rng(0)
X = rng.random((120, 4)).astype(np.float32)
Y = (X[:, 0] > 0.5).astype(np.int64)
SEX = np.where(np.arange(120) % 3 == 0, "f", "m")
OLD = np.arange(120) % 2


def network():
    net = nn.Linear(4, 2)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.0] * 4, [8.0, 0, 0, 0]]))
        net.bias.copy_(torch.tensor([0.0, -4]))
    return net


NET = network()
SETTINGS = {"threat": "linf:0.05", "suite": "pgd", "doubts": False}
FRAME = pd.DataFrame(X, columns=list("abcd")).assign(sex=SEX, y=Y)


def assessed(examples=(X, Y), model=NET, **settings):
    return holdfast.assess(model, examples, **SETTINGS, **settings)


def groups_of(result):
    return {row["name"]: row["n"] for row in result.summary()["groups"]["rows"]}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    FRAME.assign(old=OLD).to_csv("t.csv", index=False)
    FRAME.to_parquet("t.parquet")
    np.savez("t.npz", x=X, y=Y, sex=SEX, old=OLD, few=SEX[:50])
    Path("net.py").write_text(
        "import torch\n\ndef make():\n    net = torch.nn.Linear(4, 2)\n    with torch.no_grad():\n"
        "        net.weight.copy_(torch.tensor([[0.0] * 4, [8.0, 0, 0, 0]]))\n"
        "        net.bias.copy_(torch.tensor([0.0, -4]))\n    return net\n"
    )
    return tmp_path


SEXES = {"f": 40, "m": 80}


@pytest.mark.parametrize(
    ("address", "options"),
    [
        ("t.csv", {"label": "y", "drop": ["old"]}),
        ("t.csv", {"label": "y", "drop": ["old", "sex"]}),
        ("t.parquet", {"label": "y"}),
        ("t.npz", {}),
    ],
)
def test_a_column_or_an_array_of_a_file_states_the_groups(address, options, folder):
    result = assessed(holdfast.open_data(address, **options), groups="sex")
    assert groups_of(result) == SEXES
    f, m = (result.evidence["group"] == place for place in (0, 1))
    assert (f == torch.from_numpy(SEX == "f")).all() and (m == ~f).all()
    robust = (result.evidence["correct"] & ~result.evidence["success"])[f].double().mean()
    assert result.summary()["groups"]["rows"][0]["robust_accuracy"]["value"] == pytest.approx(float(robust))


@pytest.mark.parametrize(
    ("examples", "groups", "expected"),
    [
        ((X, Y), SEX, SEXES),
        ((torch.from_numpy(X), torch.from_numpy(Y)), torch.from_numpy(OLD), {"0": 60, "1": 60}),
        ((X, Y), list(SEX), SEXES),
        ((X, Y), np.where(OLD == 1, np.nan, 2.0), {"2": 60, "missing": 60}),
        ((FRAME[["a", "b", "c", "d"]], Y), FRAME["sex"].where(SEX == "f", None), {"f": 40, "missing": 80}),
        ((FRAME.drop(columns="y"), Y), "sex", SEXES),
        ("t.npz", SEX, SEXES),
    ],
)
def test_an_array_or_a_column_of_a_frame_states_the_groups(examples, groups, expected, folder):
    assert groups_of(assessed(examples, groups=groups)) == expected


class OwnData:
    """Data of a class of the user."""

    name, classes, digest = "own", None, "a" * 64

    def __len__(self):
        return 120

    def read(self, start, stop):
        rows = slice(start, stop)
        return Batch(torch.from_numpy(X[rows]), torch.from_numpy(Y[rows]), torch.arange(120)[rows])


@pytest.mark.parametrize("examples", [(X, Y), OwnData()])
def test_selected_examples_keep_their_groups(examples):
    result = assessed(examples, groups=SEX, sample=50, seed=3)
    ids = result.evidence["id"]
    assert (result.evidence["group"] == torch.from_numpy(SEX[ids.numpy()] == "m").long()).all()
    assert groups_of(assessed(examples, groups=SEX, n=60)) == {"f": 20, "m": 40}


def test_a_feature_that_states_the_groups_stays_a_feature(folder):
    table = FRAME.assign(old=OLD)[["a", "b", "c", "old"]]
    model = LogisticRegression().fit(table, Y)
    FRAME.assign(old=OLD)[["a", "b", "c", "old", "sex", "y"]].to_csv("fitted.csv", index=False)
    for column, n in (("old", {"0": 60, "1": 60}), ("sex", SEXES)):
        drop = ["sex"] if column == "old" else []
        result = holdfast.assess(
            model,
            holdfast.open_data("fitted.csv", label="y", drop=drop),
            threat="linf:0.01,queries=20",
            suite="square",
            doubts=False,
            groups=column,
        )
        assert groups_of(result) == n
        assert list(result.evidence.data["features"]) == ["a", "b", "c", "old"]


def test_a_number_that_a_fitted_model_does_not_know_is_no_feature(folder):
    model = LogisticRegression().fit(FRAME[["a", "b", "c", "d"]], Y)
    settings = {"threat": "linf:0.01,queries=20", "suite": "square", "doubts": False, "groups": "old"}
    result = holdfast.assess(model, holdfast.open_data("t.csv", label="y", drop=["sex"]), **settings)
    assert list(result.evidence.data["features"]) == ["a", "b", "c", "d"]


BAD = [
    (
        {"examples": "t.npz", "groups": "sx"},
        "no column or array 'sx'; it has x, y, sex, old, few; give groups='sex'",
    ),
    ({"examples": "t.npz", "groups": "few"}, "'few' of 't.npz' has 50 rows, and there are 120 examples"),
    ({"examples": "t.npz", "groups": "x"}, r"'x' has the shape \(120, 4\)"),
    (
        {"examples": ("t.csv", "y"), "groups": "sxe"},
        "no column or array 'sxe'; .* give groups='sex'",
    ),
    (
        {"examples": ("t.csv", "y"), "groups": "a", "drop": ["sex"]},
        "'a' has 120 different values; at most 50",
    ),
    ({"groups": np.arange(120)}, "groups has 120 different values; at most 50"),
    (
        {"groups": np.zeros(120)},
        "groups is '0' for all 120 examples; at least two groups .* leave out groups",
    ),
    ({"groups": SEX[:100]}, "groups has 100 values, and the data have 120 examples"),
    ({"groups": np.tile(SEX, 2)}, "groups has 240 values, and the data have 120 examples"),
    ({"groups": SEX[:40], "sample": 60}, "groups has 40 values, and the data have at least .* examples"),
    ({"groups": X}, r"groups has the shape \(120, 4\); one value for each example"),
    ({"groups": "sex"}, "has no columns or arrays with names .*; leave out groups"),
    ({"groups": object()}, "the groups are an object; numbers, or only texts, were expected"),
    ({"gates": ["worst_group >= 0.5"]}, "worst_group needs the group of each example; give groups=array"),
    ({"groups": SEX, "gates": ["worst_group >= 50"]}, "did you mean 0.5"),
    (
        {"examples": "images", "model": nn.Sequential(nn.Flatten(), NET), "groups": "sex"},
        "images has no columns or arrays with names",
    ),
]


@pytest.mark.parametrize(("settings", "message"), BAD, ids=[message for _, message in BAD])
def test_wrong_groups_are_refused_before_anything_is_measured(settings, message, folder):
    for name in ("a", "b"):
        (folder / "images" / name).mkdir(parents=True)
        Image.fromarray(np.zeros((2, 2), np.uint8)).save(folder / "images" / name / "0.png")
    settings, drop = dict(settings), settings.get("drop", [])
    settings.pop("drop", None)
    if isinstance(settings.get("examples"), tuple):
        address, label = settings["examples"]
        settings["examples"] = holdfast.open_data(address, label=label, drop=["old", *drop])
    with pytest.raises(HoldfastError, match=message):
        assessed(**settings, run="refused")
    assert not (folder / "refused").exists()


WORDS = ["net.py:make", "t.csv", "--label", "y", "--drop", "old", "--groups", "sex", "--trust-code"]
QUICK = ["-t", "linf:0.05", "-s", "pgd", "--no-doubts", "--run", "r"]


@pytest.mark.usefixtures("folder")
def test_a_gate_on_the_worst_group_decides_the_exit_code_and_every_report_shows_the_groups(capsys):
    outputs = [word for suffix in ("html", "json", "md") for word in ("-o", f"r.{suffix}")]
    assert command_line(["assess", *WORDS, *QUICK, "--gate", "worst_group >= 0.5", *outputs]) == 0
    said = capsys.readouterr()
    assert "groups: clean and robust accuracy by sex" in said.out and "Worst group" in said.out
    content = json.loads(Path("r.json").read_text())
    jsonschema.validate(content, summary_schema())
    assert [(row["name"], row["n"], row["unclear"]) for row in content["groups"]["rows"]] == [
        ("f", 40, False),
        ("m", 80, False),
    ]
    assert "--groups sex" in content["reproduce"]
    assert '<h2 id="groups">Groups</h2>' in Path("r.html").read_text()
    assert "### Groups" in Path("r.md").read_text()
    assert command_line(["verify", "r"]) == 0
    assert command_line(["report", "r", "-o", "again.json"]) == 0
    again = json.loads(Path("again.json").read_text())
    assert (again["groups"], again["gates"]) == (content["groups"], content["gates"])


@pytest.mark.usefixtures("folder")
def test_a_small_group_makes_a_gate_unclear(capsys):
    assert command_line(["assess", *WORDS, *QUICK, "-n", "60", "--gate", "worst_group >= 0.1"]) == 4
    said = capsys.readouterr()
    assert "fewer than 30 examples is unclear" in said.out and ", unclear" in said.out


@pytest.mark.usefixtures("folder")
def test_a_run_with_other_groups_is_not_resumed(capsys):
    words = ["assess", "net.py:make", "t.npz", "--trust-code", *QUICK]
    assert command_line([*words, "--groups", "sex"]) == 0
    assert command_line([*words, "--groups", "sex", "--resume"]) == 0
    for other in (["--groups", "old"], []):
        assert command_line([*words, *other, "--resume"]) == 2
        assert "groups" in capsys.readouterr().err


def test_a_certification_has_groups():
    result = holdfast.certify(NET, (X, Y), threat="linf:0.05", groups=SEX, gates=["worst_group >= 0.5"])
    assert groups_of(result) == SEXES and result.exit_code == 0


def fakes_with_groups(places=None):
    values = np.arange(N) % 2 if places is None else places
    return replace(data(), groups=Groups.of_values(values, "side"))


def test_a_run_that_was_stopped_ends_with_the_same_groups(tmp_path, monkeypatch):
    request, whole = order(gates=("worst_group >= 0.1",), shard_size=15), tmp_path / "whole"
    assess(subject(), fakes_with_groups(), request, run=whole)
    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        failing(patch, 40, ("write", "fsync"))
        with pytest.raises(TargetError, match="the disk is full"):
            assess(subject(), fakes_with_groups(), request, run=stopped)
    assess(subject(), fakes_with_groups(), request, run=stopped, resume=True)
    assert settled(stopped) == settled(whole)
    with pytest.raises(UsageError, match="another configuration"):
        assess(subject(), fakes_with_groups(np.arange(N) // 20), request, run=whole, resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["data"]["groups"].update(of="a" * 20 + "b" * 20),
            r"config\.groups\.digest",
        ),
        (lambda c: c["data"]["groups"].update(of="ab"), r"data\.groups\.of 2, .* give 40"),
        (
            lambda c: c["data"]["groups"].update(of="az" * 20),
            "a letter of them is 'z'; one of ab was expected",
        ),
        (lambda c: c["data"].pop("groups"), "groups"),
        (lambda c: c["data"]["groups"].update(names=["a", "a"]), "names"),
    ],
)
def test_groups_that_were_changed_later_are_refused(change, message, tmp_path):
    run = tmp_path / "run"
    assess(subject(), fakes_with_groups(), order(gates=("worst_group >= 0.1",)), run=run)
    assert verify(run).complete and report(run).summary()["groups"]["column"] == "side"
    rewritten(run, "run.json", change)
    for reader in (report, verify):
        with pytest.raises(HoldfastError, match=message):
            reader(run)


def test_groups_are_measured_before_and_after_a_hardening():
    x = np.random.default_rng(1).random((700, 4)).astype(np.float32)
    y, side = (x[:, 0] > 0.5).astype(np.int64), np.where(x[:, 1] > 0.5, "high", "low")
    result = holdfast.harden(
        network(),
        (x, y),
        threat="linf:0.02",
        suite="pgd",
        doubts=False,
        recipe={"use": "pgd", "training": {"epochs": 1}},
        n=150,
        groups=side,
        gates=["worst_group >= 0.1"],
    )
    for measured in (result.before, result.after):
        assert sum(groups_of(measured).values()) == 150
        assert (measured.evidence["group"] == 0).any()
    assert result.after.exit_code == 0


@pytest.mark.parametrize("source", ["t.npz", "t.csv", "folder"])
def test_label_groups_the_examples_by_class_and_the_worst_class_is_the_headline(source, folder, capsys):
    options = ["--label", "y", "--drop", "old", "--drop", "sex"] if source == "t.csv" else []
    if source == "folder":
        for name in ("left", "right"):
            (folder / source / name).mkdir(parents=True)
            for k in range(4):
                image = Image.fromarray(np.full((2, 2), 250 * (name == "right") + k, np.uint8))
                image.save(folder / source / name / f"{k}.png")
        options = ["--class-names", "left,right"]
        Path("net.py").write_text(Path("net.py").read_text().replace("    return net", FLAT))
    command = ["assess", "net.py:make", source, "--trust-code", *QUICK, *options]
    code = command_line([*command, "--groups", "label", "-o", "r.json"])
    summary = json.loads(Path("r.json").read_text())
    rows = summary["groups"]["rows"]
    counts = (
        {"left": 4, "right": 4}
        if source == "folder"
        else dict(zip("01", np.bincount(Y).tolist(), strict=True))
    )
    assert (code, {row["name"]: row["n"] for row in rows}) == (0, counts)
    worst = min(rows, key=lambda row: row["robust_accuracy"]["value"])
    assert f"of class {worst['name']}, the worst of 2 classes, survive" in summary["headline"]
    assert "for all 2 classes together" in summary["headline"]
    assert capsys.readouterr().out.count("classes: clean and robust accuracy by label") == 1


def test_the_headline_states_how_many_groups_are_compared_if_some_have_few_examples():
    result = assessed(groups=np.array(["few"] * 5 + ["a"] * 60 + ["b"] * 55))
    assert "the worst of the 2 of 3 groups with 30 or more examples, survive" in result.summary()["headline"]
    assert "for all 3 groups together" in result.summary()["headline"]


FLAT = "    return torch.nn.Sequential(torch.nn.Flatten(), net)"
