"""Bounds and units of single features: the same numbers as for features that were scaled before."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import holdfast
from holdfast.core.errors import HoldfastError, UsageError
from holdfast.core.model import Classifier, Units, of_values
from holdfast.verbs.opening.resolve import open_subject
from holdfast.verbs.settings import Assess

LOW, HIGH = np.array([0, 17, -5, 0.0]), np.array([99_999, 90, 5, 1.0])
SCALED = np.random.default_rng(0).random((60, 4)).astype(np.float32)
X = (LOW + (HIGH - LOW) * SCALED).round(3).astype(np.float32)
Y = (SCALED @ [2, 1, 1, 0.2] > 2.1).astype(int)
NAMES = ("gain", "age", "delta", "rate")


class Scaling(nn.Module):
    """A network on scaled features, for features in their own units."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        low, high = (torch.tensor(side, dtype=torch.float32) for side in (LOW, HIGH))
        return self.net((x - low) / (high - low))


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    net[2].weight.data *= 4
    return net


def csv(path: Path) -> str:
    rows = [",".join(map(repr, map(float, row))) + f",{y}" for row, y in zip(X, Y, strict=True)]
    path.write_text("\n".join((",".join((*NAMES, "y")), *rows)))
    return str(path)


def test_a_radius_in_units_is_that_of_scaled_features(tmp_path: Path):
    net, bounds = network(), tmp_path / "bounds.json"
    y = net(torch.from_numpy(SCALED)).argmax(1)
    ends = dict(zip(NAMES, zip(LOW.tolist(), HIGH.tolist(), strict=True), strict=True))
    bounds.write_text(json.dumps(ends))
    settings = {"suite": "fgsm", "doubts": False}
    scaled = holdfast.assess(
        net, (torch.from_numpy((X - LOW) / (HIGH - LOW)).float(), y), "linf:0.1", **settings
    )
    for data, sides in (((X, y), (LOW, HIGH)), ((torch.from_numpy(X), y), ends_by_place(ends))):
        result = holdfast.assess(Scaling(net), data, "linf:0.1,unit=range", bounds=sides, **settings)
        assert float(result["robust_accuracy"]) == float(scaled["robust_accuracy"]) < 1
    table = holdfast.open_data(csv(tmp_path / "t.csv"), label="y")
    named = holdfast.assess(Scaling(net), table, "linf:0.1,unit=range", bounds=f"@{bounds}", **settings)
    assert named.evidence.threat.unit == "range"


@pytest.mark.slow
def test_certificates_in_units_are_those_of_scaled_features():
    net = network()
    y = net(torch.from_numpy(SCALED)).argmax(1)
    proofs = [
        holdfast.certify(model, (x[:20], y[:20]), threat, method="crown", **more)["certified_accuracy"]
        for model, x, threat, more in (
            (net, (X - LOW) / (HIGH - LOW), "linf:0.02", {}),
            (Scaling(net), X, "linf:0.02,unit=range", {"bounds": (LOW, HIGH)}),
        )
    ]
    assert float(proofs[0]) == float(proofs[1]) > 0


def ends_by_place(ends: dict) -> dict:
    return {str(place): sides for place, sides in enumerate(ends.values())}


@pytest.mark.parametrize("unit", ["range", "std", "@file"])
def test_attacked_inputs_are_returned_as_values_within_eps_units(unit, tmp_path: Path):
    sizes = {"range": HIGH - LOW, "std": X.astype(float).std(0), "@file": np.array([1000, 2, 0.5, 1e-3])}[
        unit
    ]
    if unit == "@file":
        (tmp_path / "u.json").write_text(json.dumps({"0": 1000, "1": 2, "2": 0.5, "3": 1e-3}))
        unit = f"@{tmp_path / 'u.json'}"
    net = Scaling(network())
    y = net(torch.from_numpy(X)).argmax(1).numpy()
    attacked = holdfast.attack(net, X, y, "pgd", f"linf:0.3,unit={unit}", bounds=(LOW, HIGH))
    x_adv = np.asarray(attacked.x_adv)
    change, limit = np.abs(x_adv - X).max(0), 0.3 * sizes
    assert (change <= limit + 1e-6 * (HIGH - LOW)).all() and (change[:3] > 0.9 * limit[:3]).all()
    assert ((x_adv >= LOW - 1e-6 * (HIGH - LOW)) & (x_adv <= HIGH + 1e-6 * (HIGH - LOW))).all()
    assert np.array_equal(net(torch.from_numpy(x_adv)).argmax(1).numpy() != y, attacked.success)


