"""Models that `holdfast.harden` makes for a row, each in a run of its own in the cache, which goes on."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import holdfast
from benchmarks.absent import Absent
from benchmarks.networks import folder
from benchmarks.parts import RUNS, part
from benchmarks.record import Cells
from holdfast.io.data.data import bundled_data
from holdfast.runs.assess.result import Result
from holdfast.runs.harden.hardened import Hardened
from holdfast.verbs.configuration import given
from holdfast.verbs.harden import hardened
from holdfast.verbs.settings import Harden

N = 1_000
Examples = tuple[Tensor, Tensor]


def dataset(name: str) -> Path:
    """The file of a data set, which must be there."""
    path = folder("HOLDFAST_DATA", "data") / f"{name}.npz"
    if not path.is_file():
        raise Absent(f"{path.name} is not at hand; HOLDFAST_DATA names its folder")
    return path


def made(
    row: str, name: str, model: str | nn.Module, data: str | Examples, threat: str, recipe: str | dict[str, Any],
    budget: str | None, *, suite: str, n: int = N, seed: int = 0, threads: int = 1, device: str = "cpu",
    by_cpu: bool = False, **more: Any,
) -> Cells:  # fmt: skip
    """The card of a part: the model judged before and after on the first `n` test images.

    With `by_cpu` the budget is CPU time, which other processes on the machine do not shorten; for one thread.
    """

    def measured() -> Cells:
        known = dataset(data) if isinstance(data, str) and data not in bundled_data() else data
        torch.set_num_threads(threads)
        settings: dict[str, Any] = dict(
            threat=threat, recipe=recipe, budget=budget, suite=suite, n=n, seed=seed, device=device, **more
        )
        run = RUNS / row / name
        try:
            if by_cpu:
                found = hardened_in_cpu_time(model, known, run=run, **settings)
            else:
                found = holdfast.harden(model, known, run=run, resume=True, **settings)
        finally:
            torch.set_num_threads(1)
        there = folder("HOLDFAST_DATA", "data")  # which is another one elsewhere
        card: Cells = json.loads(json.dumps(found.card).replace(f"{there}/", ""))
        return card

    return part(row, name, measured)


def hardened_in_cpu_time(
    model: str | nn.Module, data: str | Path | Examples, *, run: Path | None = None, **more: Any
) -> Hardened:
    """The result of a hardening on one thread, whose budget is CPU time, so that other work on the machine takes
    nothing from it. With `run`, a run in this folder goes on.
    """
    known = dataset(data) if isinstance(data, str) and data not in bundled_data() else data
    settings = given(
        model=model, data=str(known) if isinstance(known, Path) else known, **{"device": "cpu", **more}
    )
    torch.set_num_threads(1)
    return hardened(Harden(**settings), run, resume=run is not None, command="", clock=time.process_time)


def standing(result: Result) -> list[bool]:
    """Which examples are right without an attack and after every attack of the suite."""
    mask: list[bool] = (result.evidence["correct"] & ~result.evidence["suite_success"]).tolist()
    return mask


def shares(card: Cells) -> Cells:
    """Clean and robust accuracy of a card in %, each with its interval."""
    metrics = card["after"]["metrics"]
    return {
        "clean, %": interval(metrics["clean_accuracy"]),
        "robust, %": interval(metrics["suite_robust_accuracy"]),
        "n": card["after"]["n"],
    }


def interval(share: Mapping[str, float]) -> str:
    """A share in %, with its interval."""
    value, low, high = (100 * share[key] for key in ("value", "low", "high"))
    return f"{value:.1f} ({low:.1f}–{high:.1f})"


def percent(card: Cells, name: str) -> float:
    """A share of the new model, in %."""
    return 100 * float(card["after"]["metrics"][name]["value"])


def spent(card: Cells, *, by_cpu: bool = False) -> Cells:
    """What the training took, and before it the plan. With `by_cpu` the budget was CPU time."""
    cost = card["cost"]
    return {
        "epochs": card["epochs"], "passes": cost["forwards"],
        "CPU s of the budget" if by_cpu else "wall s": cost["wall_s"],
        "planning s": cost["planning_s"], "CPU s": cost["cpu_s"],
    }  # fmt: skip
