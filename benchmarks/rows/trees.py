"""Tree ensembles on tables: exact worst cases beside an attack, exact distances, and monotone models."""

import csv
import gzip
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from benchmarks.absent import Absent
from benchmarks.networks import folder
from benchmarks.record import Cells, Claim, Outcome
from holdfast.attacks import Thresholds
from holdfast.certifiers.tree_ensembles import TreeProver, monotone_in, opened_trees, proved_unchanged
from holdfast.certifiers.tree_reading import inner_values, read_trees, refuse_other
from holdfast.core.batch import Batch
from holdfast.core.constraints import Linf
from holdfast.core.draws import Draws
from holdfast.core.model import Bounds, Classifier, Units
from holdfast.core.threat import ThreatModel
from holdfast.io.models.adapting import adapted

WHAT = "exact worst cases of stumps and deep trees, and monotone trees against added features"
STUMPS, DEEP, ROWS = (0.001, 0.01, 0.05, 0.1), (0.0005, 0.001, 0.002, 0.005, 0.01), 60
SPAN, PRECISION = 0.064, 1e-4
"""largest distance that is searched, and the width of the interval in which the exact distance is"""
VALUES = 32
"""number of values of each feature that the add-only attack tries"""


def measured() -> Outcome:
    try:
        import veritas  # noqa: F401
        import xgboost
        from sklearn.ensemble import GradientBoostingClassifier, HistGradientBoostingClassifier
    except ImportError as why:
        raise Absent(f"{why.name} is not installed: pip install -e '.[trees]'") from why
    table: list[Cells] = []
    train, test, bounds = _table("phishing_url", "status", ("url",))
    stumps = GradientBoostingClassifier(n_estimators=100, max_depth=1, random_state=0).fit(*train)
    differing = _stumps(table, stumps, test, bounds)
    deep = xgboost.XGBClassifier(n_estimators=200, max_depth=6, n_jobs=1, random_state=0).fit(*train)
    undecided, unconfirmed, slowest = _deep(table, deep, test, bounds)
    recall, added, unproved = _monotone(table, HistGradientBoostingClassifier)
    claims = [
        Claim("rows of stumps where attack and certificate differ <= 0", differing, 0),
        Claim("rows of deep trees that are undecided <= 0", undecided, 0),
        Claim("counterexamples of deep trees that the bare model does not confirm <= 0", unconfirmed, 0),
        Claim("mean CPU seconds of a decision on deep trees <= 1", slowest, 1),
        Claim("recall of the monotone model before - after additions <= 0", recall - added, 0),
        Claim("detected malware whose detection is not proved <= 0", unproved, 0),
    ]
    config = {"rows": ROWS, "distances": [SPAN, PRECISION], "values": VALUES, "seed": 0}
    return Outcome(table, claims, config)


def _stumps(table: list[Cells], estimator: Any, test: tuple[Any, Any], bounds: tuple[Any, Any]) -> int:
    """Add the exact robust accuracy of stumps at several eps; return how many rows attack and proof differ on."""
    model, batch, clean = _wrapped(estimator, test, bounds)
    differing, attack = 0, Thresholds().reading(inner_values(model))
    for eps in STUMPS:
        proofs, seconds = _timed(_prover(model, batch, eps), batch)
        x_adv = attack(model, batch, ThreatModel(Linf(eps), access="scores"), rng=Draws(0))
        broken = model(x_adv).argmax(1) != batch.y
        differing += int((proofs.certified == broken).sum())
        table.append(
            _row("phishing, 100 stumps", eps, len(test[1]))
            | {"clean": clean, "certified": int(proofs.certified.sum()) / len(test[1])}
            | {"survive attack": int((~broken).sum()) / len(test[1]), "CPU s a row": seconds / len(batch)}
        )
    return differing


def _deep(
    table: list[Cells], estimator: Any, test: tuple[Any, Any], bounds: tuple[Any, Any]
) -> tuple[int, int, float]:
    """Add decisions and distances of deep trees; return the numbers of rows that are undecided and of counterexamples
    that the library does not confirm, and the CPU seconds of a decision.
    """
    model, batch, _ = _wrapped(estimator, (test[0][:ROWS], test[1][:ROWS]), bounds)
    undecided = unconfirmed = 0
    slowest = 0.0
    for eps in DEEP:
        proofs, seconds = _timed(_prover(model, batch, eps), batch)
        values = _values(proofs.x_adv, bounds)[proofs.broken.numpy()]
        unconfirmed += int((estimator.predict(values) == batch.y[proofs.broken].numpy()).sum())
        undecided += int((~proofs.certified & ~proofs.broken).sum())
        slowest = max(slowest, seconds / len(batch))
        table.append(
            _row("phishing, 200 x depth 6", eps, ROWS)
            | {"clean": len(batch) / ROWS, "certified": int(proofs.certified.sum()) / ROWS}
            | {"counterexamples": int(proofs.broken.sum()), "CPU s a row": seconds / len(batch)}
        )
    ready, started = _prover(model, batch, SPAN), time.process_time()
    distances = [_distance(ready, batch.take(torch.tensor([k]))) for k in range(len(batch))]
    table.append(
        _row("phishing, 200 x depth 6", "exact distance", len(batch))
        | {"median distance": float(np.median(distances))}
        | {"CPU s a row": (time.process_time() - started) / len(batch)}
    )
    return undecided, unconfirmed, slowest


