"""Certificates of linear models and multi-layer perceptrons of scikit-learn."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skops.io
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression, Perceptron, RidgeClassifier, SGDClassifier
from sklearn.naive_bayes import GaussianNB
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MaxAbsScaler, MinMaxScaler, PolynomialFeatures, RobustScaler, StandardScaler
from sklearn.svm import SVC, LinearSVC

import holdfast
from holdfast import Batch, Bounds, Classifier, Linf, ThreatModel
from holdfast.certifiers.estimator_networks import network_of
from holdfast.certifiers.provers import Crown, prepared_graph
from holdfast.core.errors import HoldfastError
from holdfast.io.models.adapting import adapted
from holdfast.io.models.models import open_model

RNG = np.random.default_rng(0)
X = RNG.uniform(0, 1, (80, 4)).astype(np.float32)
LABELS = {2: (X[:, 0] + X[:, 1] > 1).astype(int), 3: np.digitize(X[:, 0] + X[:, 1], [0.8, 1.2])}

ESTIMATORS: list[tuple[Any, int]] = [
    (LogisticRegression(), 2),
    (make_pipeline(StandardScaler(), LogisticRegression()), 3),
    (make_pipeline(RobustScaler(), LinearSVC()), 2),
    (make_pipeline(MaxAbsScaler(), "passthrough", SGDClassifier(loss="log_loss", random_state=0)), 3),
    (make_pipeline(MinMaxScaler((-1, 1), clip=True), RidgeClassifier()), 3),
    (Perceptron(random_state=0), 2),
    (SVC(kernel="linear"), 2),
    *(
        (
            make_pipeline(StandardScaler(), MLPClassifier((8, 5), activation, max_iter=60, random_state=0)),
            classes,
        )
        for activation, classes in (("relu", 2), ("tanh", 3), ("logistic", 2), ("identity", 3))
    ),
]


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize(("estimator", "classes"), ESTIMATORS, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("arithmetic", ["exact", "float32"])
def test_no_row_of_the_region_of_a_certified_estimator_has_another_class(
    estimator: Any, classes: int, arithmetic: Any
) -> None:
    y = LABELS[classes]
    wrapped = adapted(estimator.fit(X, y))
    model = Classifier(
        wrapped.net, bounds=Bounds(-1.0, 2.0), access=wrapped.access, output=wrapped.output, classes=classes
    ).eval()
    x = torch.from_numpy(X[:20])
    batch = Batch(x, torch.from_numpy(estimator.predict(X[:20])), torch.arange(20))
    prover = Crown(arithmetic=arithmetic)
    graph = prepared_graph(model, batch)
    shares = []
    for eps in (0.001, 0.1):
        certified = prover.on(graph, model, ThreatModel(Linf(eps)))(batch).certified
        shares.append(float(certified.float().mean()))
        corners = torch.randint(0, 2, (2000, 1, 4)) * 2 - 1
        points = (x + eps * corners).flatten(0, 1).numpy()
        same = torch.from_numpy(estimator.predict(points)).view(-1, 20) == batch.y
        assert not (certified & ~same.all(0)).any()
    assert shares[0] >= 0.7
    assert network_of(model, x)(x.double()).shape == (20, classes)


@pytest.mark.parametrize(
    ("estimator", "classes", "message"),
    [
        (SVC(kernel="linear"), 3, "the SVC has the number of classes 3, and 2 was expected"),
        (SVC(), 2, "the SVC has the kernel 'rbf', and 'linear' was expected"),
        (SGDClassifier(loss="modified_huber"), 2, "fit it with loss='log_loss'"),
        (
            make_pipeline(PolynomialFeatures(), LogisticRegression()),
            2,
            "the step PolynomialFeatures, which has no",
        ),
        (GaussianNB(), 2, "LinearSVC, .* also after StandardScaler"),
        (
            RandomForestClassifier(n_estimators=3),
            2,
            "give --method trees|LinearSVC, .* also after StandardScaler",
        ),
    ],
    ids=lambda each: type(each).__name__,
)
def test_another_estimator_is_refused_with_the_list(estimator: Any, classes: int, message: str) -> None:
    estimator.fit(X, LABELS[classes])
    with pytest.raises(HoldfastError, match=message):
        holdfast.certify(estimator, (X, LABELS[classes]), "linf:0.01", "crown", examples=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_perceptron_in_a_file_needs_no_trust(tmp_path: Path) -> None:
    place = tmp_path / "m.skops"
    skops.io.dump(MLPClassifier((3,), max_iter=5).fit(X, LABELS[2]), place)
    assert open_model(str(place)).access == "scores"


def test_an_estimator_is_certified_by_the_command_and_tested_by_attacks() -> None:
    estimator = LogisticRegression().fit(X, LABELS[2])
    result = holdfast.certify(estimator, (X, LABELS[2]), "linf:0.05", examples=False)
    weight, lead = estimator.coef_[0], estimator.decision_function(X)
    away = np.where(LABELS[2] == 1, lead, -lead) / np.abs(weight).sum()
    certified = result.evidence["certified"].numpy()
    inside = np.abs(away - 0.05) > 1e-4  # bounds of the inputs make some regions smaller
    assert (certified[away > 0.05 + 1e-4]).all()
    assert not (certified & (away < 0.04) & (X > 0.06).all(1) & (X < 0.94).all(1) & inside).any()
