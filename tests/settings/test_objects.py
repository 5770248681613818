"""The settings of a verb as an object: it is checked without torch, and runs as the function and the command do."""

import inspect
import json
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest
import torch

import holdfast
from holdfast.cli.app import run as command
from holdfast.core.errors import UsageError
from holdfast.core.names import limits_text, path_text
from holdfast.core.threat import ThreatModel
from holdfast.threats.parsing import FORMS, Form, file_argument, parse_threat
from holdfast.threats.transformations import Corruptions
from holdfast.verbs.checked_settings import VERBS
from holdfast.verbs.configuration import read_settings

ASSESSED = {"model": "mnist-cnn", "data": "mnist-mini", "threat": "linf:0.1", "suite": "quick", "n": 16}


def test_objects_are_created_without_torch():
    code = (
        "import sys, holdfast as h\n"
        "given = {'model': 'mnist-cnn', 'data': 'mnist-mini', 'threat': 'linf:0.1'}\n"
        "h.Assess(**given, surrogates=['mnist-cnn'], gates=['robust_accuracy >= 0.5'], on='local')\n"
        "h.Certify(**given, method='ibp'), h.Harden(**given, recipe='trades'), h.Doctor(model='mnist-cnn')\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


CARRIED_OUT = {
    (method.__qualname__, method)
    for kind in (*VERBS.values(), holdfast.Doctor, holdfast.Explain, holdfast.Calibrate)
    for base in kind.__mro__
    for method in vars(base).values()
    if inspect.isfunction(method) and "module" in inspect.getclosurevars(method).nonlocals
}


@pytest.mark.parametrize("method", [pytest.param(each, id=name) for name, each in sorted(CARRIED_OUT)])
def test_the_function_of_a_method_has_its_parameters(method):
    place = inspect.getclosurevars(method).nonlocals
    function = getattr(import_module(place["module"]), place["name"])
    settings, *stated = inspect.signature(method).parameters.values()
    own, *parameters = inspect.signature(function).parameters.values()
    assert (settings.name, own.name) == ("self", "settings")
    rest = [each for each in parameters if each.kind is each.VAR_KEYWORD]
    named = {each.name: (each.kind, each.default) for each in parameters if each not in rest}
    for each in stated:
        if each.name in named or not rest:
            assert named.pop(each.name) == (each.kind, each.default)
        else:
            assert each.kind is each.KEYWORD_ONLY
    assert all(default is not inspect.Parameter.empty for _, default in named.values())


def test_every_verb_has_methods_with_functions():
    names = {name for name, _ in CARRIED_OUT}
    assert {"_Measured.run", "Harden.run", "Serve.run", "Monitor.run", "Adapt.run", "AuditVerb.run"} < names


def test_the_object_the_function_the_file_and_the_command_make_the_same_run(tmp_path: Path):
    file = tmp_path / "holdfast.yaml"
    file.write_text(json.dumps({**ASSESSED, "doubts": False}))
    given = {**ASSESSED, "doubts": False}
    runs = [tmp_path / name for name in ("object", "function", "file", "command")]
    results = [
        holdfast.Assess(**given).run(runs[0]),
        holdfast.assess(**given, run=runs[1]),
        read_settings(file, {}, kind=holdfast.Assess).run(runs[2]),
    ]
    options = [str(part) for key in ("threat", "suite") for part in (f"--{key}", ASSESSED[key])]
    arguments = ["assess", "mnist-cnn", "mnist-mini", *options, "-n", "16", "--no-doubts", "-q"]
    assert command([*arguments, "--run", str(runs[3])]) == 0
    results.append(holdfast.report(runs[3]))
    for result in results[1:]:
        for column in ("correct", "success", "queries"):
            assert torch.equal(result.evidence[column], results[0].evidence[column])
    about = [json.loads((run / "run.json").read_text()) for run in runs]
    assert all(each["digests"] == about[0]["digests"] for each in about)
    resumed = holdfast.Assess(**given).run(runs[3], resume=True)
    assert resumed["robust_accuracy"] == results[0]["robust_accuracy"]


def test_a_setting_is_given_once_and_only_to_a_command_that_uses_it():
    ray = holdfast.Ray("ray", ship=("nets.py",))
    with pytest.raises(UsageError, match="ship is given to assess and to Ray"):
        holdfast.Assess(**ASSESSED, on=ray, ship=["other.py"], workers=2)
    limited = holdfast.open_model("mnist-cnn", max_queries=3)
    with pytest.raises(UsageError, match="max_queries=3 is not possible for the model of harden"):
        holdfast.Harden(model=limited, data="mnist-mini")
    assert holdfast.Doctor(model=limited).max_queries == 3
    with pytest.raises(UsageError, match="max_queries"):  # of a model that is not behind a server
        holdfast.doctor(limited, "mnist-mini", n=4)
    with pytest.raises(UsageError, match="expected a mapping"):
        holdfast.Assess.model_validate(None)


def test_an_estimate_is_that_of_a_dry_run(capsys):
    estimate = holdfast.Assess(**ASSESSED, doubts=False).estimate()
    assert (estimate.n, estimate.attacks, estimate.tried) == (16, 1, 8)
    assert str(estimate).startswith("16 examples, 1 attacks: about ")


def test_references_and_clusters_are_settings_of_the_object():
    model = holdfast.open_model("net.pt", arch="net.py:make", trust_code=True)
    data = holdfast.open_data("table.csv", label="species")
    of_references = holdfast.Assess(model=model, data=data, on=holdfast.Ray("ray", timeout="1min"), workers=2)
    flat = holdfast.Assess(
        model="net.pt", arch="net.py:make", trust_code=True, data="table.csv", label="species",
        on="ray", timeout="1min", workers=2,
    )  # fmt: skip
    assert of_references.model_dump() == flat.model_dump()
    assert repr(holdfast.Doctor(model="net.pt")) == "Doctor(model='net.pt')"


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("Assess", {"n": 0}, r"assess\(\): n is 0; expected at least 1"),
        ("Assess", {"thret": "l2:1"}, r"assess\(\): unknown key 'thret'; did you mean 'threat'"),
        ("Assess", {"model": 3}, r"assess\(\): model is 3; expected an address"),
        ("Certify", {"threat": "spatial:rotate=5"}, "proved under linf, l2, l1, patch, table, text"),
        ("Certify", {"method": "smoothing"}, "sigma is missing"),
        ("Harden", {"recipe": "tradez"}, "did you mean 'trades'"),
        ("Harden", {"recipe": 5}, r"recipe is 5; expected a name, or settings with it, as in .use: NAME."),
        ("Assess", {"across": ("a", "b")}, "across is a tuple; give a list"),
        ("Harden", {"model": holdfast.open_model("net.onnx", input_shape=(4,))}, "input_shape=.4,. is not possible"),
        ("Assess", {"model": holdfast.open_model("net.pt", classes=3), "classes": 4}, "classes is given to assess and"),
    ],
)  # fmt: skip
def test_an_object_is_checked_when_it_is_created(kind, settings, message):
    with pytest.raises(UsageError, match=message):
        getattr(holdfast, kind)(**settings)


