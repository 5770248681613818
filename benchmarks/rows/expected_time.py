"""The expected time that `assess` prints before a run, beside the wall time of the run: tables, images and texts."""

import re
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import holdfast
from benchmarks.absent import Absent
from benchmarks.networks import images, network
from benchmarks.parts import part
from benchmarks.record import Cells, Claim, Outcome
from benchmarks.rows.texts import texts_of

WHAT = "expected time of ten assessments beside their wall time"
FACTOR, OF = 3.0, 9
"""largest factor between both, and the least number of runs of ten that are within it or state no number"""
SECONDS = {"s": 1, "min": 60, "h": 3600}


def measured() -> Outcome:
    try:
        import sklearn  # noqa: F401
    except ImportError as why:
        raise Absent("scikit-learn is not installed: pip install -e '.[sklearn]'") from why
    with tempfile.TemporaryDirectory() as place:
        runs = _runs(Path(place))
        detail = {
            name: part("expected-time", name, partial(_timed, name, settings))
            for name, settings in runs.items()
        }
    table = [kept["measured"] for kept in detail.values()]
    right = sum(cells.get("expected / measured") is None or _near(cells) for cells in table)
    stated = sum("expected / measured" in cells for cells in table)
    claims = [
        Claim(f"runs of {len(table)} within a factor of {FACTOR:g} or without a number >= {OF}", right, OF, least=True),
        Claim(f"runs of {len(table)} with a number >= 6", stated, 6, least=True),
    ]  # fmt: skip
    return Outcome(table, claims, {"suite": "fast", "doubts": "all but for ResNet-20", "seed": 0}, detail)


def _near(cells: Cells) -> bool:
    return 1 / FACTOR <= cells["expected / measured"] <= FACTOR


def _timed(name: str, opened: Callable[[], dict[str, Any]]) -> Cells:
    """The expected seconds, and the wall time after the message with them or, without one, of everything."""
    begun, stated = time.perf_counter(), []

    def heard(text: str) -> None:
        nonlocal begun
        if found := re.match(r"expected total time: about ([\d.]+) (s|min|h)$", text):
            stated.append(float(found[1]) * SECONDS[found[2]])
            begun = time.perf_counter()

    result = holdfast.Assess(seed=0, **opened()).run(notify=heard)
    cells: Cells = {"run": name, "n": result["clean_accuracy"].n, "measured, s": time.perf_counter() - begun}
    if stated:
        (cells["expected, s"],) = stated
        cells["expected / measured"] = cells["expected, s"] / cells["measured, s"]
    return cells


def _runs(place: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """The settings of ten runs."""
    return {
        "table, logistic regression": lambda: _table(_logistic, 1000),
        "table, logistic regression, few rows": lambda: _table(_logistic, 50),
        "table, network": lambda: _table(_perceptron, 500),
        "table, network, rules": lambda: _table(_perceptron, 100, rules=place),
        "table, gradient boosting": lambda: _table(_boosting, 100),
        "images, linear network": lambda: _images(_linear(), "mnist", 300, "linf:0.1"),
        "images, convolutional network": lambda: _images(network("mnist-cnn").module, "mnist", 100, "l2:1.5"),
        "images, hardened network": lambda: _images(network("mnist-cnn-hardened").module, "mnist", 100, "linf:0.2"),
        "images, ResNet-20": lambda: _images(
            network("cifar_resnet20").module, "cifar10", 50, "linf:1/255"
        ) | {"doubts": False},
        "texts, words": lambda: _texts(50),
    }  # fmt: skip


def _logistic(x: Any, y: Any) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=1000).fit(x, y)


def _boosting(x: Any, y: Any) -> Any:
    from sklearn.ensemble import GradientBoostingClassifier

    return GradientBoostingClassifier(n_estimators=50, random_state=0).fit(x, y)


def _perceptron(x: Any, y: Any) -> nn.Module:
    return _fitted(nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2)), *map(torch.tensor, (x, y)))


def _linear() -> nn.Module:
    return _fitted(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), *images("mnist", 5000, "train"))


def _fitted(module: nn.Module, x: Tensor, y: Tensor, epochs: int = 10) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for layer in module:
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
        optimiser = torch.optim.Adam(module.parameters(), 1e-2)
        for _ in range(epochs):
            for rows in torch.randperm(len(x)).split(128):
                optimiser.zero_grad()
                nn.functional.cross_entropy(module(x[rows]), y[rows]).backward()
                optimiser.step()
    return module.eval()


def _table(fit: Callable[[Any, Any], Any], n: int, rules: Path | None = None) -> dict[str, Any]:
    from sklearn.datasets import make_classification

    x, y = make_classification(2000 + n, 20, n_informative=10, random_state=0)
    x = ((x - x.min(0)) / np.ptp(x, 0)).astype(np.float32)
    model = fit(x[:2000], y[:2000])
    threat = "linf:0.05"
    if rules is not None:
        names = "".join(f"  c{k}: {{type: number, min: 0, max: 1}}\n" for k in range(20))
        (rules / "rules.yaml").write_text(f"budget: {{norm: linf, eps: 0.05}}\ncolumns:\n{names}")
        threat = f"table:{rules / 'rules.yaml'}"
    return {"model": model, "data": (x[2000:], y[2000:]), "threat": threat}


def _images(module: nn.Module, data: str, n: int, threat: str) -> dict[str, Any]:
    return {"model": module, "data": images(data, n), "threat": threat}


def _texts(n: int) -> dict[str, Any]:
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    (x, y), (x_test, y_test) = texts_of("sst2_sentences.csv.gz", "1")
    model = make_pipeline(CountVectorizer(binary=True), LogisticRegression(max_iter=1000)).fit(x, y)
    return {"model": model, "data": (x_test[:n], y_test[:n]), "threat": "text:edits=1,words=2"}
