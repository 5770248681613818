"""The tests of a stream: equality with other implementations, exact values, states, and power."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import isotonic_regression
from scipy.stats import ks_2samp

from benchmarks.drift_streams import varied
from holdfast.core.catalogue import DRIFT_TESTS
from holdfast.core.draws import Draws
from holdfast.monitoring import stream_tests
from holdfast.monitoring.signals import (
    Observed,
    Observer,
    Predictions,
    Signals,
    expected_accuracy,
    isotonic,
    measured_accuracy,
)
from holdfast.monitoring.stream_tests import Adwin, PageHinkley
from holdfast.monitoring.watching import power_of, watch
from holdfast.monitoring.watching import test_of as kind_of
from holdfast.reports.audit import guarantees

RIVER = Path(__file__).parents[2] / "benchmarks" / "references" / "river.json"


def observed(n: int, *, mean: float = 0.0, seed: int = 0, features: int = 3) -> Observed:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n, features, generator=rng) + mean
    logits = torch.randn(n, 4, generator=rng) * 3
    return Observed(
        x, logits, torch.relu(x) @ torch.ones(features, 2), logits.argmax(1) * (torch.arange(n) % 9 > 0)
    )


OBSERVER = Observer.fitted(observed(200, seed=1), Draws(0))
REFERENCE = OBSERVER(observed(600, seed=2))


def shifted_stream(mean: float = 1.0) -> Signals:
    before, after = OBSERVER(observed(600, seed=3)), OBSERVER(observed(600, mean=mean, seed=4))
    return Signals(before.names, np.concatenate([before.values, after.values]), before.views)


def test_adwin_and_page_hinkley_detect_where_river_does():
    river = json.loads(RIVER.read_text(encoding="utf-8"))["detections"]
    for name, values in list(varied())[:8]:
        detectors = {
            "adwin": Adwin(),
            "page-hinkley": PageHinkley(),
            "page-hinkley, defaults of river": PageHinkley(0.005, 50.0),
        }
        ours = {
            key: [n for n, value in enumerate(values, 1) if detector.update(value)]
            for key, detector in detectors.items()
        }
        assert ours == river[name], name


@pytest.mark.parametrize("name", DRIFT_TESTS)
def test_a_test_finds_a_shift_in_any_batches_and_after_it_was_stored(name):
    stream = shifted_stream()
    whole = kind_of(name)(REFERENCE, 0.05, Draws(3)).update(stream)
    assert whole is not None
    assert 600 < whole.after <= 1000
    test, alarm = kind_of(name)(REFERENCE, 0.05, Draws(3)), None
    for start in range(0, 1200, 70):
        test = pickle.loads(pickle.dumps(test))
        alarm = alarm or test.update(stream.at(slice(start, start + 70)))
    assert alarm == whole


def test_a_bet_is_fair_for_uniform_p_values():
    p = (np.arange(10**6) + 0.5) / 10**6
    assert stream_tests.betting_factors(p).mean(0) == pytest.approx(1.0, abs=1e-3)


def test_p_values_of_the_martingale_are_ranks_with_ties_broken_at_random():
    one = Signals(("x",), np.array([[1.0], [2.0], [2.0], [3.0]]), {})
    test = stream_tests.ConformalMartingale(one, 0.05, Draws(0))
    drawn = ((2.0, 0.5), (9.0, 0.25), (2.0, 0.5))
    p = [test.p_values(np.array([value]), np.array([tie]))[0] for value, tie in drawn]
    assert p == [
        (1 + 0.5 * 3) / 5,
        0.25 / 6,
        (2 + 0.5 * 4) / 7,
    ]  # each value is compared with the next ones, too


def test_a_late_change_is_found():
    rng = np.random.default_rng(0)
    reference = Signals(("x",), rng.normal(size=(300, 1)), {})
    values = np.concatenate([rng.normal(size=20_000), rng.normal(0.7, size=2000)])
    alarm = kind_of("martingale")(reference, 0.05, Draws(0)).update(Signals(("x",), values[:, None], {}))
    assert 20_000 < alarm.after < 20_600


def test_p_values_of_kolmogorov_smirnov_are_those_of_scipy():
    rng = np.random.default_rng(0)
    reference, window = np.sort(rng.normal(size=700)), rng.normal(0.15, size=250)
    expected = ks_2samp(reference, window, method="asymp").pvalue
    assert stream_tests.two_sample_p_value(reference, window) == pytest.approx(expected, rel=0.1)


def test_p_values_of_mmd_are_uniform_without_a_shift_and_smallest_with_one():
    rng = np.random.default_rng(0)
    p = [stream_tests.permutation_p_value(rng.normal(size=(60, 3)), 30, Draws(k)) for k in range(60)]
    assert 0.3 < np.mean(p) < 0.7
    assert np.mean(np.array(p) <= 0.2) < 0.4
    points = np.concatenate([rng.normal(size=(30, 3)), rng.normal(2.0, size=(30, 3))])
    assert stream_tests.permutation_p_value(points, 30, Draws(0)) == 1 / (stream_tests.PERMUTATIONS + 1)
    assert (
        stream_tests.permutation_p_value(np.full((60, 3), 0.3), 30, Draws(0)) == 1
    )  # of a saturated model, for example
    tied = np.random.default_rng(1).integers(0, 2, (60, 2)).astype(float)
    assert stream_tests.permutation_p_value(tied, 30, Draws(0)) > 0.05


def test_a_stationary_stream_raises_no_alarm_and_a_short_one_states_what_a_test_needs(power_of_tests):
    results = watch(REFERENCE, [OBSERVER(observed(240, seed=5))], seed=0)
    states = {result.name: result.state for result in results}
    assert states == {
        "martingale": "no alarm",
        "ks": "too few samples",
        "mmd": "too few samples",
        "adwin": "no alarm",
        "page-hinkley": "no alarm",
    }


def test_power_is_the_smallest_shift_that_is_found():
    power = power_of(kind_of("ks"), REFERENCE, 0.05, Draws(0))
    assert power.signal == "inputs: feature 0"
    assert 0.2 <= power.shift <= 0.5
    weaker = power_of(kind_of("ks"), REFERENCE, 1e-9, Draws(0))
    assert weaker.shift > power.shift
    assert 0.05 <= power.drop <= 0.3
    assert power.errors


def test_a_change_within_the_reference_is_stated(power_of_tests):
    changing = Signals(REFERENCE.names, REFERENCE.values.copy(), REFERENCE.views)
    changing.values[200:, 1] += 20.0
    stream = OBSERVER(observed(40, seed=5))
    restarted = {result.name: result.restarted for result in watch(changing, [stream], seed=0)}
    assert restarted["adwin"] == ("confidence",) and restarted["martingale"] == ()
    assert not any(result.restarted for result in watch(REFERENCE, [stream], seed=0))
    test = {"name": "adwin", "compares": "means", "guarantee": "None.", "restarted": ["confidence"]}
    ((_, text),) = guarantees({"tests": [test]})
    assert text.startswith(
        "Compares means. None. It detected a change of the confidence while it read the reference"
    )


def test_many_features_become_moments_and_random_projections():
    observer = Observer.fitted(observed(50, features=40), Draws(0))
    names = observer(observed(2, features=40)).names
    assert names[:4] == ("distance", "confidence", "error", "inputs: mean")
    assert sum(name.startswith("inputs: projection") for name in names) == 16


def test_the_calibration_is_the_isotonic_regression():
    rng = np.random.default_rng(0)
    confidence = np.sort(rng.random(100))
    correct = rng.random(100) < confidence**2
    expected = isotonic_regression(correct.astype(float)).x
    assert isotonic(confidence, correct, confidence) == pytest.approx(expected)
    tied, right = np.round(confidence, 1), np.arange(100) % 3 > 0
    orders = [np.arange(100), np.arange(100)[::-1], rng.permutation(100)]
    fits = [isotonic(tied[order], right[order], tied) for order in orders]
    assert all(fit == pytest.approx(fits[0]) for fit in fits)
    assert isotonic(np.ones(4), right[:4], np.ones(1)) == pytest.approx(right[:4].mean())


def test_accuracy_is_measured_with_labels_and_expected_without():
    samples = observed(900)
    predictions = Predictions.of(samples)
    measured = measured_accuracy(predictions, ("a", "b", "c", "d"))
    assert measured.accuracy.value == pytest.approx(predictions.correct.mean())
    assert [row.name for row in measured.errors] == ["a", "b", "c", "d"]
    assert measured.errors[1].error.value == 0
    unlabelled = Predictions(predictions.confidence, None, None)
    assert measured_accuracy(unlabelled, None) is None
    estimate = expected_accuracy(predictions, unlabelled)
    assert estimate.value == pytest.approx(measured.accuracy.value, abs=1e-3)
    assert estimate.low < estimate.value < estimate.high
    certain = Predictions(np.ones(200), None, np.ones(200, bool))
    assert expected_accuracy(certain, certain).low < 0.99  # 200 right predictions do not show that all are
    two = Predictions(np.array([0.95, 0.65]), np.array([0, 1]), np.array([True, False]))
    assert measured_accuracy(two, None).calibration_error == pytest.approx((0.05 + 0.65) / 2)


def test_missing_values_are_a_series_and_are_filled_elsewhere():
    fit = observed(200, seed=1)
    observer = Observer.fitted(fit, Draws(0), features=("age", "income", "score"), missing=True)
    samples = observed(40, seed=2)
    gaps = samples.x.clone()
    gaps[3, 1] = gaps[5, 0] = gaps[5, 2] = torch.nan
    filled = torch.where(gaps.isnan(), fit.x.mean(0), gaps)
    signals = observer(Observed(gaps, samples.logits, samples.features, samples.y))
    assert signals.names[:2] == ("distance", "missing values") and signals.n_series == 4
    assert signals.names[slice(*signals.views["inputs"].indices(99))] == tuple(
        f"inputs: {name}" for name in ("age", "income", "score")
    )
    shares = signals.values[:, 1] * observer.scale[0] + observer.centre[0]
    assert (
        shares[3] == pytest.approx(1 / 3)
        and shares[5] == pytest.approx(2 / 3)
        and shares.sum() == pytest.approx(1)
    )
    others = [column for column in range(len(signals.names)) if column != 1]
    complete = observer(Observed(filled, samples.logits, samples.features, samples.y))
    assert np.allclose(signals.values[:, others], complete.values[:, others], atol=1e-6)
    empty = Observer.fitted(Observed(torch.full((9, 2), torch.nan)), Draws(0), missing=True)
    assert np.isfinite(empty(Observed(torch.full((4, 2), torch.nan))).values).all()
