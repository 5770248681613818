"""`holdfast monitor`: alarms, exit codes, reports, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import holdfast
from holdfast.cli.app import run
from holdfast.core.batch import UNLABELLED, Batch
from holdfast.core.catalogue import names
from holdfast.core.errors import TargetError
from holdfast.reports import audit as reported


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, power_of_tests):
    """A folder with streams of a table, and a power without simulations, which tests/monitoring/ has."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1100, 3)).astype(np.float32)
    np.savez("reference.npz", x=x[:600], y=np.zeros(600, int))
    np.savez("same.npz", x=x[600:])
    np.savez("moved.npz", x=x[600:] + np.float32([0, 1, 0]))
    np.savez("short.npz", x=x[:100])
    np.savez("wide.npz", x=rng.normal(size=(300, 4)))
    np.savez("endless.npz", x=np.where(np.arange(1100)[:, None] == 700, np.inf, x))


def test_inputs_alone_raise_an_alarm_if_they_moved(capsys):
    assert run(["monitor", "same.npz", "--reference", "reference.npz"]) == 0
    shown = capsys.readouterr()
    assert (
        "The test martingale found no difference in 500 samples of same.npz, compared with reference.npz."
        in shown.err
    )
    assert "Accuracy" not in shown.out
    reports = [part for suffix in ("json", "md", "html") for part in ("-o", f"report.{suffix}")]
    assert run(["monitor", "moved.npz", "--reference", "reference.npz", *reports]) == 1
    shown = capsys.readouterr()
    assert (
        "differs from the reference in its inputs (inputs: feature 1): alarm of the test martingale"
        in shown.err
    )
    assert "wealth" not in shown.err and "wealth" in shown.out
    assert "Ville's inequality" in shown.out
    assert "What to do:" in shown.out
    content = json.loads(Path("report.json").read_text())
    assert content["verdict"] == "alarm"
    (first, *_) = content["tests"]
    assert first["name"] == "martingale" and first["alarm"]["after"] < 100 and first["power"]["shift"] == 0.3
    assert "| martingale | alarm |" in Path("report.md").read_text().replace("  ", " ")
    assert "<h1>The stream differs from the reference in its inputs" in Path("report.html").read_text()


def test_the_tests_of_alarm_decide_the_exit_code():
    words = ["monitor", "moved.npz", "--reference", "reference.npz"]
    assert run([*words, "--alarm", "adwin,ks"]) == 1
    assert run(["monitor", "same.npz", "--reference", "reference.npz", "--alarm", "ks"]) == 0


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["same.npz"], 2, "the reference is missing"),
        (["--reference", "reference.npz"], 2, "STREAM is missing"),
        (
            ["wide.npz", "--reference", "reference.npz"],
            2,
            "have shape (3,), and those of the stream wide.npz have",
        ),
        (
            ["reference.npz", "--reference", "reference.npz"],
            2,
            "the stream reference.npz has the same samples as the reference reference.npz",
        ),
        (["same.npz", "--reference", "short.npz"], 2, "short.npz has 100 samples; at least 134 are needed"),
        (
            ["short.npz", "--reference", "reference.npz", "--alarm", "mmd"],
            2,
            "needs 250 samples, and the stream short.npz has 100",
        ),
        (
            ["endless.npz", "--reference", "reference.npz"],
            3,
            "endless.npz contains NaN or infinity, first in row 700; replace",
        ),
        (["same.npz", "--reference", "reference.npz", "--alarm", "cusum"], 2, "there is no test 'cusum'"),
        (
            ["same.npz", "--reference", "reference.npz", "-o", "r.pdf"],
            2,
            f"expected one of {' '.join(names('reports'))}",
        ),
    ],
)
def test_bad_input_is_refused(words, code, message, capsys):
    assert run(["monitor", *words]) == code
    assert message in capsys.readouterr().err


class PartlyLabelled:
    """A data set whose rows from 300 on have no label."""

    name, classes, digest = "the stream", None, "0"

    def __init__(self, x, y):
        self.x, self.y = torch.tensor(x), torch.tensor(y)
        self.y[300:] = UNLABELLED

    def __len__(self):
        return len(self.x)

    def read(self, start, stop):
        ids = torch.arange(start, stop)
        return Batch(self.x[ids], self.y[ids], ids)


