"""Estimators as models: a run says of them what scikit-learn says, and their files open without running code."""

import io
import json
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import holdfast
from holdfast.attacks import RayS, Square
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.model import Classifier
from holdfast.io.data.data import open_data
from holdfast.io.data.layouts import DeclaredData
from holdfast.io.data.loaders import as_data
from holdfast.io.models.models import Declared, open_model
from holdfast.io.models.skops_files import refuse_access
from holdfast.io.sandbox.estimators import read

sklearn = pytest.importorskip("sklearn")

from sklearn.base import BaseEstimator, ClassifierMixin  # noqa: E402
from sklearn.cluster import FeatureAgglomeration, KMeans  # noqa: E402
from sklearn.compose import make_column_transformer  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402
from sklearn.decomposition import PCA  # noqa: E402
from sklearn.ensemble import (  # noqa: E402
    HistGradientBoostingClassifier,
    IsolationForest,
    RandomForestClassifier,
    StackingClassifier,
    VotingClassifier,
)
from sklearn.feature_extraction.text import CountVectorizer, HashingVectorizer, TfidfVectorizer  # noqa: E402
from sklearn.linear_model import LinearRegression, LogisticRegression, SGDClassifier  # noqa: E402
from sklearn.model_selection import GridSearchCV  # noqa: E402
from sklearn.multiclass import OneVsRestClassifier  # noqa: E402
from sklearn.naive_bayes import GaussianNB  # noqa: E402
from sklearn.neighbors import KNeighborsClassifier  # noqa: E402
from sklearn.pipeline import FeatureUnion, Pipeline, make_pipeline  # noqa: E402
from sklearn.preprocessing import FunctionTransformer, MinMaxScaler, OneHotEncoder, StandardScaler  # noqa: E402
from sklearn.svm import SVC, LinearSVC  # noqa: E402
from sklearn.tree import DecisionTreeClassifier  # noqa: E402

pytestmark = pytest.mark.usefixtures("in_this_process")
DIGITS, CLASS = load_digits(return_X_y=True)
DIGITS = (DIGITS / 16).astype(np.float32)
FIT, JUDGED = slice(0, 400), slice(1000, 1060)
X, Y = DIGITS[FIT], CLASS[FIT]
SHOWN = DIGITS[JUDGED]


def logistic():
    return LogisticRegression(max_iter=300)


def wrapped(estimator) -> Classifier:
    return Declared().wrap(estimator)


def assessed(estimator, y, x=SHOWN, **said):
    return holdfast.assess(estimator, (x, y), "linf:0.05", [Square(queries=30)], doubts=False, **said)


CLASSIFIERS = {
    "probabilities": (logistic(), "scores"),
    "ties": (KNeighborsClassifier(4), "scores"),
    "forest": (RandomForestClassifier(6, random_state=0), "scores"),
    "pipeline": (make_pipeline(StandardScaler(), logistic()), "scores"),
    "decisions": (LinearSVC(), "scores"),
    "pairs of classes": (SVC(decision_function_shape="ovo"), "labels"),
    "labels alone": (
        VotingClassifier(
            [("tree", DecisionTreeClassifier(random_state=0)), ("near", KNeighborsClassifier())]
        ),
        "labels",
    ),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_verdict_is_that_of_predict(name):
    estimator, access = CLASSIFIERS[name]
    y = CLASS[JUDGED]
    estimator.fit(X, Y)
    attack = Square(queries=30) if access == "scores" else RayS(queries=60)
    result = holdfast.assess(
        estimator, (SHOWN, y), "linf:0.15", [attack], n=40, doubts=False, save_adversarial=True
    )
    assert result.evidence.model["access"] == access
    assert result.metrics["clean_accuracy"].value == estimator.score(SHOWN[:40], y[:40])
    adversarial, ids = result.adversarial["x"].double().numpy(), result.adversarial["id"]
    assert len(ids) > 2
    assert (estimator.predict(adversarial) != y[ids]).all()


def test_scores_are_those_of_the_estimator_to_the_last_bit():
    forest = RandomForestClassifier(7, random_state=0).fit(X, Y)
    net = wrapped(forest).net
    given = forest.predict_proba(SHOWN.astype(np.float64)).astype(np.float32)
    ties = (given == given.max(1, keepdims=True)).sum(1) > 1
    assert (net(torch.from_numpy(SHOWN)).numpy()[~ties] == given[~ties]).all()
    assert ties.any()


def test_labels_are_looked_up_among_the_classes_of_the_estimator():
    y = CLASS[JUDGED]
    for labels, said in ((Y + 1, y + 1), (np.where(Y > 4, 1, -1), np.where(y > 4, 1, -1))):
        estimator = logistic().fit(X, labels)
        assert assessed(estimator, said).metrics["clean_accuracy"].value == estimator.score(SHOWN, said)
    names = np.array(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])
    estimator = logistic().fit(X, names[Y])
    for said in (names[y], list(names[y]), names[y].astype(object)):
        result = assessed(estimator, said)
        assert result.metrics["clean_accuracy"].value == estimator.score(SHOWN, names[y])
    with pytest.raises(
        TargetError, match=r"labels of .* contain 0, but the classes of the model are 1, 2, 3"
    ):
        assessed(logistic().fit(X, Y + 1), y)
    with pytest.raises(TargetError, match="text labels ten, and the model has the names of eight, five"):
        assessed(estimator, np.array(["ten"] * len(y)))


