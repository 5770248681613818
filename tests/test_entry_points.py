"""Objects of other packages: each kind is found through its entry-point group, and used from the public interface."""

import sys

import pytest
import torch
import yaml

import holdfast
from holdfast.core import catalogue
from holdfast.core.errors import UsageError
from holdfast.reports.write import check_destination
from holdfast.settings.guard_settings import check_guard_settings
from holdfast.verbs.opening.recipes import build_recipe
from holdfast.verbs.settings import Harden

SOURCE = """
from dataclasses import dataclass
from typing import ClassVar

from holdfast.certifiers.provers import IBP
from holdfast.core.evidence import Doubt
from holdfast.doubts.protocol import DoubtTest
from holdfast.recipes.standard import Standard


@dataclass(frozen=True)
class Still:
    reach: float = 1.0
    needs: ClassVar[str] = "none"

    def __call__(self, model, batch, threat, *, rng):
        return batch.x


@dataclass(frozen=True)
class Norm:
    power: int = 2
    needs: ClassVar[tuple[str, ...]] = ()

    def __call__(self, seen):
        return seen.logits.norm(p=self.power, dim=1)


@dataclass(frozen=True)
class Interval(IBP):
    name: ClassVar[str] = "interval"


DULL = DoubtTest(
    title="Dull data", conclude=lambda case: Doubt("dull", "raised", 2.0, 1.0, 4, "dull"), free=True
)
def text(report, file):
    file.write(report.content["threat"]["constraint"])
"""
POINTS = {
    "attacks": "Still = added_package:Still",
    "recipes": "plain = added_package:Standard",
    "doubts": "dull = added_package:DULL",
    "detectors": "norm = added_package:Norm",
    "certifiers": "interval = added_package:Interval",
    "reports": ".txt = added_package:text",
}
FEW = {"threat": "linf:0.01", "n": 4}


def attack(folder):
    result = holdfast.assess("mnist-cnn", "mnist-mini", suite="still", doubts=False, **FEW)
    return result.evidence.attacks[0].name == "Still"


def recipe(folder):
    spec = Harden(recipe={"use": "plain", "training": {"epochs": 2}}).recipe
    return build_recipe(spec).training.epochs == 2


def doubt(folder):
    run = folder / "run"
    result = holdfast.assess(
        "mnist-cnn", "mnist-mini", suite="fgsm", run=run, accept_doubts={"dull": "known"}, **FEW
    )
    (stored,) = (each for each in holdfast.report(run).doubts if each.name == "dull")
    return stored.state == "raised" and '"Dull data"' in result.to_json()


def detector(folder):
    path = folder / "guard.yaml"
    rules = {"norm": {"power": 1, "threshold": 5.0, "action": "abstain", "mode": "enforce"}}
    path.write_text(yaml.safe_dump({"inputs": {"shape": [2]}, "rules": rules}))
    guard = holdfast.Guard.from_yaml(path)
    x = torch.tensor([[0.2, 0.3], [0.4, 0.5]])
    decision = guard.after(guard.before(x), torch.tensor([[1.0, 2.0], [4.0, 3.0]]))
    return [action.name for action in decision.actions] == ["ALLOW", "ABSTAIN"]


def certifier(folder):
    result = holdfast.certify("mnist-cnn", "mnist-mini", method="interval", **FEW)
    return "interval" in result.to_json()


def report(folder):
    result = holdfast.assess("mnist-cnn", "mnist-mini", suite="fgsm", doubts=False, **FEW)
    result.write(folder / "a.txt")
    return (folder / "a.txt").read_text() == "linf:0.01"


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A function that installs a package with one entry point."""

    def install(kind, point):
        (tmp_path / "added_package.py").write_text(SOURCE)
        info = tmp_path / "added_package-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: added-package\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[holdfast.{kind}]\n{point}\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "added_package", raising=False)

    return install


@pytest.mark.parametrize(
    ("kind", "use"),
    [
        ("attacks", attack),
        ("recipes", recipe),
        ("doubts", doubt),
        ("detectors", detector),
        ("certifiers", certifier),
        ("reports", report),
    ],
)
def test_an_entry_point_of_each_kind_is_used(kind, use, installed, tmp_path):
    installed(kind, POINTS[kind])
    assert use(tmp_path)


def test_every_kind_has_such_a_test():
    assert set(POINTS) == set(catalogue.BUNDLED)


def test_an_entry_point_of_another_type_is_refused_and_none_replaces_a_bundled_object(installed):
    installed("doubts", "odd = added_package:Still\nnoise = added_package:Still")
    assert catalogue.names("doubts").count("noise") == 1
    with pytest.raises(UsageError, match=r"'odd' of the group holdfast\.doubts .* expected an instance of"):
        holdfast.assess("mnist-cnn", "mnist-mini", suite="fgsm", **FEW)


def test_a_package_that_cannot_be_imported_is_named_before_the_run(installed, tmp_path):
    installed("reports", ".foo = absent_package:write")
    with pytest.raises(UsageError, match=r"'\.foo' of the group holdfast\.reports cannot be imported"):
        check_destination(tmp_path / "report.foo")


@pytest.mark.parametrize("point", ["queries = added_package:Norm", "schema = added_package:Norm"])
def test_a_detector_of_another_package_replaces_no_rule_of_a_guard(point, installed):
    installed("detectors", point)
    name = point.split(" ")[0]
    settings = check_guard_settings({"inputs": {"shape": [3]}, "rules": {name: {}}}, "guard.yaml")
    assert not settings.rules.detectors


def test_a_detector_that_is_no_dataclass_is_named(installed):
    installed("detectors", "odd = builtins:int")
    with pytest.raises(UsageError, match="'odd' of the group holdfast.detectors .* expected a dataclass"):
        check_guard_settings({"inputs": {"shape": [3]}, "rules": {"energy": {}}}, "guard.yaml")