def test_a_partly_labelled_stream_is_refused():
    x, y = np.random.default_rng(1).random((900, 3), dtype=np.float32), np.zeros(900, np.int64)
    with pytest.raises(
        TargetError, match="row 300 of the stream has no label, unlike the first row; label all"
    ):
        holdfast.monitor(PartlyLabelled(x[400:], y[400:]), (x[:400], y[:400]), nn.Linear(3, 2))
    holdfast.monitor(PartlyLabelled(x[400:], y[400:]), (x[:400], y[:400]))


@pytest.mark.parametrize(
    ("drop", "errors", "cell"),
    [(None, False, "none"), (None, True, "above 50 points"), (0.05, True, "5 points")],
)
def test_the_table_of_power_states_why_there_is_no_drop(drop, errors, cell):
    power = {"signal": "confidence", "shift": 0.3, "drop": drop, "false_alarms": None, "errors": errors}
    assert reported._power(power) == ("confidence", "0.3 sd", cell, "")


def test_a_model_adds_its_outputs_and_its_accuracy():
    rng = np.random.default_rng(1)
    net, x = (
        nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)),
        rng.random((900, 3), dtype=np.float32),
    )
    y = (x[:, 0] > 0.5).astype(np.int64)
    result = holdfast.monitor((x[400:], y[400:]), (x[:400], y[:400]), net)
    assert result.layer == "1"
    assert result.measured.accuracy.n == 500 and result.expected is not None
    unlabelled = holdfast.monitor(x[400:], (x[:400], y[:400]), net)
    assert unlabelled.measured is None
    assert unlabelled.expected == result.expected
    with pytest.raises(TargetError, match="7 to 8, but the model has 2 classes"):
        holdfast.monitor((x[400:], y[400:] + 7), (x[:400], y[:400]), net)


def table(n, seed, *, missing=0.0, moved=0.0):
    """A data frame with named columns; values of the column income are missing or moved."""
    pandas, rng = pytest.importorskip("pandas"), np.random.default_rng(seed)
    frame = pandas.DataFrame(
        {"age": rng.normal(40, 10, n), "income": rng.normal(3, 1, n) + moved, "score": rng.random(n)}
    )
    frame["y"] = (frame.age + 5 * frame.income > 55).astype(int)
    frame.loc[rng.random(n) < missing, "income"] = np.nan
    return holdfast.open_data(frame, label="y")


def martingale(monitored):
    return next(result.alarm for result in monitored.results if result.name == "martingale")


@pytest.mark.slow
def test_the_columns_of_a_table_are_named_and_the_share_of_missing_values_is_a_signal():
    moved = holdfast.monitor(table(300, 1, moved=1.0), table(400, 0))
    assert martingale(moved).signal == "inputs: income" and not any("missing" in note for note in moved.notes)
    for before, after in ((0.0, 0.2), (0.2, 0.0)):
        gaps = holdfast.monitor(table(300, 1, missing=after), table(400, 0, missing=before))
        assert martingale(gaps).signal == "missing values"
        (note,) = gaps.notes
        assert "income" in note and "age" not in note
        assert (
            gaps.summary()["tests"][0]["alarm"]["view"] == "missing values"
            and "source of the data" in gaps.text()
        )
    assert martingale(holdfast.monitor(table(300, 1, missing=0.2), table(400, 0, missing=0.2))) is None


@pytest.mark.slow
@pytest.mark.parametrize("accepts", [True, False])
def test_missing_values_are_compared_beside_any_model(accepts):
    pytest.importorskip("sklearn")
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression

    fit = table(300, 2)
    x, y = fit.data[["age", "income", "score"]], fit.data["y"]
    estimator = HistGradientBoostingClassifier(max_iter=5) if accepts else LogisticRegression(max_iter=1000)
    estimator.fit(x, y)
    same = holdfast.monitor(
        table(200, 1, missing=0.2), table(300, 0, missing=0.2), estimator, bounds=(-100, 200)
    )
    assert martingale(same) is None and same.measured is not None
    assert any("no finite output" in note for note in same.notes) != accepts
    other = holdfast.monitor(table(200, 1, missing=0.2), table(300, 0), estimator, bounds=(-100, 200))
    assert martingale(other).signal == "missing values"


def test_a_stream_is_selected_in_its_order_and_the_reference_is_not():
    words = ["monitor", "moved.npz", "--reference", "reference.npz", "-o", "report.json"]
    for option, n in (("-n", 60), ("--sample", 70)):
        assert run([*words, option, str(n)]) == 1
        content = json.loads(Path("report.json").read_text())
        assert (content["stream"]["n"], content["reference"]["n"]) == (n, 600)
