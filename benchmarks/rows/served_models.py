"""A model behind HTTP and the same in the process: equal verdicts and queries, and the rows that the server counts.

The model is a function of numpy that computes each row by itself, so that its scores do not depend on the batch.
"""

import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import holdfast
from benchmarks.counting_server import Array, CountingServer
from benchmarks.record import Cells, Claim, Outcome
from holdfast.io.data.data import open_data
from holdfast.runs.assess.result import Result

WHAT = (
    "a model behind HTTP and the same in the process: verdicts, queries, and the rows that the server counts"
)
N, THREAT, SIDE, CLASSES, STOPS, SEED = 100, "linf:0.1,queries=100", 28, 10, 5, 0
DELAY_S, AT_ONCE = 0.1, 8
SLOW_THREAT, FEATURES = "linf:0.001,queries=40", 64
"""for a server that takes its time; no example falls, so that requests stay as many, and each is soon read"""
_WEIGHTS = np.random.default_rng(SEED).normal(size=(SIDE * SIDE, CLASSES)).astype(np.float32) / SIDE


def scores(rows: Array) -> Array:
    """Scores (n, 10) of digits, whatever the layout of one channel: linear, summed row by row."""
    flat = rows.reshape(len(rows), -1)
    found: Array = np.stack([np.tanh((row[:, None] * _WEIGHTS[: len(row)]).sum(0)) for row in flat])
    return found


def in_process(x: torch.Tensor) -> torch.Tensor:
    """The same as a model in the process."""
    return torch.from_numpy(scores(x.numpy()))


@dataclass(frozen=True)
class Form:
    """A way in which a model is served."""

    server: dict[str, Any] = field(default_factory=dict)
    asked: dict[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] = (1, SIDE, SIDE)
    doubts: bool = False


FORMS = {
    "scores": Form(),
    "labels": Form({"labels": True}, {"classes": CLASSES, "http_labels": True}),
    "channels last": Form(shape=(SIDE, SIDE, 1)),
    "FP64": Form({"datatype": "FP64"}),
    "batches of 32": Form({"batch": 32}),
    "one row a request": Form(asked={"http_max_rows": 1}),
    "8 requests at once": Form(asked={"http_max_rows": 5, "http_concurrency": 8}),
    "with doubts": Form(doubts=True),
}


def measured() -> Outcome:
    data = _digits()
    table = [_form(name, form, data) for name, form in FORMS.items()]
    table += [_stopped(data), *_speed()]
    claims = [
        Claim(
            "verdicts that differ <= 0", sum(row["verdicts that differ"] for row in table[: len(FORMS)]), 0
        ),
        Claim("queries that differ <= 0", sum(row["queries that differ"] for row in table[: len(FORMS)]), 0),
        Claim(
            "rows not as the server counts <= 0", sum(abs(row["rows beyond the report"]) for row in table), 0
        ),
        Claim(
            f"requests beyond an unbroken run after {STOPS} stops <= {STOPS}",
            table[-3]["requests beyond"],
            STOPS,
        ),
        Claim("files of a stopped run that differ <= 0", table[-3]["files that differ"], 0),
        Claim(f"speed with {AT_ONCE} requests at once >= 6", table[-1]["times as fast"], 6, least=True),
    ]
    config: Cells = {"n": N, "threat": THREAT, "suite": "black-box", "seed": SEED, "delay s": DELAY_S}
    return Outcome(table, claims, config)


