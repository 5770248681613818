"""The pages of runs: time of the index of 500 runs, and of the page of an example with its explanation."""

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import holdfast
from benchmarks.record import Cells, Claim, Outcome
from holdfast.attacks import FGSM, PGD, Square
from holdfast.viewer.pages import Site, explainer
from holdfast.viewer.shelf import Shelf, checked

ROW = "ui"
WHAT = "the pages of runs: the index of 500 runs of 1,000 examples, and an example with its explanation"
RUNS, EXAMPLES, ROUNDS = 500, 1_000, 5
CHECKED = 20
"""runs whose verdicts are computed from their columns"""
SEED = 0


def measured() -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "runs"
        attacks = [FGSM(), PGD(steps=5), Square(queries=20)]
        arguments: dict[str, Any] = {"threat": "linf:0.1", "suite": attacks, "n": EXAMPLES, "seed": SEED}
        holdfast.assess("mnist-cnn", "mnist", run=root / "run-000", **arguments)
        for k in range(1, RUNS):
            shutil.copytree(root / "run-000", root / f"run-{k:03d}", copy_function=os.link)
        return _outcome(root)


def _outcome(root: Path) -> Outcome:
    shelf = Shelf(root)
    site = Site(shelf, explainer())
    first = _seconds(lambda: site.page(""))
    later = [_seconds(lambda: site.page("")) for _ in range(ROUNDS)]
    items = shelf.items()
    check = [_seconds(lambda item=item: checked(item)) for item in items[:CHECKED]]  # type: ignore[misc]
    item = items[0]
    opened = site.open(item)
    number = next(iter(opened.rows))
    example = _seconds(lambda: site.page(f"run/{item.id}/example/{number}"))
    why = _seconds(lambda: site.page(f"run/{item.id}/example/{number}/why"))
    pages: list[Cells] = [
        {"page": f"index of {RUNS} runs, first", "CPU s": first[1], "s": first[0]},
        {"page": f"index of {RUNS} runs, later (median of {ROUNDS})", **_median(later)},
        {"page": "verdict of one run from its columns (median)", **_median(check)},
        {"page": "example, stored results", "CPU s": example[1], "s": example[0]},
        {"page": "example, explanation", "CPU s": why[1], "s": why[0]},
    ]
    claims = [
        Claim("first index: CPU s <= 1", first[1], 1.0),
        Claim("later index: CPU s <= 1", _median(later)["CPU s"], 1.0),
        Claim("example and its explanation: CPU s <= 6", example[1] + why[1], 6.0),
    ]
    config = {"runs": RUNS, "examples": EXAMPLES, "model": "mnist-cnn", "data": "mnist", "seed": SEED}
    note = "The runs are copies of one run, as hard links. The times are CPU seconds; *s* is the time that passed."
    return Outcome(pages, claims, config, {"index": later, "check": check}, [note])


def _seconds(act: Callable[[], object]) -> tuple[float, float]:
    """The time that passed and the CPU time of an action, in seconds."""
    start, used = time.perf_counter(), time.process_time()
    act()
    return time.perf_counter() - start, time.process_time() - used


def _median(times: list[tuple[float, float]]) -> Cells:
    return {"CPU s": statistics.median(t[1] for t in times), "s": statistics.median(t[0] for t in times)}
