"""Tables with categories and missing values: rules are drafted, and models are assessed and hardened by them."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

import holdfast
from holdfast.cli.app import run

pytest.importorskip("sklearn")

MODEL = '''
import pandas as pd
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder
from torch import nn


def frame():
    return pd.read_csv("payments.csv")


def make():
    """A pipeline that refuses categories which are not as in training."""
    words = OneHotEncoder(sparse_output=False)
    encoded = ColumnTransformer([("words", words, ["country", "code"])], remainder="passthrough")
    model = make_pipeline(encoded, HistGradientBoostingClassifier(max_iter=30, min_samples_leaf=5, random_state=0))
    return model.fit(frame().drop(columns=["fraud", "id"]), frame().fraud)


def forest():
    """XGBoost with categories."""
    from xgboost import XGBClassifier

    data = frame().drop(columns=["fraud", "id"]).astype({"country": "category", "code": "category"})
    return XGBClassifier(n_estimators=10, enable_categorical=True).fit(data, frame().fraud == "yes")


def lightgbm():
    """LightGBM with categories."""
    from lightgbm import LGBMClassifier

    data = frame().drop(columns=["fraud", "id"]).astype({"country": "category", "code": "category"})
    return LGBMClassifier(n_estimators=10, verbose=-1, min_child_samples=5).fit(data, frame().fraud == "yes")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(3, 2), nn.Linear(6, 2)

    def forward(self, x):
        import torch

        country = self.embedding(x[:, 3].long())
        return self.linear(torch.cat((x[:, :3] / 100, country, x[:, 4:5]), 1))


def net():
    return Net()
'''


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, in_this_process):
    """A folder with a model and a table, as the current one."""
    monkeypatch.chdir(tmp_path)
    draws = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "id": [f"p{row}" for row in range(900)],
            "amount": draws.integers(1, 500, 900),
            "paid": 0,
            "age": draws.uniform(0, 90, 900).round(1),
            "country": draws.choice(["DE", "FR", "US"], 900),
            "code": draws.choice([10, 20], 900),
        }
    )
    frame["paid"] = (frame.amount * draws.uniform(0, 1, 900)).astype(int)
    frame["fraud"] = np.where((frame.amount > 300) & (frame.country != "DE"), "yes", "no")
    frame.loc[3:6, "age"] = np.nan
    frame.to_csv("payments.csv", index=False)
    Path("model.py").write_text(MODEL)


def drafted(**changes):
    """Write drafted rules, with other properties of columns, and return the content of the file."""
    assert (
        run(["init", "rules.yaml", "--table", "payments.csv", "--label", "fraud", "--drop", "id", "--force"])
        == 0
    )
    content = yaml.safe_load(Path("rules.yaml").read_text())
    content["columns"]["code"] = {"type": "category", "values": [10, 20], "change": "none"}
    for name, properties in changes.items():
        content["columns"][name] |= properties
    content["relations"] = ["paid <= amount"]
    Path("rules.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return content


ARGUMENTS = ["payments.csv", "--label", "fraud", "--drop", "id", "-n", "60"]


def assess(model, *more, threat="table:rules.yaml"):
    return run(["assess", model, *ARGUMENTS, "--threat", threat, "-o", "r.json", *more])


def test_rules_are_drafted_from_the_data(capsys):
    content = drafted()
    assert content["columns"]["amount"] == {"type": "whole", "min": 1, "max": 499}
    assert content["columns"]["age"]["missing"] is True
    assert content["columns"]["country"] == {"type": "category", "values": ["DE", "FR", "US"]}
    assert (
        "holdfast assess MODEL payments.csv --label fraud --drop id --threat table:rules.yaml"
        in capsys.readouterr().err
    )


@pytest.mark.slow
@pytest.mark.parametrize("factory", ["make", "forest", "lightgbm"])
def test_a_model_with_categories_is_assessed_by_rules(factory, capsys):
    if factory != "make":
        pytest.importorskip({"forest": "xgboost", "lightgbm": "lightgbm"}[factory])
    drafted(country={"cost": 0.1})
    assert assess(f"model.py:{factory}", "--run", "run", "--save-adversarial", "-o", "r.html") == 0
    report = json.loads(Path("r.json").read_text())
    assert report["metrics"]["clean_accuracy"]["value"] > 0.95
    assert report["metrics"]["robust_accuracy"]["value"] < 0.9
    assert report["threat"]["constraint"] == "table:rules.yaml,eps=0.1"
    changes = [change for example in report["examples"] for change in example["changes"]]
    assert {change["clean"] for change in changes if change["feature"] == "country"} <= {"DE", "FR", "US"}
    Path("rules.yaml").unlink()  # the run contains its rules
    assert run(["verify", "run"]) == 0
    assert run(["report", "run", "-o", "again.json"]) == 0
    assert json.loads(Path("again.json").read_text())["metrics"] == report["metrics"]


@pytest.mark.slow
def test_a_target_class_is_given_by_its_name(capsys):
    drafted(country={"cost": 0.1})
    assert assess("model.py:make", threat="table:rules.yaml,goal=targeted:no") == 0
    named = json.loads(Path("r.json").read_text())
    assert assess("model.py:make", threat="table:rules.yaml,goal=targeted:0") == 0
    numbered = json.loads(Path("r.json").read_text())
    assert named["metrics"] == numbered["metrics"] and named["threat"] == numbered["threat"]
    assert assess("model.py:make", threat="table:rules.yaml,goal=targeted:maybe") == 2
    assert "expected one of 0 (no), 1 (yes)" in capsys.readouterr().err
    training = ["--threat", "table:rules.yaml,goal=targeted:no", "--recipe", "pgd", "-o", "hard/"]
    assert run(["harden", "model.py:net", *ARGUMENTS, *training]) == 2
    assert "give the number of the class" in capsys.readouterr().err


def test_doctor_checks_a_model_with_categories_by_rules(capsys):
    drafted()
    assert run(["doctor", "model.py:make", *ARGUMENTS, "--threat", "table:rules.yaml"]) == 0
    assert "accuracy is 100.0%" in capsys.readouterr().out


@pytest.mark.slow
def test_a_network_is_assessed_and_hardened_by_rules():
    drafted(age={"change": "none"})
    frame = pd.read_csv("payments.csv").fillna({"age": 1})
    frame["split"] = ["train"] * 700 + ["test"] * 200
    frame.to_csv("payments.csv", index=False)
    drafted(country={"cost": 0.1})
    torch.manual_seed(0)
    threat = ["--threat", "table:rules.yaml"]
    training = ["--recipe", "pgd", "--set", "recipe.training.epochs=2", "-o", "hard/"]
    assert assess("model.py:net") == 0
    names = [attack["name"] for attack in json.loads(Path("r.json").read_text())["attacks"]]
    assert names == ["CAPGD", "ColumnSearch", "GeneticSearch"]
    assert run(["harden", "model.py:net", *ARGUMENTS, *threat, *training]) == 0
    card = json.loads(Path("hard/card.json").read_text())
    assert card["threat"] == "table:rules.yaml,eps=0.1"


@pytest.mark.slow
def test_changed_rules_do_not_continue_a_run(capsys):
    drafted()
    assert assess("model.py:make", "--run", "run") == 0
    drafted(amount={"change": "up"})
    assert assess("model.py:make", "--run", "run", "--resume") == 2
    assert "rules" in capsys.readouterr().err


def test_python_attacks_a_frame_by_rules():
    drafted(country={"cost": 0.1})
    namespace = {}
    exec(MODEL, namespace)
    frame = pd.read_csv("payments.csv").drop(columns="id").head(40)
    data = holdfast.open_data(frame, label="fraud")
    result = holdfast.assess(namespace["make"](), data, threat="table:rules.yaml", suite="black-box")
    assert result.evidence.threat.constraint.rules.names == ("amount", "paid", "age", "country", "code")


@pytest.mark.parametrize(
    ("rules", "more", "message"),
    [
        ({"columns": {"country": {"values": ["DE", "FR"]}}}, [], "has 'US' in the column 'country', whose values"),
        ({"columns": {"country": {"values": ["DE", "FR", "US", "XX"]}}}, [], "on all values of categories"),
        ({"columns": {"country": {"type": "number", "min": 0, "max": 1, "values": []}}}, [], "has text in the column"),
        ({"columns": {"age": {"missing": False}}}, [], "is missing, which the rules forbid"),
        ({"columns": {"amount": {"max": 100}}}, [], "outside"),
        ({"drop": "paid", "relations": []}, [], "the rules lack 'paid'"),
        ({"add": "paidd"}, [], "the rules have 'paidd' beside them"),
        ({}, ["--bounds", "0,1"], "bounds is for inputs that are numbers"),
        ({}, ["--suite", "pgd"], "PGD needs gradients"),
        ({}, ["--suite", "minimum-norm"], "no attack on tables"),
        ({}, ["--curve"], "has no eps, which a curve needs"),
        ({"threat": "table:rules.yaml,eps=0"}, [], "must be above 0"),
        ({"threat": "table:https://example.com/rules.yaml"}, [], "an address; download the file"),
        ({"threat": "table:rules.yaml,eps=nan"}, [], "eps"),
        ({"threat": "table:other.yaml"}, [], "does not exist"),
        ({"threat": "table:"}, [], "has no file"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_error(rules, more, message, capsys):
    content = drafted()
    for name, properties in rules.get("columns", {}).items():
        content["columns"][name] |= properties
    content["columns"].pop(rules.get("drop"), None)
    if "add" in rules:
        content["columns"][rules["add"]] = {"min": 0, "max": 1}
    content["relations"] = rules.get("relations", content["relations"])
    Path("rules.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    capsys.readouterr()
    assert assess("model.py:make", *more, threat=rules.get("threat", "table:rules.yaml")) in (2, 3)
    assert message in capsys.readouterr().err


def test_the_columns_of_the_data_are_those_of_the_rules(capsys):
    content = drafted()
    paid = content["columns"].pop("paid")
    content["relations"] = []
    for columns, message in (
        (content["columns"], "cannot be attacked; give --drop paid to leave it out"),
        (content["columns"] | {"payd": paid}, "the rules have the column 'payd', which"),
    ):
        Path("rules.yaml").write_text(yaml.safe_dump(content | {"columns": columns}, sort_keys=False))
        assert assess("model.py:net") == 2
        assert message in capsys.readouterr().err


def test_certificates_are_refused(capsys):
    drafted()
    assert run(["certify", "model.py:make", *ARGUMENTS, "--threat", "table:rules.yaml"]) == 2
    assert "also after StandardScaler" in capsys.readouterr().err