@pytest.mark.parametrize("form", ["npz", "csv"])
def test_labels_of_files_are_looked_up_too(tmp_path: Path, form: str):
    labels = np.where(CLASS[JUDGED] > 4, 5, -2)
    expected = DeclaredData(classes=2, class_names=("-2", "5"), class_labels=(-2, 5))
    place = tmp_path / f"data.{form}"
    if form == "npz":
        np.savez(place, x=SHOWN, y=labels)
    else:
        rows = [",".join(map(str, (*x[:2], y))) for x, y in zip(SHOWN, labels, strict=True)]
        place.write_text("\n".join(["a,b,y", *rows]))
    data = open_data(str(place), label="y" if form == "csv" else None, expected=expected)
    assert data.read(0, len(data)).y.tolist() == (labels == 5).astype(int).tolist()
    assert (
        as_data(SHOWN, labels, expected=expected).read(0, 60).y.tolist() == (labels == 5).astype(int).tolist()
    )


@pytest.mark.parametrize("shape", [(64,), (8, 8), (1, 8, 8), (8, 8, 1)])
def test_images_are_flattened_where_that_gives_the_features(shape):
    estimator = logistic().fit(X, Y)
    result = assessed(estimator, CLASS[JUDGED], SHOWN.reshape(-1, *shape))
    assert result.metrics["clean_accuracy"].value == estimator.score(SHOWN, CLASS[JUDGED])


def test_other_shapes_are_refused_with_both_numbers():
    with pytest.raises(
        TargetError, match=r"fitted on 64 features, but an example of shape \(60,\) has 60 values"
    ):
        assessed(logistic().fit(X, Y), CLASS[JUDGED], SHOWN[:, :60])


class Threshold(ClassifierMixin, BaseEstimator):
    """A classifier whose class is not that of its largest probability."""

    def __init__(self, at: float = 0.4) -> None:
        self.at = at

    def fit(self, x, y):
        self.inner_ = logistic().fit(x, y)
        self.classes_, self.n_features_in_ = self.inner_.classes_, x.shape[1]
        return self

    def predict_proba(self, x):
        return self.inner_.predict_proba(x)

    def predict(self, x):
        return (self.predict_proba(x)[:, 1] > self.at).astype(int)


def test_a_threshold_of_its_own_decides():
    y = (CLASS[JUDGED] > 4).astype(int)
    estimator = Threshold().fit(X, (Y > 4).astype(int))
    assert (estimator.predict(SHOWN) != estimator.predict_proba(SHOWN).argmax(1)).any()
    result = assessed(estimator, y)
    assert result.metrics["clean_accuracy"].value == estimator.score(SHOWN, y)
    assert any("than predict()" in note for note in result.evidence.notes)