def _digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Digits with the labels that the model gives them, a tenth of which are wrong."""
    x = open_data("mnist-mini").read(0, N).x
    y = in_process(x).argmax(1)
    y[::10] = (y[::10] + 1) % CLASSES
    return x, y


def _form(name: str, form: Form, data: tuple[torch.Tensor, torch.Tensor]) -> Cells:
    doubts = form.doubts
    access = "labels" if form.asked.get("http_labels") else "scores"
    local = holdfast.assess(in_process, data, f"{THREAT},access={access}", "black-box", doubts=False)
    with CountingServer(scores, form.shape, **form.server) as server:
        model = holdfast.open_model(server.url, allow_hosts=["127.0.0.1"], **form.asked)
        remote = holdfast.assess(model, data, THREAT, "black-box", doubts=form.doubts)
        counted = server.rows
    one, other = local.evidence, remote.evidence
    served = other.served
    # what the doubts break counts in the worst case; the suite's own verdict is compared
    return {
        "form": name,
        "verdicts that differ": int((one["suite_success"] != other["suite_success"]).sum()),
        "queries that differ": int((one["queries"] != other["queries"]).sum()),
        "rows": served["rows"],
        **{kind: served[kind] for kind in ("clean", "attacks", "doubts", "judging")},
        "rows beyond the report": counted - served["rows"],
        "doubts beyond the suite": max(0, served["doubts"] - served["attacks"] - served["judging"])
        if doubts
        else 0,
    }


def _command(server: CountingServer, place: Path, run: str, *more: str) -> list[str]:
    words = [sys.executable, "-m", "holdfast", "assess", server.url, str(place / "digits.npz")]
    allowed = ["--allow-host", "127.0.0.1", "--suite", "black-box", "--no-doubts", "-q"]
    return [*words, "--threat", THREAT, *allowed, "--run", str(place / run), *more]


def _stopped(data: tuple[torch.Tensor, torch.Tensor]) -> Cells:
    """A run of which either side is killed at random moments, and an unbroken one."""
    draw = random.Random(SEED)
    with tempfile.TemporaryDirectory(prefix="holdfast-") as folder:
        place = Path(folder)
        np.savez(place / "digits.npz", x=data[0].numpy(), y=data[1].numpy())
        with CountingServer(scores, (1, SIDE, SIDE)) as server:
            subprocess.run(_command(server, place, "whole"), check=True, capture_output=True)
            unbroken, port = list(server.sizes), server.port
        sizes: list[int] = []
        for stop in range(STOPS + 1):
            resume = ["--resume", "--http-retries", "0"] if stop else ["--http-retries", "0"]
            server = CountingServer(scores, (1, SIDE, SIDE), port=port, delay=0.005)
            with server:
                life = subprocess.Popen(_command(server, place, "cut", *resume), stderr=subprocess.DEVNULL)
                wanted = len(server.sizes) + draw.randrange(3, len(unbroken) // (STOPS + 1))
                while stop < STOPS and life.poll() is None and len(server.sizes) < wanted:
                    time.sleep(0.001)
                if stop < STOPS:
                    life.kill() if stop % 2 == 0 else server.die()
                life.wait()
            sizes += server.sizes
        report = holdfast.report(place / "cut")
        differ = [
            path.name
            for path in place.glob("whole/*")
            if path.suffix in {".safetensors", ".jsonl"} or path.name == "verdict.json"
            if path.read_bytes() != (place / "cut" / path.name).read_bytes()
        ]
    lost = sum(sizes) - sum(unbroken)
    served = report.evidence.served
    return {
        "form": f"{STOPS} stops of either side",
        "rows": served["rows"],
        "rows beyond the report": max(0, sum(sizes) - served["rows"] - served["unanswered"]),
        "rows beyond an unbroken run": lost,
        "requests beyond": len(sizes) - len(unbroken),
        "files that differ": len(differ),
    }


def _speed() -> list[Cells]:
    """The same run with one request at a time and with several, on a server that takes its time."""
    x = torch.rand(8 * AT_ONCE, FEATURES, generator=torch.Generator().manual_seed(SEED))
    data = x, in_process(x).argmax(1)
    found: list[Cells] = []
    for at_once in (1, AT_ONCE):
        with CountingServer(scores, (FEATURES,), delay=DELAY_S) as server:
            begun = time.monotonic()
            result: Result = holdfast.assess(
                holdfast.open_model(
                    server.url, allow_hosts=["127.0.0.1"], http_max_rows=8, http_concurrency=at_once
                ),
                data,
                SLOW_THREAT,
                "black-box",
                doubts=False,
            )
            seconds = time.monotonic() - begun
            beyond = server.rows - result.evidence.served["rows"]
        found.append(
            {
                "form": f"{DELAY_S:g} s an answer, requests at once: {at_once}",
                "rows": result.evidence.served["rows"],
                "rows beyond the report": beyond,
                "seconds": round(seconds, 2),
            }
        )
    found[1]["times as fast"] = round(found[0]["seconds"] / found[1]["seconds"], 2)
    return found
