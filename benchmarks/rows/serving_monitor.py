"""Requests per CPU second of `holdfast serve` with the bundled CNN, with `--monitor` and without.

`python -m benchmarks.rows.serving_monitor ROUNDS SECONDS` is a trial without a record.
"""

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.networks import images
from benchmarks.record import Cells, Claim, Outcome
from benchmarks.serving_setups import Loading, loop_and_parser, ours, running, setup
from benchmarks.throughput import Contestant, alternated, cells, cpu_ratio, ratio
from holdfast.server.live_monitor import LiveMonitor
from holdfast.statistics.intervals import resampled
from holdfast.verbs.monitor import live_reference
from holdfast.verbs.settings import Monitor

WHAT = "holdfast serve, bundled CNN: requests per CPU second with the monitor and without"
NAME, SHAPE = "mnist-cnn", (1, 28, 28)
CONNECTIONS, ROUNDS, SECONDS, LEAST = 16, 20, 1.0, 0.97
MOST_PER_SECOND = {"JSON": 3000, "binary": 4500}
"""Different requests that are prepared for each second of a round."""
SENT = 50_000
"""Training images of which the requests are made."""
MONITORED, PLAIN = "holdfast serve with monitor", "holdfast serve"
_POWER_S = 120.0
"""Longest time in which the power of the tests is computed after the start."""


def measured() -> Outcome:
    return outcome(ROUNDS, SECONDS)


def outcome(rounds: int, seconds: float) -> Outcome:
    """The row with rounds of so many seconds."""
    x = images("mnist", SENT, "train")[0]
    detail: Cells = {}
    table: list[Cells] = []
    claims: list[Claim] = []
    with tempfile.TemporaryDirectory() as name, Loading() as loading:
        folder = Path(name)
        with (
            ours(folder / "plain", NAME, SHAPE) as plain,
            _monitored(folder / "monitored") as (other, monitor),
        ):
            for form in ("JSON", "binary"):
                rows = alternated(
                    {MONITORED: other, PLAIN: plain}, x, form, seconds=seconds, rounds=rounds,
                    connections=CONNECTIONS, loaded=loading, most_per_second=MOST_PER_SECOND,
                )  # fmt: skip
                detail[form] = rows
                low, high = _interval(rows[MONITORED], rows[PLAIN])
                table += [cells(f"{who}, {form}", numbers) for who, numbers in rows.items()]
                table[-2] |= {
                    "throughput / without": round(ratio(rows[MONITORED], rows[PLAIN]), 3),
                    "95 % interval": f"{low:.3f} to {high:.3f}",
                    "requests per CPU second / without": round(cpu_ratio(rows[MONITORED], rows[PLAIN]), 3),
                }
                text = f"{form}: requests per CPU second of {MONITORED} / {PLAIN} >= {LEAST:g}"
                claims.append(Claim(text, cpu_ratio(rows[MONITORED], rows[PLAIN]), LEAST, least=True))
            compared = monitor.summary()["stream"]["n"]
    claims.append(Claim("inputs that the monitor compared >= 1", compared, 1, least=True))
    config: Cells = {
        "network": NAME, "connections": CONNECTIONS, "images a request": 1, "rounds": rounds,
        "seconds a round": seconds, "workers": 1, "threads a worker": 1, "audit": "on, fsync twice a second",
        "event loop and parser": loop_and_parser(),
    }  # fmt: skip
    notes = [
        "rounds of both servers alternate, and each image is sent once to a server",
        "the CPU time is that of the worker, without that of the supervisor, which runs the tests",
        "ratios are medians over the rounds; the interval is that of the median by the bootstrap",
        "the rounds begin after the power of the tests was computed, which takes seconds once after the start",
        f"the monitor compared {compared:,} inputs",
    ]
    return Outcome(table, claims, config, detail, notes)


def _interval(numbers: Cells, others: Cells) -> tuple[float, float]:
    """The 95 % interval of the median ratio of the throughputs over the rounds, from bootstrap samples."""
    ratios = torch.tensor(numbers["per_second"]) / torch.tensor(others["per_second"])
    medians = resampled(lambda rows: ratios[rows].median(1).values, len(ratios))
    return float(medians.quantile(0.025)), float(medians.quantile(0.975))


@contextmanager
def _monitored(folder: Path) -> Iterator[tuple[Contestant, LiveMonitor]]:
    """A server with a monitor, once the power of the tests is known."""
    reference = live_reference(Monitor(model=NAME, reference="mnist-mini"))
    folder.mkdir()
    prepared = setup(folder, NAME, SHAPE, set_name="file", monitor=reference)
    with running(prepared) as server:
        monitor = server.live
        assert monitor is not None
        until = time.monotonic() + _POWER_S
        while any(test["power"] is None for test in monitor.summary()["tests"]):
            if time.monotonic() > until:
                raise RuntimeError(f"the power of the tests was not computed within {_POWER_S:g} s")
            time.sleep(0.2)
        pid = server.status()["workers"][0]["pid"]
        yield Contestant(server.address[1], (pid,), f"/v2/models/{NAME}/infer"), monitor


if __name__ == "__main__":
    trial = outcome(int(sys.argv[1]), float(sys.argv[2]))
    for line in trial.table:
        print(line)
    for claim in trial.claims:
        print("met   " if claim.met else "MISSED", claim.text, round(claim.value, 3))
