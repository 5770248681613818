"""The doubts `constant`, `chance` and `input` on estimators that are right, or nearly, on all rows of a table."""

from collections.abc import Iterator
from typing import Any

import numpy as np

import holdfast
from benchmarks.absent import Absent
from benchmarks.record import Cells, Claim, Outcome

WHAT = "the doubts `constant`, `chance` and `input` on perfect and nearly perfect estimators"
WATCHED = ("constant", "chance", "input")
N, THREAT = 120, "linf:0.05,queries=50"
TABLES = ("iris", "wine", "breast_cancer", "digits")


def measured() -> Outcome:
    table: list[Cells] = []
    for name, data, model, x, y in _estimators():
        result = holdfast.assess(model, (x, y), threat=THREAT, suite="black-box")
        states = {doubt.name: doubt.state for doubt in result.doubts}
        table.append(
            {"estimator": name, "table": data, "n": len(y), "clean": result.metrics["clean_accuracy"].value}
            | {each: states[each] for each in WATCHED}
        )
    claims = [
        Claim("estimators >= 20", len(table), 20, least=True),
        Claim("least clean accuracy >= 0.9", min(row["clean"] for row in table), 0.9, least=True),
        *(
            Claim(f"estimators that raise `{each}` <= 0", sum(row[each] == "raised" for row in table), 0)
            for each in WATCHED
        ),
    ]
    return Outcome(table, claims, {"threat": THREAT, "n": N, "seed": 0})


def _estimators() -> Iterator[tuple[str, str, Any, np.ndarray, np.ndarray]]:
    """Estimators with one-hot, symmetric and continuous scores, on the rows that they were fitted on."""
    try:
        from sklearn import datasets, ensemble, linear_model, naive_bayes, neighbors, preprocessing, svm, tree
    except ImportError as why:
        raise Absent("scikit-learn is not installed: pip install -e '.[sklearn]'") from why
    for table in TABLES:
        x, y = getattr(datasets, f"load_{table}")(return_X_y=True)
        rows = np.random.default_rng(0).permutation(len(x))[:N]
        x, y = preprocessing.MinMaxScaler().fit_transform(x)[rows].astype(np.float32), y[rows]
        for estimator in (
            tree.DecisionTreeClassifier(random_state=0),
            neighbors.KNeighborsClassifier(1),
            ensemble.RandomForestClassifier(20, random_state=0),
            linear_model.LogisticRegression(C=100, max_iter=1000),
            naive_bayes.GaussianNB(var_smoothing=1e-3),
            svm.SVC(C=100, random_state=0),
        ):
            yield type(estimator).__name__, table, estimator.fit(x, y), x, y