def test_columns_of_a_table_are_matched_by_name(tmp_path: Path):
    pandas = pytest.importorskip("pandas")
    x = np.random.default_rng(0).random((60, 3))
    frame = pandas.DataFrame(x, columns=["a", "b", "c"]).assign(label=(x[:, 0] > 0.5).astype(int))
    model = DecisionTreeClassifier().fit(frame[["a", "b", "c"]], frame.label)
    turned = frame[["label", "c", "b", "a"]]
    turned.to_csv(tmp_path / "t.csv", index=False)
    for data in (turned, str(tmp_path / "t.csv"), (turned[["c", "b", "a"]], turned.label)):
        label = None if isinstance(data, tuple) else "label"
        found = holdfast.assess(
            model, holdfast.open_data(data, label=label), "linf:0.01,queries=5", Square(), doubts=False
        )
        assert found["clean_accuracy"].value == 1
    with pytest.raises(
        TargetError, match=r"fitted on 3 named columns, and .* has 'd' beside them; .*drop=\('d',\)"
    ):
        holdfast.assess(model, holdfast.open_data(turned.assign(d=0.5), label="label"), "linf:0.01")
    with pytest.raises(
        TargetError, match="the data frame lacks 'a' and has 'z' beside them; give the columns as"
    ):
        holdfast.assess(
            model, holdfast.open_data(turned.rename(columns={"a": "z"}), label="label"), "linf:0.01"
        )


def test_columns_that_are_picked_by_name_are_given_by_name():
    pd = pytest.importorskip("pandas")
    table = pd.DataFrame(X, columns=[f"p{i}" for i in range(64)])
    picks = make_column_transformer((MinMaxScaler(), [f"p{i}" for i in range(32)]), remainder="passthrough")
    for estimator in (
        make_pipeline(picks, logistic()),
        logistic(),
    ):  # the second warns when it is given an array
        estimator.fit(table, Y)
        shown = pd.DataFrame(SHOWN, columns=table.columns)
        assert assessed(estimator, CLASS[JUDGED]).metrics["clean_accuracy"].value == estimator.score(
            shown, CLASS[JUDGED]
        )