@dataclass(frozen=True)
class Listed(Corruptions):
    """A constraint that a file describes."""

    name = "table"
    file: str = ""

    @property
    def limits(self):
        return {"file": self.file}

    def __str__(self):
        return limits_text(self.name, self.limits)


def test_a_form_of_threats_is_one_entry_and_may_name_a_file(monkeypatch):
    monkeypatch.setitem(FORMS, "table", Form(f"{__name__}:Listed", file_argument("file")))
    for path in ("changes.json", "my changes, new.json"):
        text = f"table:{path_text(path)},access=scores,queries=9"
        threat = parse_threat(text)
        assert (threat.change.limits, threat.access, threat.queries) == ({"file": path}, "scores", 9)
        assert threat.constraint == Listed(file=path)
        assert threat.text == text
        assert (
            str(holdfast.Assess(threat=ThreatModel(Listed(file=path), access="scores", queries=9)).threat)
            == text
        )
    with pytest.raises(UsageError, match="the threat 'table:' has no file"):
        parse_threat("table:")
    with pytest.raises(UsageError, match="did you mean 'table'"):
        parse_threat("tabel:x")


def test_methods_refuse_arguments_that_they_do_not_document():
    with pytest.raises(TypeError, match="unexpected keyword argument 'result'"):
        holdfast.Explain(model="mnist-cnn", data="mnist-mini").run(result=None)
