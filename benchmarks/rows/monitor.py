"""The tests of a stream: ADWIN and Page-Hinkley beside those of river, delays after a shift, and false alarms.

river 0.26.1 (BSD-3); its detections are in `benchmarks/references/river.json`, see `benchmarks/river_detections.py`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.drift_streams import CHANGE, LENGTH, SHIFTED, STATIONARY, shifted, stationary, streams
from benchmarks.record import Cells, Claim, Outcome
from holdfast.core.catalogue import DRIFT_TESTS
from holdfast.core.draws import Draws
from holdfast.monitoring.signals import INPUTS, Signals
from holdfast.monitoring.stream_tests import Adwin, PageHinkley
from holdfast.monitoring.watching import ALPHA, HORIZON, test_of
from holdfast.statistics.intervals import clopper_pearson

WHAT = "tests of a stream: ADWIN and Page-Hinkley beside river, delay after a shift of one deviation, false alarms"
RIVER = Path(__file__).parents[1] / "references" / "river.json"
REFERENCE = 1000
DEFAULTS_OF_RIVER = "page-hinkley, defaults of river"

Detector = Callable[[], Adwin | PageHinkley]
DETECTORS: dict[str, Detector] = {
    "adwin": Adwin,
    "page-hinkley": PageHinkley,
    DEFAULTS_OF_RIVER: lambda: PageHinkley(0.005, 50.0),
}


def measured() -> Outcome:
    found = json.loads(RIVER.read_text(encoding="utf-8"))
    table: list[Cells] = []
    claims: list[Claim] = []
    ours = {
        name: {key: detections(make(), values) for key, make in DETECTORS.items()}
        for name, values in streams()
    }
    for key in DETECTORS:
        differing = sum(ours[name][key] != row[key] for name, row in found["detections"].items())
        claims.append(
            Claim(f"{key}: streams of {len(ours)} on which detections differ from river == 0", differing, 0)
        )
    delays = {key: [_delay(ours[f"shifted {k}"][key]) for k in range(SHIFTED)] for key in DETECTORS}
    alarms = [_alarm("martingale", shifted(k), f"shifted {k}") for k in range(SHIFTED)]
    delays["martingale"] = [_delay([] if after is None else [after]) for after in alarms]
    for key, each in delays.items():
        table.append(
            {"test": key, "what": f"shift, {SHIFTED} streams", "median delay": median(each),
             "90th percentile": float(np.quantile(each, 0.9, method="higher"))}
        )  # fmt: skip
    claims += [
        Claim(f"{key}: median delay <= 100", median(delays[key]), 100) for key in ("adwin", "page-hinkley")
    ]
    stationary_streams = {name: _stationary(name) for name in (*DRIFT_TESTS, DEFAULTS_OF_RIVER)}
    table += stationary_streams.values()
    share = stationary_streams["martingale"]["false alarms"]
    claims.append(
        Claim(f"martingale: share of streams of {LENGTH} with a false alarm <= {ALPHA}", share, ALPHA)
    )
    claims += [
        Claim(f"{key}: lower end of the share with a false alarm within {HORIZON} samples <= {ALPHA}",
              stationary_streams[key]["interval within 1,000"][0], ALPHA)
        for key in ("ks", "mmd")
    ]  # fmt: skip
    config = {
        "reference": f"{REFERENCE} values, new for each stream",
        "alpha": ALPHA,
        "river": found["river"],
    }
    notes = [
        "values are standard normal; the mean is 1 from sample 2,001 on in streams with a shift",
        "a delay counts from the change to the first detection after it; a stream without one has an infinite delay",
        "false alarms: share of streams of 2,000 samples with an alarm. The guarantees of ks and mmd are for 1,000",
    ]
    return Outcome(table, claims, config, notes=notes)


def detections(detector: Adwin | PageHinkley, values: list[float]) -> list[int]:
    """Numbers of samples after which a change is detected."""
    return [n for n, value in enumerate(values, 1) if detector.update(value)]


def _delay(after: list[int]) -> float:
    return next((float(n - CHANGE) for n in after if n > CHANGE), float("inf"))


def _alarm(name: str, values: list[float], stream: str) -> int | None:
    """Number of samples after which a test of the catalogue raises an alarm."""
    views = {INPUTS: slice(0, 1)} if test_of(name).compares == "views" else {}
    reference, samples = (
        Signals(("x",), np.array(each)[:, None], views)
        for each in (stationary(-1 - int(stream.rsplit(maxsplit=1)[-1]), REFERENCE), values)
    )
    alarm = test_of(name)(reference, ALPHA, Draws(0).at(stream)).update(samples)
    return None if alarm is None else alarm.after


def _stationary(name: str) -> Cells:
    if name == DEFAULTS_OF_RIVER:
        after = [next(iter(detections(DETECTORS[name](), stationary(k))), None) for k in range(STATIONARY)]
    else:
        after = [_alarm(name, stationary(k), f"stationary {k}") for k in range(STATIONARY)]
    known = [n for n in after if n is not None]
    cells: Cells = {"test": name, "what": f"stationary, {STATIONARY} streams of {LENGTH}"}
    for suffix, n in (("", len(known)), (" within 1,000", sum(n <= HORIZON for n in known))):
        interval = [round(end, 4) for end in clopper_pearson(n, STATIONARY)]
        cells |= {f"false alarms{suffix}": n / STATIONARY, f"interval{suffix}": interval}
    return cells