REFUSED = {
    "unfitted": (logistic, "LogisticRegression is not fitted; call fit"),
    "regressor": (lambda: LinearRegression().fit(X, Y), "LinearRegression is a regressor, and no classifier"),
    "clusters": (lambda: KMeans(2, n_init=1).fit(X), "KMeans is not a classifier"),
    "outliers": (lambda: IsolationForest(n_estimators=2).fit(X), "IsolationForest is not a classifier"),
    "several outputs": (
        lambda: DecisionTreeClassifier().fit(X, np.stack((Y, Y), 1)),
        "several labels per example",
    ),
    "several labels": (
        lambda: OneVsRestClassifier(DecisionTreeClassifier()).fit(X, np.eye(10, dtype=int)[Y]),
        "several labels per example",
    ),
    "one class": (lambda: DecisionTreeClassifier().fit(X, 0 * Y), r"has 1 class \(\[0\]\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_classifier_is_refused(name):
    make, said = REFUSED[name]
    with pytest.raises(TargetError, match=said):
        assessed(make(), CLASS[JUDGED])


def test_a_class_is_no_model():
    with pytest.raises(UsageError, match="model is the class LogisticRegression; give an object of it"):
        assessed(LogisticRegression, CLASS[JUDGED])


def test_an_estimator_is_not_hardened():
    with pytest.raises(
        TargetError, match="cannot be trained: LogisticRegression is an estimator without gradients"
    ):
        holdfast.harden(logistic().fit(X, Y), (SHOWN, CLASS[JUDGED]), "linf:0.1")


def test_the_digest_of_an_estimator_depends_on_what_it_was_fitted_to():
    one, same, other = (
        DecisionTreeClassifier(random_state=0).fit(X[rows], Y[rows]) for rows in (FIT, FIT, slice(0, 200))
    )
    digests = [assessed(each, CLASS[JUDGED]).evidence.model["digest"] for each in (one, same, other)]
    assert digests[0] == digests[1] != digests[2]


def test_a_factory_may_return_an_estimator(tmp_path: Path):
    code = tmp_path / "own.py"
    code.write_text(
        "from sklearn.datasets import load_iris\nfrom sklearn.tree import DecisionTreeClassifier\n"
        "def make(depth: int = 2):\n"
        "    return DecisionTreeClassifier(max_depth=depth, random_state=0).fit(*load_iris(return_X_y=True))\n"
        "ready = make()\n"
    )
    opened = [open_model(f"{code}:make"), open_model(f"{code}:ready")]
    assert [each.access for each in opened] == ["scores", "scores"]
    assert opened[0].digest != open_model(f"{code}:make", model_args={"depth": "1"}).digest


def test_a_skops_file_opens_and_is_what_was_saved(tmp_path: Path):
    sio = pytest.importorskip("skops.io")
    estimator = make_pipeline(StandardScaler(), logistic()).fit(X, np.where(Y > 4, "high", "low"))
    sio.dump(estimator, tmp_path / "m.skops")
    opened = open_model(str(tmp_path / "m.skops"))
    assert opened.model.class_names == ("high", "low")
    logits = opened.model(torch.from_numpy(SHOWN))
    np.testing.assert_allclose(
        logits.softmax(1), estimator.predict_proba(SHOWN.astype(np.float64)), rtol=1e-4
    )


def doubled(x):
    return 2 * x


def with_first(step, **attributes):
    """A fitted pipeline whose first step is then replaced by `step` with other attributes, as in a hostile file."""
    pipeline = make_pipeline(StandardScaler(), logistic()).fit(X, Y)
    vars(step).update(attributes)
    pipeline.steps[0] = ("hostile", step)
    return pipeline


def in_containers(value):
    return with_first(StandardScaler(), more={"a": [(1, np.array([None, value], dtype=object))]})


READERS = {
    "input of a vectorizer": (
        lambda: with_first(CountVectorizer(input="filename")),
        r"steps\[0\]\[1\]\.input = 'filen",
    ),
    "input, hashed": (
        lambda: with_first(HashingVectorizer(input="file")),
        r"steps\[0\]\[1\]\.input = 'file', ",
    ),
    "input, another text": (
        lambda: with_first(TfidfVectorizer(), input=np.str_("filename")),
        r"\.input = <str_>",
    ),
    "memory": (
        lambda: Pipeline([("a", logistic())], memory="cache").fit(X, Y),
        r"memory = 'cache', .*memory=None",
    ),
    "memory, inner": (
        lambda: with_first(Pipeline([("a", MinMaxScaler())], memory="c")),
        r"steps\[0\]\[1\]\.memory",
    ),
    "memory, of a cluster": (
        lambda: with_first(FeatureAgglomeration(memory="c", pooling_func=None)),
        r"steps\[0\]\[1\]\.memory",
    ),
    "out": (
        lambda: with_first(FunctionTransformer(np.absolute, kw_args={"out": np.array(["a"], dtype=object)})),
        r"steps\[0\]\[1\]\.kw_args = <dict>, ",
    ),
    "out, inverse": (lambda: with_first(FunctionTransformer(inv_kw_args={"out": 1})), r"\.inv_kw_args"),
    "two arrays": (
        lambda: with_first(FunctionTransformer(np.add)),
        r"steps\[0\]\[1\]\.func = add, which is a func",
    ),
    "elsewhere": (
        lambda: with_first(CountVectorizer(tokenizer=np.log1p)),
        r"\.tokenizer = log1p, which is a func",
    ),
    "in place of a method": (lambda: with_first(StandardScaler(), transform=np.exp), r"\.transform = exp"),
    "in containers": (lambda: in_containers(np.exp), r"more\['a'\]\[0\]\[1\]\[1\] = exp"),
    "a nested estimator": (lambda: in_containers(CountVectorizer(input="file")), r"\[1\]\.input = 'file'"),
}


@pytest.mark.parametrize(("hostile", "message"), READERS.values(), ids=READERS)
def test_a_skops_file_of_trusted_types_that_reads_or_writes_files_is_refused(
    hostile, message, tmp_path: Path
):
    sio = pytest.importorskip("skops.io")
    content = sio.dumps(hostile())
    assert not sio.get_untrusted_types(data=content)
    (tmp_path / "m.skops").write_bytes(content)
    with pytest.raises(UsageError, match=rf"m\.skops' contains .*{message}.*trust_code=True"):
        open_model(str(tmp_path / "m.skops"))


@pytest.mark.parametrize(
    "value", [np.load, len, print, Path("a"), io.BytesIO(), np.memmap, partial(open, "a")]
)
def test_functions_and_unknown_objects_are_refused_even_if_skops_trusts_them(value):
    with pytest.raises(UsageError, match=r"more\['a'\]\[0\]\[1\]\[1\] = "):
        refuse_access(Path("m.skops"), in_containers(value))


HONEST = {
    "log1p": lambda: make_pipeline(FunctionTransformer(np.log1p, inverse_func=np.expm1), logistic()),
    "no function": lambda: make_pipeline(FunctionTransformer(), SVC()),
    "columns": lambda: make_pipeline(
        make_column_transformer(
            (StandardScaler(), [0, 1]), (OneHotEncoder(dtype=np.float32, handle_unknown="ignore"), [2])
        ),
        LinearSVC(),
    ),
    "several": lambda: StackingClassifier([("a", logistic()), ("b", GaussianNB())], cv=3),
    "searched": lambda: GridSearchCV(
        make_pipeline(PCA(4), logistic()), {"logisticregression__C": [1, 2]}, cv=3
    ),
    "random": lambda: SGDClassifier(random_state=np.random.RandomState(0)),
    "table": lambda: make_pipeline(StandardScaler(), logistic()).set_output(transform="default"),
    "boosted": lambda: HistGradientBoostingClassifier(max_iter=2),
    "trees": lambda: RandomForestClassifier(2),
    "neighbours": lambda: KNeighborsClassifier(algorithm="kd_tree"),
}


@pytest.mark.parametrize("honest", HONEST.values(), ids=HONEST)
def test_the_inspection_permits_usual_estimators(honest):
    sio = pytest.importorskip("skops.io")
    content = sio.dumps(honest().fit(X, Y))
    refuse_access(Path("m.skops"), sio.loads(content, trusted=sio.get_untrusted_types(data=content)))


def test_types_that_skops_does_not_trust_need_trust(tmp_path: Path):
    sio = pytest.importorskip("skops.io")
    place = tmp_path / "m.skops"
    sio.dump(make_pipeline(FunctionTransformer(doubled), logistic()).fit(X, Y), place)
    with pytest.raises(
        UsageError,
        match=r"contains the type .*doubled, which skops does not trust, .*trust_code=True to holdfast.open_model",
    ):
        open_model(str(place))
    assert open_model(str(place), trust_code=True).access == "scores"
    xgboost = pytest.importorskip("xgboost")
    sio.dump(xgboost.XGBClassifier(n_estimators=2).fit(X, Y), place)
    with pytest.raises(UsageError, match=r"save models of XGBoost with their method save_model"):
        open_model(str(place))


def test_damaged_and_foreign_skops_files_are_refused(tmp_path: Path):
    sio = pytest.importorskip("skops.io")
    whole = sio.dumps(logistic().fit(X, Y))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("schema.json", "{}" * 100)
    flipped = bytearray(whole)
    flipped[200] ^= 255
    for content, said in (
        (whole[: len(whole) // 2], "damaged or truncated"),
        (bytes(flipped), "not an estimator that skops can open|damaged or truncated"),
        (b"nothing", "not an estimator that skops can open"),
        (packed.getvalue(), r"compressed .*without compression"),
        (sio.dumps([1, 2]), "contains a list; an estimator"),
    ):
        (tmp_path / "m.skops").write_bytes(content)
        with pytest.raises(TargetError, match=said):
            open_model(str(tmp_path / "m.skops"))


def test_an_estimator_of_a_file_starts_no_processes(tmp_path: Path, monkeypatch):
    sio, joblib = pytest.importorskip("skops.io"), pytest.importorskip("joblib")
    asked = []

    def started(self, *given, **named):
        asked.append(given)
        raise RuntimeError("a process was started")

    for backend in ("LokyBackend", "ThreadingBackend"):
        monkeypatch.setattr(f"joblib.parallel.{backend}.configure", started)
    both = FeatureUnion([("a", StandardScaler()), ("b", MinMaxScaler())], n_jobs=3)
    estimator = make_pipeline(both, logistic()).fit
    with joblib.parallel_backend("sequential"):
        estimator = estimator(X, Y)
    sio.dump(estimator, tmp_path / "m.skops")
    model = open_model(str(tmp_path / "m.skops")).model
    assert model(torch.from_numpy(SHOWN)).shape == (len(SHOWN), 10)
    assert not asked
    with pytest.raises(TargetError, match="a process was started"):  # the user's own object does as it says
        wrapped(estimator)(torch.from_numpy(SHOWN))


def test_an_estimator_that_raises_errors_is_an_error_of_the_model(tmp_path: Path):
    sio = pytest.importorskip("skops.io")
    damaged = logistic().fit(X, Y)
    damaged.n_features_in_ = str(X.shape[1])
    sio.dump(damaged, tmp_path / "m.skops")
    model = open_model(str(tmp_path / "m.skops")).model
    with pytest.raises(TargetError, match="the LogisticRegression raised ValueError: X has 64 features, but"):
        model.net.settle(torch.from_numpy(SHOWN))


@pytest.mark.parametrize("kind", [int, float, np.int64])
def test_a_file_is_tried_with_rows_of_any_form_of_its_number_of_features(tmp_path: Path, monkeypatch, kind):
    sio = pytest.importorskip("skops.io")
    estimator, tried = logistic().fit(X, Y), []
    estimator.n_features_in_ = kind(X.shape[1])
    monkeypatch.setattr(
        "holdfast.io.models.estimators.Estimator.settle", lambda self, x: tried.append(x.shape)
    )
    content = sio.dumps(estimator)
    read(tmp_path / "m.skops", content, tmp_path)
    assert tried == [(2, X.shape[1])]


@pytest.mark.parametrize("suffix", ["pkl", "joblib", "keras"])
def test_files_that_run_code_are_refused_with_the_way_out(tmp_path: Path, suffix: str):
    place = tmp_path / f"m.{suffix}"
    place.write_bytes(b"whatever")
    with pytest.raises(
        UsageError, match=r"may run code when it is loaded .*(skops|load_model).*file\.py:factory"
    ) as refused:
        open_model(str(place), trust_code=True)
    assert str(refused.value).count("factory of yours") == 1


# XGBoost

OBJECTIVES = {
    "multi:softprob": (Y, {"num_class": 10}),
    "multi:softmax": (Y, {"num_class": 10}),
    "binary:logistic": (Y > 4, {}),
    "binary:hinge": (Y > 4, {}),
}


def booster(objective="multi:softprob", rounds=2, **kind):
    xgboost = pytest.importorskip("xgboost")
    y, said = OBJECTIVES[objective]
    matrix = xgboost.DMatrix(X, y, nthread=1)
    return xgboost.train(
        {"objective": objective, "max_depth": 3, "nthread": 1, **said, **kind}, matrix, rounds
    )


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_booster_predicts_what_xgboost_predicts(objective):
    xgboost = pytest.importorskip("xgboost")
    trained = booster(objective)
    model = wrapped(trained)
    found = trained.predict(xgboost.DMatrix(SHOWN, nthread=1))
    theirs = found.argmax(1) if found.ndim == 2 else (found > 0.5) if "binary" in objective else found
    assert (model(torch.from_numpy(SHOWN)).argmax(1).numpy() == theirs).all()
    assert model.classes == (10 if "multi" in objective else 2)


def test_a_booster_of_another_objective_is_refused():
    xgboost = pytest.importorskip("xgboost")
    trained = xgboost.train({"nthread": 1}, xgboost.DMatrix(X, Y, nthread=1), 1)
    with pytest.raises(TargetError, match=r"objective reg:squarederror; one of binary:hinge"):
        wrapped(trained)


def test_an_error_of_xgboost_is_one_line_without_its_stack_trace():
    with pytest.raises(TargetError, match=r"raised XGBoostError .* contains `inf`") as raised:
        wrapped(booster())(torch.full((2, X.shape[1]), torch.inf))
    assert "\n" not in str(raised.value)
    assert ".cc:" not in str(raised.value)


@pytest.mark.usefixtures("in_this_process")
def test_features_of_a_booster_are_limited(tmp_path: Path, accepted_up_to):
    path, features = tmp_path / "m.ubj", X.shape[1]
    booster().save_model(path)
    accepted_up_to(
        "sandbox.trees._MOST_FEATURES",
        features,
        lambda: open_model(str(path)),
        f"declares {features} features",
    )


def test_a_best_iteration_that_a_booster_does_not_have_is_refused(tmp_path: Path):
    trained = booster()
    rounds, place = trained.num_boosted_rounds(), tmp_path / "m.ubj"
    for best, exists in ((rounds - 1, True), (rounds, False), (2**31 - 1, False)):
        trained.set_attr(scikit_learn="{}", best_iteration=str(best))
        trained.save_model(place)
        if exists:
            assert open_model(str(place)).model(torch.from_numpy(SHOWN)).shape[0] == len(SHOWN)
        else:
            with pytest.raises(TargetError, match=f"its best iteration is {best}, and it has {rounds}"):
                open_model(str(place))


@pytest.mark.slow  # each file is loaded in a process of its own first
def test_files_of_xgboost_open_with_the_best_iteration(tmp_path: Path):
    xgboost = pytest.importorskip("xgboost")
    early = xgboost.XGBClassifier(
        n_estimators=30, max_depth=2, early_stopping_rounds=1, learning_rate=1, nthread=1
    )
    early.fit(X, Y, eval_set=[(SHOWN, CLASS[JUDGED])], verbose=False)
    assert early.best_iteration < early.get_booster().num_boosted_rounds() - 1
    for name in ("m.json", "m.ubj"):
        early.save_model(tmp_path / name)
        model = open_model(str(tmp_path / name)).model
        np.testing.assert_allclose(
            model(torch.from_numpy(SHOWN)).softmax(1), early.predict_proba(SHOWN), rtol=1e-4, atol=1e-6
        )


TREE = "gradient_booster", "model", "trees", 0
LINEAR = {"booster": "gblinear", "verbosity": 0}  # it is deprecated
VECTORS = {"multi_strategy": "multi_output_tree", "tree_method": "hist"}


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize(
    ("kind", "where", "value", "reason"),
    [
        (LINEAR, ("gradient_booster", "model", "weights"), [1.0], r"has 1 weights, and \d+ were expected"),
        (LINEAR, ("learner_model_param", "num_class"), "20", r"weights, and \d+ were expected"),
        ({}, ("learner_model_param", "num_class"), "999999", r"999999 outputs in \d+ bytes"),
        (VECTORS, (*TREE, "tree_param", "size_leaf_vector"), "2", "leaves without numbers"),
    ],
)
def test_numbers_that_xgboost_would_read_outside_of_its_memory_are_refused(
    tmp_path: Path, kind, where, value, reason
):
    trained, place = booster(**kind), tmp_path / "m.json"
    found = json.loads(trained.save_raw("json"))
    place.write_text(json.dumps(found))
    open_model(str(place))
    inner = found["learner"]
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    if where[-1] == "num_class":
        found["learner"]["learner_model_param"]["base_score"] = "5E-1"
    place.write_text(json.dumps(found))
    with pytest.raises(TargetError, match=reason):
        open_model(str(place))


@pytest.mark.slow  # as above
def test_a_damaged_file_of_xgboost_ends_only_the_process_that_looks_at_it(tmp_path: Path):
    trained = booster()
    raw, place = bytearray(trained.save_raw("ubj")), tmp_path / "m.ubj"
    place.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(TargetError, match="no readable model of XGBoost"):
        open_model(str(place))
    stray = json.loads(trained.save_raw("json"))
    stray["learner"]["gradient_booster"]["model"]["trees"][0]["split_indices"][0] = 10**6
    (tmp_path / "stray.json").write_text(json.dumps(stray))
    with pytest.raises(TargetError, match="looks at a feature that there is not"):
        open_model(str(tmp_path / "stray.json"))


@pytest.mark.parametrize(
    ("text", "said"), [('{"a": 1}', "holds the keys a and is no model of XGBoost"), ("{", "JSON")]
)
def test_other_json_is_no_model(tmp_path: Path, text: str, said: str):
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(TargetError, match=said):
        open_model(str(tmp_path / "m.json"))
