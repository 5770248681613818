"""Requests per CPU second of `holdfast serve` on small networks, beside FastAPI, and with the default guard.

`python -m benchmarks.rows.serving_small ROUNDS SECONDS` is a trial without a record.
"""

import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from benchmarks.guarded import calibrate, fill
from benchmarks.load import prepared, saturated
from benchmarks.networks import images
from benchmarks.record import Cells, Claim, Outcome
from benchmarks.retrying import collage
from benchmarks.serving_setups import Loading, loop_and_parser, ours, running, setup
from benchmarks.throughput import Contestant, alternated, bare, cells, cpu_ratio, ratio
from holdfast.server.supervisor import Supervisor
from holdfast.server.traffic import CPU, OTHER, PARTS, PROFILED
from holdfast.verbs.opening.guard import open_guard

WHAT = "holdfast serve, bundled CNN and ResNet-20: requests per CPU second beside FastAPI, and with the default guard"
CONNECTIONS, ROUNDS, SECONDS = 16, 12, 1.0
SEEN, SENT = 20_000, 50_000
"""Inputs that the guard has seen before, and training images of which the requests are made."""
PROFILE_SECONDS, _REPORTED_S = 4.0, 1.2
"""Seconds in which the parts of requests are measured, and after which they are reported."""
PER_REQUEST, BATCHING = "FastAPI, a call of the model per request", "FastAPI with the batches of Holdfast"
SERVE, AUDITED, GUARDED = "holdfast serve", "holdfast serve with audit", "holdfast serve with audit and guard"


@dataclass(frozen=True)
class ServedNetwork:
    """A network that is served, its data, and what is compared."""

    title: str
    name: str
    data: str
    shape: tuple[int, ...]
    most_per_second: dict[str, int]
    """different requests that are prepared for each second of a round"""
    beside: tuple[tuple[str, str, float], ...]
    """pairs of servers, and the least ratio of their requests per CPU second"""


SUBJECTS = (
    ServedNetwork(
        "bundled CNN", "mnist-cnn", "mnist", (1, 28, 28), {"JSON": 3000, "binary": 4500},
        (
            (SERVE, PER_REQUEST, 1.0), (SERVE, BATCHING, 1.0),
            (AUDITED, PER_REQUEST, 1.0), (AUDITED, BATCHING, 0.95), (GUARDED, AUDITED, 0.8),
        ),
    ),
    ServedNetwork(
        "ResNet-20", "cifar_resnet20", "cifar10", (3, 32, 32), {"JSON": 1000, "binary": 1500},
        ((GUARDED, AUDITED, 0.85),),
    ),
)  # fmt: skip


def measured() -> Outcome:
    return outcome(ROUNDS, SECONDS, SEEN)


def outcome(
    rounds: int, seconds: float, seen: int, subjects: tuple[ServedNetwork, ...] = SUBJECTS
) -> Outcome:
    """The row with rounds of so many seconds, and a guard that has seen so many inputs before."""
    detail: Cells = {}
    table: list[Cells] = []
    claims: list[Claim] = []
    parts: list[Cells] = []
    with Loading() as loading:
        for subject in subjects:
            x = images(subject.data, SENT, "train")[0]
            with _servers(subject, x, seen) as (servers, profiled):
                for form in ("JSON", "binary"):
                    rows = alternated(
                        servers, x, form, seconds=seconds, rounds=rounds, connections=CONNECTIONS,
                        loaded=loading, most_per_second=subject.most_per_second,
                    )  # fmt: skip
                    case = f"{subject.title}, {form}"
                    parts.append(_parts(profiled, subject, x, form, loading))
                    detail[case] = rows
                    table += [cells(f"{who}; {case}", numbers) for who, numbers in rows.items()]
                    for who, other, least in subject.beside:
                        text = f"{case}: requests per CPU second of {who} / {other} >= {least:g}"
                        claims.append(Claim(text, cpu_ratio(rows[who], rows[other]), least, least=True))
                        detail[f"{case}: throughput of {who} / {other}"] = ratio(rows[who], rows[other])
    config: Cells = {
        "connections": CONNECTIONS, "images a request": 1, "rounds": rounds, "seconds a round": seconds,
        "workers": 1, "threads a worker": 1, "default guard": "schema, queries (SQLite), energy; mode enforce",
        "inputs seen by the guard before": seen, "event loop and parser of all servers": loop_and_parser(),
    }  # fmt: skip
    notes = [
        "the CPU time is that of the process that answers requests; rounds of all servers alternate",
        "FastAPI checks nothing; each image is sent once to a server",
    ]
    return Outcome(table + parts, claims, config, detail, notes)


def _parts(server: Supervisor, subject: ServedNetwork, x: Tensor, form: str, loading: Loading) -> Cells:
    """CPU time of each part of a request to a server that measures it."""

    def measured() -> Counter[str]:
        time.sleep(_REPORTED_S)
        counts = {part: server.totals.value(CPU, part) for part in (*PARTS, OTHER)}
        return Counter({**counts, PROFILED: server.totals.value(PROFILED)})

    rng, path = np.random.default_rng(1), f"/v2/models/{subject.name}/infer"
    sent = collage(x, rng, round(subject.most_per_second[form] * PROFILE_SECONDS))
    messages = [prepared(image[None], path, binary=form == "binary") for image in sent]
    before = measured()
    loading(saturated, server.address[1], messages, connections=CONNECTIONS, seconds=PROFILE_SECONDS)
    spent = measured()
    spent.subtract(before)
    n = spent.pop(PROFILED)
    line = {part: round(1000 * spent[part] / n, 3) for part in (*PARTS, OTHER)}
    total = round(1000 * sum(spent.values()) / n, 3)
    who = f"{GUARDED} and --profile, CPU ms of each part; {subject.title}, {form}"
    return {"who": who, "server CPU ms a request": total, **line}


@contextmanager
def _servers(
    subject: ServedNetwork, x: Tensor, seen: int
) -> Iterator[tuple[dict[str, Contestant], Supervisor]]:
    """The servers of a network by name, and one more with audit and guard that measures the parts of requests."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder, path = Path(name), f"/v2/models/{subject.name}/infer"
        compared = {who for pair in subject.beside for who in pair[:2]}
        servers = {
            who: stack.enter_context(bare(subject.name, path, calls))
            for who, calls in ((PER_REQUEST, "requests"), (BATCHING, "batches"))
            if who in compared
        }
        guard = folder / "guard"
        guard.mkdir()
        calibrate(guard, subject.name, subject.data)
        fill(guard, x, seen)
        start = partial(ours, name=subject.name, shape=subject.shape)
        if SERVE in compared:
            servers[SERVE] = stack.enter_context(start(folder / "plain", audited=False))
        servers[AUDITED] = stack.enter_context(start(folder / "audited"))
        opening = partial(open_guard, guard / "guard.yaml")
        servers[GUARDED] = stack.enter_context(start(folder / "guarded", guard=opening))
        settings = {"set_name": "file", "guard": opening, "profile": True}
        (folder / "profiled").mkdir()
        profiled = setup(folder / "profiled", subject.name, subject.shape, **settings)
        yield servers, stack.enter_context(running(profiled))


if __name__ == "__main__":
    trial = outcome(int(sys.argv[1]), float(sys.argv[2]), 1000)
    for line in trial.table:
        print(line)
    for claim in trial.claims:
        print("met   " if claim.met else "MISSED", claim.text, round(claim.value, 3))
