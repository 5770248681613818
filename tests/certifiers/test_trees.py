"""Tree ensembles: what is read predicts like the model, and worst cases are those of all cells between thresholds."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

import holdfast
from holdfast.attacks import Thresholds
from holdfast.certifiers.tree_ensembles import (
    Trees,
    monotone_in,
    opened_trees,
    proved_unchanged,
    smallest_lead,
)
from holdfast.certifiers.tree_reading import has_trees, inner_values, read_trees, refuse_other, rounded_up
from holdfast.core.batch import Batch
from holdfast.core.constraints import L2, Linf, allowed
from holdfast.core.draws import Draws
from holdfast.core.errors import Install, NoBounds, UsageError
from holdfast.core.model import Bounds, Classifier
from holdfast.core.threat import ThreatModel
from holdfast.io.models.adapting import adapted

lightgbm = pytest.importorskip("lightgbm")
sklearn = pytest.importorskip("sklearn")
xgboost = pytest.importorskip("xgboost")

from sklearn.decomposition import PCA  # noqa: E402
from sklearn.ensemble import (  # noqa: E402
    ExtraTreesClassifier,
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
)
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import MinMaxScaler, StandardScaler  # noqa: E402
from sklearn.tree import DecisionTreeClassifier  # noqa: E402

FEATURES = 3
TREES = {
    "tree": lambda: DecisionTreeClassifier(max_depth=4, random_state=0),
    "forest": lambda: RandomForestClassifier(5, max_depth=4, random_state=0),
    "pure forest": lambda: RandomForestClassifier(4, random_state=0),
    "extra trees": lambda: ExtraTreesClassifier(5, max_depth=4, random_state=0),
    "gradient boosting": lambda: GradientBoostingClassifier(n_estimators=5, random_state=0),
    "stumps": lambda: GradientBoostingClassifier(n_estimators=12, max_depth=1, random_state=0),
    "histograms": lambda: HistGradientBoostingClassifier(max_iter=4, max_leaf_nodes=6, min_samples_leaf=5),
    "xgboost": lambda: xgboost.XGBClassifier(n_estimators=5, max_depth=3, learning_rate=1),
    "xgboost stumps": lambda: xgboost.XGBClassifier(n_estimators=12, max_depth=1, learning_rate=1),
    "lightgbm": lambda: lightgbm.LGBMClassifier(
        n_estimators=4, num_leaves=6, min_child_samples=5, verbose=-1, learning_rate=0.5
    ),
    "lightgbm forest": lambda: lightgbm.LGBMClassifier(
        boosting="rf", bagging_freq=1, bagging_fraction=0.7, n_estimators=4, num_leaves=5, verbose=-1
    ),
    "scaled": lambda: make_pipeline(StandardScaler(), MinMaxScaler(), DecisionTreeClassifier(max_depth=4)),
}
MISSING = ("tree", "forest", "histograms", "xgboost", "xgboost stumps", "lightgbm")


def table(n=150, classes=2, features=FEATURES, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.random((n, features)).astype(np.float32)
    score = x[:, 0] + x[:, 1] * x[:, 2] + 0.3 * rng.random(n)
    return x, np.digitize(score, np.quantile(score, np.arange(1, classes) / classes))


def classifier(model, bounds=(0.0, 1.0)):
    wrapped = adapted(model)
    return Classifier(
        wrapped.net,
        bounds=Bounds(*bounds),
        classes=wrapped.classes,
        access=wrapped.access,
        output=wrapped.output,
    )


def correct(model, x, y, n=25):
    batch = Batch(torch.from_numpy(x[:n]), torch.from_numpy(y[:n]).long(), torch.arange(min(n, len(x))))
    return batch.take(model(batch.x).argmax(1) == batch.y)


def prover(model, batch, eps, **settings):
    return Trees(**settings).ready(model, batch, ThreatModel(Linf(eps)))


def breakable(model, one, eps):
    """Whether an input of any cell in the ball is misclassified by the model itself."""
    sides = []
    for cuts, value in zip(
        read_trees(model).ensemble.on_grid("float32").cuts, one.x[0].tolist(), strict=True
    ):
        low, high = max(value - eps, 0.0), min(value + eps, 1.0)
        inside = [cut for cut in cuts if low <= cut <= high]
        sides.append([low if low == low else value, *inside])  # the smallest value of each cell
    rows = torch.tensor(list(itertools.product(*sides)), dtype=torch.float32)
    return bool((model(rows).argmax(1) != one.y).any())


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("name", sorted(set(TREES) - {"scaled"}))
def test_exactly_the_examples_without_a_misclassified_cell_are_certified(name, classes):
    x, y = table(classes=classes)
    model = classifier(TREES[name]().fit(x, y))
    batch, eps = correct(model, x, y), 0.07
    proofs = prover(model, batch, eps)(batch)
    expected = torch.tensor([breakable(model, batch.take(torch.tensor([k])), eps) for k in range(len(batch))])
    assert torch.equal(proofs.certified, ~expected)
    assert torch.equal(proofs.broken, expected)
    assert (model(proofs.x_adv).argmax(1) != batch.y)[proofs.broken].all()
    assert allowed(Linf(eps), proofs.x_adv, batch.x, model.bounds).all()
    assert (proofs.bound > 0).equal(proofs.certified)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("name", MISSING)
def test_missing_values_stay_missing(name, classes):
    x, y = table(classes=classes)
    x[np.random.default_rng(1).random(x.shape) < 0.15] = np.nan
    model = classifier(TREES[name]().fit(x, y))
    batch, eps = correct(model, x, y), 0.07
    proofs = prover(model, batch, eps)(batch)
    expected = [breakable(model, batch.take(torch.tensor([k])), eps) for k in range(len(batch))]
    assert proofs.broken.tolist() == expected
    assert torch.equal(proofs.x_adv.isnan(), batch.x.isnan())


@pytest.mark.parametrize("name", ["tree", "forest"])
def test_what_the_comparison_with_the_model_accepts_is_part_of_the_bound(name):
    x, y = np.array([[0.2], [0.8]] * 4, np.float32), np.array([0, 1] * 4)
    forest = {"bootstrap": False} if name == "forest" else {}
    estimator = TREES[name]().set_params(max_depth=1, **forest).fit(x, y)
    for tree in getattr(estimator, "estimators_", [estimator]):
        tree.tree_.value[1:, 0] = [[0.9, 0.1], [0.5 + 3e-7, 0.5 - 3e-7]]  # the worst lead is 6e-7
    batch = Batch(torch.tensor([[0.2]]), torch.tensor([0]), torch.arange(1))
    assert prover(classifier(estimator), batch, 0.7)(batch).certified.all()
    exact = estimator.predict_proba
    estimator.predict_proba = lambda rows: (
        exact(rows) + np.array([-4e-7, 4e-7])
    )  # accepted, and class 1 there
    other = prover(classifier(estimator), batch, 0.7)
    proofs = other(batch)
    assert other.ensemble.slack > 8e-7
    assert not proofs.certified.any()
    assert proofs.broken.all()


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("name", TREES)
def test_trees_predict_like_the_model_at_their_thresholds(name, missing):
    if missing and name not in MISSING:
        pytest.skip("this estimator accepts no missing values")
    x, y = table(classes=3)
    if missing:
        x[::7] = np.nan
    model = TREES[name]().fit(x, y)
    trees = read_trees(classifier(model))
    rows = trees.rows(x.astype(np.float64))
    checked = refuse_other(trees, rows)  # which also compares rows next to thresholds
    predicted = checked.ensemble.predictions(checked.ensemble.ranks(rows))
    assert (predicted == model.predict(x)).mean() == 1
    value = trees.ensemble.value.copy()
    value[trees.ensemble.feature < 0] *= 1.1
    with pytest.raises(NoBounds, match="other scores"):
        refuse_other(replace(trees, ensemble=replace(trees.ensemble, value=value)), rows)


def test_a_pipeline_of_scalers_is_certified_like_its_tree():
    x, y = table()
    scaled = classifier(TREES["scaled"]().fit(x, y))
    batch = correct(scaled, x, y)
    proofs = prover(scaled, batch, 0.07)(batch)
    assert torch.equal(proofs.certified, ~proofs.broken)
    corners = torch.tensor(list(itertools.product((-0.07, 0.0, 0.07), repeat=FEATURES)), dtype=torch.float32)
    for k in proofs.certified.nonzero()[:, 0]:
        assert (scaled((batch.x[k] + corners).clamp(0, 1)).argmax(1) == batch.y[k]).all()
    attack = Thresholds().reading(inner_values(scaled))
    x_adv = attack(scaled, batch, ThreatModel(Linf(0.07), access="scores"), rng=Draws(0))
    assert not (proofs.certified & (scaled(x_adv).argmax(1) != batch.y)).any()


def test_values_that_lightgbm_treats_as_zeros_are_read_like_it():
    x, y = table(300)
    x = (np.round(x * 4) / 4 - 0.5).astype(np.float32)  # thresholds are next to 0, at 1e-35 and -1e-35
    model = classifier(lightgbm.LGBMClassifier(n_estimators=10, min_child_samples=5, verbose=-1).fit(x, y))
    trees = read_trees(model)
    assert any(0 < abs(cut) < 1e-30 for cuts in trees.ensemble.cuts for cut in cuts)
    refuse_other(trees, trees.rows(x.astype(np.float64)))
    batch = correct(Classifier(model.net, bounds=Bounds(-1, 1), output=model.output, access="scores"), x, y)
    proofs = prover(Classifier(model.net, bounds=Bounds(-1, 1), output=model.output), batch, 1e-3)(batch)
    assert (proofs.certified | proofs.broken).all()


def test_thresholds_are_rounded_up_to_the_numbers_that_a_library_compares():
    third = np.array([1 / 3, 0.5, 1e300])
    assert rounded_up(third, "float32").tolist() == [float(np.float32(1 / 3)), 0.5, np.inf]
    above = rounded_up(third, "float32", beyond=True)
    assert above[0] == np.float32(1 / 3)
    assert above[1] == np.nextafter(np.float32(0.5), np.float32(1))
    assert rounded_up(third, "float64", beyond=True)[1] == np.nextafter(0.5, 1)


@pytest.mark.parametrize("name", ["stumps", "xgboost stumps"])
def test_the_threshold_search_breaks_every_example_of_a_stump_ensemble_that_is_not_certified(name):
    x, y = table(300)
    model = classifier(TREES[name]().fit(x, y))
    batch = correct(model, x, y, 120)
    for eps in (0.01, 0.05, 0.2):
        threat = ThreatModel(Linf(eps), access="scores")
        attack = Thresholds().reading(inner_values(model))
        x_adv = attack(model, batch, threat, rng=Draws(0))
        broken = model(x_adv).argmax(1) != batch.y
        assert torch.equal(prover(model, batch, eps)(batch).certified, ~broken)


def test_large_ensembles_are_decided_without_contradicting_an_attack():
    x, y = table(400, features=8)
    model = classifier(xgboost.XGBClassifier(n_estimators=40, max_depth=5).fit(x, y))
    batch, threat = correct(model, x, y, 40), ThreatModel(Linf(0.04), access="scores")
    proofs = prover(model, batch, 0.04)(batch)
    x_adv = Thresholds().reading(inner_values(model))(model, batch, threat, rng=Draws(0))
    assert not (proofs.certified & (model(x_adv).argmax(1) != batch.y)).any()
    assert (proofs.certified | proofs.broken).all()
    assert proofs.certified.any()
    assert proofs.broken.any()


@pytest.mark.parametrize("name", ["xgboost", "xgboost stumps", "histograms", "forest"])
def test_thresholds_at_the_end_of_the_ball_are_decided(name):
    x, y = table()
    x = np.round(x * 16) / 16  # thresholds are in the middle of two values, at a distance of exactly eps
    model = classifier(TREES[name]().fit(x, y))
    for eps in (1 / 32, 3 / 32):
        for dtype in (torch.float32, torch.float64):
            batch = correct(model, x, y)
            proofs = prover(model, batch.at(batch.x.to(dtype)), eps)(batch.at(batch.x.to(dtype)))
            assert (proofs.certified | proofs.broken).all()
            assert (model(proofs.x_adv).argmax(1) != batch.y)[proofs.broken].all()


def test_a_time_limit_ends_the_search():
    x, y = table(400, features=8)
    model = classifier(xgboost.XGBClassifier(n_estimators=40, max_depth=6).fit(x, y))
    batch = correct(model, x, y, 10)
    ready = prover(model, batch, 0.3)
    ranks, low, high = (ready.ranks(x)[0] for x in (batch.x, batch.x - 0.3, batch.x + 0.3))
    pair = (int(batch.y[0]), 1 - int(batch.y[0]))
    relaxed = smallest_lead(ready.ensemble, ranks, low, high, pair, -np.inf, 0.0).bound
    stopped = smallest_lead(ready.ensemble, ranks, low, high, pair, relaxed + 1e-3, 0.0)
    assert stopped.stopped
    assert not stopped.attained
    assert stopped.bound == -np.inf


def test_the_bound_is_the_smallest_margin_of_all_cells():
    x, y = table()
    model = classifier(TREES["xgboost stumps"]().fit(x, y))
    batch = correct(model, x, y, 10)
    ready = opened_trees(model, batch, Linf(0.05), 60.0)
    ranks = ready.ranks(batch.x)[0]
    low, high = ready.ranks(batch.x - 0.2)[0], ready.ranks(batch.x + 0.2)[0]
    worst = smallest_lead(ready.ensemble, ranks, low, high, (1, 0), -np.inf, np.inf)
    cells = np.array(list(itertools.product(*(range(a, b + 1) for a, b in zip(low, high, strict=True)))))
    assert worst.bound == pytest.approx(ready.ensemble.scores(cells).min())
    at = ranks.copy()
    at[list(worst.ranks)] = list(worst.ranks.values())
    assert ready.ensemble.scores(at[None])[0, 0] == pytest.approx(worst.bound)


def test_single_leaves_and_constant_features_need_no_search():
    x, y = table()
    x[:, 1] = 0.5
    model = classifier(xgboost.XGBClassifier(n_estimators=3, gamma=1e9).fit(x, y))  # no split has any gain
    batch = correct(model, x, y)
    assert prover(model, batch, 1.0)(batch).certified.all()
    constant = classifier(DecisionTreeClassifier(max_depth=3).fit(x, y))
    batch = correct(constant, x, y)
    proofs = prover(constant, batch, 0.1)(batch)
    assert (proofs.certified | proofs.broken).all()


def refused(model, x, message, error=NoBounds):
    wrapped = classifier(model)
    batch = Batch(torch.from_numpy(x[:8]), torch.zeros(8, dtype=torch.int64), torch.arange(8))
    with pytest.raises(error, match=message):
        prover(wrapped, batch, 0.1)


@pytest.mark.parametrize("booster", ["dart", "gblinear"])
def test_other_boosters_of_xgboost_are_refused(booster):
    x, y = table()
    refused(xgboost.XGBClassifier(booster=booster, n_estimators=3).fit(x, y), x, f"is {booster}; gbtree was")


def test_splits_that_are_no_thresholds_are_refused():
    x, y = table()
    kinds = (x * 4).astype(np.int64).astype(np.float32)
    matrix = xgboost.DMatrix(kinds, label=y, feature_types=["c", "q", "q"], enable_categorical=True)
    booster = xgboost.train({"objective": "binary:logistic", "max_cat_to_onehot": 1}, matrix, 3)
    refused(booster, kinds, "split by categories")
    data = lightgbm.Dataset(kinds, label=y, categorical_feature=[0], params={"verbose": -1})
    settings = {"objective": "binary", "verbose": -1, "min_data_per_group": 1, "cat_smooth": 1}
    refused(lightgbm.train(settings, data, 3), kinds, "split by categories")
    histograms = HistGradientBoostingClassifier(max_iter=3, categorical_features=[0]).fit(kinds, y)
    refused(histograms, kinds, "split by categories")
    zeros = lightgbm.LGBMClassifier(n_estimators=2, zero_as_missing=True, verbose=-1).fit(kinds, y)
    refused(zeros, kinds, "zeros as missing")
    several = xgboost.XGBClassifier(n_estimators=2, multi_strategy="multi_output_tree", tree_method="hist")
    refused(several.fit(*table(classes=3)), x, "several outputs")
    refused(xgboost.XGBClassifier(n_estimators=2, missing=-1.0).fit(x, y), x, "NaN was expected")


def test_models_that_are_no_sums_of_trees_are_refused():
    x, y = table()
    refused(LogisticRegression().fit(x, y), x, "whose trees cannot be read")
    refused(make_pipeline(PCA(), DecisionTreeClassifier()).fit(x, y), x, "PCA of the pipeline")
    initial = GradientBoostingClassifier(n_estimators=2, init=LogisticRegression()).fit(x, y)
    refused(initial, x, "initial estimator")
    assert not has_trees(classifier(LogisticRegression().fit(x, y)))


def test_other_norms_and_a_missing_package_are_refused(monkeypatch):
    x, y = table()
    model = classifier(TREES["xgboost"]().fit(x, y))
    batch = correct(model, x, y)
    with pytest.raises(UsageError, match="expected a ball of the norm linf"):
        Trees().ready(model, batch, ThreatModel(L2(0.1)))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError) as error:
        prover(model, batch, 0.1)
    assert error.value.remedies == (Install("trees"),)
    stumps = classifier(TREES["stumps"]().fit(x, y))
    assert prover(stumps, correct(stumps, x, y), 0.1).simple


def test_early_stopping_limits_the_trees_that_are_read():
    x, y = table(300)
    model = xgboost.XGBClassifier(n_estimators=60, early_stopping_rounds=2, learning_rate=1)
    model.fit(x[:200], y[:200], eval_set=[(x[200:], y[200:])], verbose=False)
    ensemble = read_trees(classifier(model)).ensemble
    assert len(ensemble.roots) == model.best_iteration + 1 < model.get_booster().num_boosted_rounds()


def increases(ensemble, features, classes):
    """Whether the lead of each class decreases anywhere when a feature increases, over all cells."""
    cells = np.array(list(itertools.product(*(range(len(cuts) + 1) for cuts in ensemble.cuts))))
    for feature in features:
        up = cells[cells[:, feature] < len(ensemble.cuts[feature])]
        above = up.copy()
        above[:, feature] += 1
        if (ensemble.scores(above) < ensemble.scores(up) - 1e-12).any():
            return False
    return True


def test_monotone_features_are_proved_from_the_trees():
    x, y = table(400)
    settings = {"max_iter": 4, "max_leaf_nodes": 6, "min_samples_leaf": 5}
    proved = HistGradientBoostingClassifier(monotonic_cst=[1, 0, 1], **settings).fit(x, y)
    ensemble = read_trees(classifier(proved)).ensemble
    assert monotone_in(ensemble, [0, 2], 1, 1)
    assert monotone_in(ensemble, [0, 2], -1, 0)
    assert not monotone_in(ensemble, [0], -1, 1)
    assert increases(ensemble, [0, 2], 2)
    plain = read_trees(classifier(HistGradientBoostingClassifier(**settings).fit(1 - x, y))).ensemble
    assert monotone_in(plain, [1], 1, 1) <= increases(plain, [1], 2)
    assert not monotone_in(plain, [0], 1, 1)


def test_only_rows_of_the_class_that_cannot_be_lowered_are_proved():
    x, y = table(400)
    model = HistGradientBoostingClassifier(monotonic_cst=[1, 1, 1], max_iter=5).fit(x, y)
    wrapped = classifier(model)
    trees = read_trees(wrapped)
    trees = refuse_other(trees, trees.rows(x.astype(np.float64)))
    ranks = trees.ensemble.ranks(trees.rows(x.astype(np.float64)))
    proved = proved_unchanged(trees.ensemble, ranks, [0, 1, 2])
    predicted = model.predict(x)
    assert proved[predicted == 1].all()
    assert not proved[predicted == 0].any()
    grown = x + np.random.default_rng(0).random(x.shape).astype(np.float32) * 3
    assert (model.predict(grown)[proved] == predicted[proved]).all()
    assert proved_unchanged(trees.ensemble, ranks, [0, 1, 2], -1)[predicted == 0].all()


def test_a_tree_that_is_not_monotone_prevents_the_proof():
    x, y = table(400)
    ensemble = read_trees(classifier(DecisionTreeClassifier(max_depth=6, random_state=0).fit(x, y))).ensemble
    for features in ([0], [1], [2]):
        assert monotone_in(ensemble, features, 1, 1) == increases_of_class(ensemble, features, 1)


def increases_of_class(ensemble, features, label):
    single = replace(
        ensemble, value=ensemble.value[:, label : label + 1], base=ensemble.base[label : label + 1]
    )
    return increases(single, features, 2)


@pytest.mark.slow
def test_certify_and_assess_choose_the_methods_for_trees(tmp_path):
    x, y = table(200)
    model = TREES["xgboost"]().fit(x, y)
    model.save_model(tmp_path / "model.json")
    data = holdfast.open_data((x[:60], y[:60]))
    result = holdfast.certify(tmp_path / "model.json", data, threat="linf:0.03", n=20)
    assert [record.name for record in result.evidence.proofs] == ["trees"]
    decided = result.evidence["certified"] | result.evidence["success"]
    assert decided[result.evidence["correct"]].all()
    assert [record.name for record in result.evidence.attacks] == ["Thresholds", "Square"]
    assessed = holdfast.assess(model, data, threat="linf:0.03", n=8)
    assert [record.name for record in assessed.evidence.attacks] == ["Thresholds", "Square"]
    assert not (result.evidence["certified"][:8] & assessed.evidence["success"]).any()
    hidden = holdfast.assess(model, data, threat="linf:0.03,access=scores", n=8)
    assert [record.name for record in hidden.evidence.attacks] == ["Square"]