def _distance(ready: TreeProver, one: Batch) -> float:
    """The largest eps at which a row is certified, up to `PRECISION`; infinity beyond `SPAN`."""
    low, high = 0.0, 10 * PRECISION
    while bool(replace(ready, constraint=Linf(high))(one).certified):
        low, high = high, 2 * high
        if high > SPAN:
            return float("inf")
    while high - low > PRECISION:
        middle = (low + high) / 2
        certified = bool(replace(ready, constraint=Linf(middle))(one).certified)
        low, high = (middle, high) if certified else (low, middle)
    return low


def _monotone(table: list[Cells], kind: Callable[..., Any]) -> tuple[float, float, int]:
    """Add the recall of a plain and a monotone model before and after additions to features."""
    train, (x, y), _ = _table("clamp_pe_malware", "class", ("packer_type",))
    malware = x[y == 1]
    for name, directions in (("plain", None), ("monotone", [1] * x.shape[1])):
        estimator = kind(monotonic_cst=directions, random_state=0).fit(*train)
        wrapped = adapted(estimator)
        assert wrapped is not None
        trees = read_trees(Classifier(wrapped.net, access="scores"))
        rows = trees.rows(malware)
        ensemble = refuse_other(trees, rows).ensemble
        features = list(range(x.shape[1]))
        found = estimator.predict(malware) == 1
        proved = proved_unchanged(ensemble, ensemble.ranks(rows), features) & found
        kept = found & ~_evading(estimator, malware, ensemble.cuts)
        recall, added = float(found.mean()), float(kept.mean())
        table.append(
            _row(f"ClaMP, {name} histograms", "add only", len(malware))
            | {"clean": float(estimator.score(x, y)), "recall": recall, "recall after additions": added}
            | {"proved monotone": monotone_in(ensemble, features, 1, 1), "proved": float(proved.mean())}
        )
    return recall, added, int((found & ~proved).sum())


def _evading(estimator: Any, rows: Any, cuts: tuple[Any, ...]) -> Any:
    """Rows that are predicted benign after an increase of one feature, or of all features in turn."""
    current, evading = rows.copy(), np.zeros(len(rows), dtype=bool)
    score = estimator.decision_function(current)
    for feature, thresholds in enumerate(cuts):
        chosen = np.linspace(0, len(thresholds) - 1, min(len(thresholds), VALUES)).astype(int)
        for value in thresholds[chosen]:
            tried = current.copy()
            tried[:, feature] = np.maximum(tried[:, feature], value)
            lower = estimator.decision_function(tried)
            single = rows.copy()
            single[:, feature] = tried[:, feature]
            evading |= (lower <= 0) | (estimator.predict(single) == 0)
            current[lower < score], score = tried[lower < score], np.minimum(lower, score)
    return evading


def _wrapped(
    estimator: Any, test: tuple[Any, Any], bounds: tuple[Any, Any]
) -> tuple[Classifier, Batch, float]:
    """The model in units of the range, the rows that it classifies correctly, and their share."""
    given = adapted(estimator)
    low, high = (tuple(side.tolist()) for side in bounds)
    assert given is not None
    model = Classifier(given.net, bounds=Bounds(), access=given.access, output=given.output)
    size = tuple((bounds[1] - bounds[0]).tolist())
    Units(low, high, size, exact=True).apply(model)
    x = torch.from_numpy((test[0].astype(np.float64) - bounds[0]) / np.where(size, size, 1.0))
    y = torch.from_numpy(test[1])
    right = model(x).argmax(1) == y
    return model, Batch(x, y, torch.arange(len(y))).take(right), float(right.double().mean())


def _values(x: torch.Tensor, bounds: tuple[Any, Any]) -> Any:
    size = bounds[1] - bounds[0]
    return (x.numpy() * np.where(size, size, 1.0) + bounds[0]).astype(np.float32)


def _prover(model: Classifier, batch: Batch, eps: float) -> TreeProver:
    return opened_trees(model, batch.first(64), Linf(eps), 60.0)


def _timed(ready: TreeProver, batch: Batch) -> tuple[Any, float]:
    started = time.process_time()
    return ready(batch), time.process_time() - started


def _row(model: str, eps: float | str, rows: int) -> Cells:
    return {"model": model, "eps": eps, "rows": rows}


def _table(name: str, label: str, left_out: tuple[str, ...]) -> tuple[Any, Any, tuple[Any, Any]]:
    """Train and test rows of a table, float32, with labels, and the smallest and largest value of each feature."""
    path = folder("HOLDFAST_DATA", "data") / f"{name}.csv.gz"
    if not path.is_file():
        raise Absent(f"{path.name} is not at hand; HOLDFAST_DATA names its folder")
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    names = [key for key in lines[0] if key not in (label, "split", *left_out)]
    classes = sorted({line[label] for line in lines})
    x = np.array([[float(line[key]) for key in names] for line in lines], dtype=np.float32)
    y = np.array([classes.index(line[label]) for line in lines], dtype=np.int64)
    trained = np.array([line["split"] == "train" for line in lines])
    ends = x.min(0).astype(np.float64), x.max(0).astype(np.float64)
    return (x[trained], y[trained]), (x[~trained], y[~trained]), ends