def test_trees_get_exactly_the_values_of_the_data():
    tree = pytest.importorskip("sklearn.tree")
    x = np.arange(60, dtype=np.float32).reshape(-1, 1) * [1, 1000, 7, 3]
    y = np.arange(60) % 2

    class Strict:
        """A classifier whose thresholds are values of the data, as in XGBoost."""

        classes_, n_features_in_ = np.array([0, 1]), 4

        def predict(self, rows):
            return (rows[:, 1] / 1000 % 2 == 1).astype(int)

    for model in (tree.DecisionTreeClassifier().fit(x, y), Strict()):
        for unit in ("range", "std"):
            threat = f"linf:0.001,unit={unit},access=labels,queries=3"
            result = holdfast.assess(
                model, (x.astype(np.float32), y), threat, "rays", bounds=(x.min(0), x.max(0))
            )
            assert float(result["clean_accuracy"]) == 1


@pytest.mark.parametrize("unit", ["range", "std"])
def test_missing_values_and_bytes_have_units_too(unit):
    sklearn = pytest.importorskip("sklearn.ensemble")
    model, y = sklearn.HistGradientBoostingClassifier(max_iter=3, min_samples_leaf=5), np.arange(60) % 2
    x = np.stack((y * 60.0 + 20, np.arange(60.0)), 1).astype(np.float32)
    for data, missing in ((x, True), (x.astype(np.uint8), False)):
        if missing:
            data = np.where(np.arange(120).reshape(60, 2) % 7 == 0, np.float32(np.nan), data)
        fitted = model.fit(data, y)
        threat, bounds = f"linf:0.01,unit={unit},access=labels,queries=3", ([0, 0], [100, 60])
        result = holdfast.assess(fitted, (data, y), threat, "rays", bounds=bounds, doubts=False)
        assert float(result["clean_accuracy"]) == pytest.approx(fitted.score(data, y))


def test_smoothing_is_advised_in_the_unit_of_the_threat():
    neighbours = pytest.importorskip("sklearn.neighbors").KNeighborsClassifier(3).fit(X, Y)
    with pytest.raises(UsageError) as caught:
        holdfast.certify(neighbours, (X, Y), "linf:0.05,unit=range", bounds=(LOW, HIGH))
    (threat, _) = caught.value.remedies[0].also
    assert threat.value == "l2:0.1,unit=range"


def test_a_hardened_model_is_one_of_values_again():
    units = Units(tuple(LOW), tuple(HIGH), (10.0, 0.0, 2.0, 1.0), exact=False)
    given = Classifier(Scaling(network()), mean=[1.0, 2, 3, 4], std=[1.0, 2, 4, 8])
    model = Classifier(given.net, mean=[1.0, 2, 3, 4], std=[1.0, 2, 4, 8])
    units.apply(model)
    z = units.normalisation.undone(torch.from_numpy(X).double())
    torch.testing.assert_close(model(z.float()), given(torch.from_numpy(X)), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(of_values(model)(torch.from_numpy(X)), given(torch.from_numpy(X)))
    assert model.units is units and of_values(model).units is None


def test_contents_of_files_are_part_of_the_identity_of_a_run(tmp_path: Path):
    digests, path = set(), tmp_path / "bounds.json"
    for highest, threat in ((99_999, "linf:1"), (100_000, "linf:1"), (100_000, "linf:1,unit=range")):
        path.write_text(
            json.dumps(ends_by_place(dict(enumerate(zip(LOW, (highest, *HIGH[1:]), strict=True)))))
        )
        settings = Assess(model=network(), data=(X, Y), threat=threat, bounds=f"@{path}")
        digests.add(open_subject(settings).digest)
    assert len(digests) == 3


@pytest.mark.parametrize(
    "bounds, threat, message",
    [
        ((LOW, HIGH), "linf:0.1,unit=mean", "unit is 'mean'; expected range"),
        ((LOW, HIGH), "l0:1,unit=range", "has none; leave it out"),
        ((LOW, HIGH[:3]), "linf:0.1", "bounds have 4 lowest and 3 highest values"),
        ((LOW[:3], HIGH[:3]), "linf:0.1", "bounds are of 3 features, and the data have 4"),
        ((HIGH, LOW), "linf:0.1", "the bounds of feature 0 are .*give the lower one first"),
        ({"0": [0, 1]}, "linf:0.1", "bounds has no entry for '1'"),
        ({"agee": [0, 1]}, "linf:0.1", "bounds has the feature 'agee'"),
        ("@nowhere.json", "linf:0.1", "file of bounds 'nowhere.json' does not exist"),
        (
            (LOW, HIGH - [0, 0, 0, 0.99]),
            "linf:0.1",
            "the value of feature 3 in row 0 .* outside its bounds 0 to 0.01",
        ),
    ],
)
def test_bounds_and_units_that_cannot_be_meant_are_refused(bounds, threat, message):
    with pytest.raises(HoldfastError, match=message):
        holdfast.assess(Scaling(network()), (X, Y), threat, "fgsm", bounds=bounds, doubts=False)


def test_images_have_one_range_and_no_unit_of_each_feature():
    data = torch.rand(4, 1, 2, 2), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(UsageError, match="the inputs are not rows of features"):
        holdfast.assess(nn.Flatten(), data, "linf:0.1,unit=std", "pgd")
