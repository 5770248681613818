"""Models of packages: opened by a command line of their users, assessed beside an independent attack, and explained."""

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from resource import RUSAGE_SELF, getrusage
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import ours
from benchmarks.field import packages
from benchmarks.field.entries import ENTRIES
from benchmarks.large_networks import large
from benchmarks.meter import cpu_seconds
from benchmarks.networks import ROOT
from benchmarks.record import Cells, Claim, Outcome
from holdfast.attacks import PGD
from holdfast.core.meter import batch_size_for

WHAT = "18 models of packages: opened, assessed beside an independent attack, and explained, by command lines of users"
STEPS, N, EPS, ROUNDS = 10, 16, 0.5 / 255, 2
"""PGD on MobileNetV2, with random weights and images"""


def measured() -> Outcome:
    packages.install()
    detail: Cells = {}
    for name in ENTRIES:
        kept = packages.FOLDER.with_name(name) / "cells.json"
        if "--afresh" in sys.argv or not kept.is_file():
            command = [sys.executable, "-m", "benchmarks.field", "--only", name]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            if not kept.is_file():
                kept.write_text(json.dumps({"reason": f"the process ended: {done.stderr.strip()[-300:]}"}))
        detail[name] = json.loads(kept.read_text())
    opened = {name: cells for name, cells in detail.items() if "reason" not in cells}
    beaten = [name for name, cells in opened.items() if cells["independent"] < cells["low"]]
    detail["cost"] = _cost()
    seconds, memory = detail["cost"]["seconds"], detail["cost"]["memory"]
    claims = [
        Claim("models opened, of 18 >= 16", len(opened), 16, least=True),
        Claim(
            "models where the independent attack breaks more by more than the interval <= 0", len(beaten), 0
        ),
        Claim("median of lines besides the command <= 3", median(c["lines"] for c in opened.values()), 3),
        Claim("hatesonar: verdict is not that of exhaustive search <= 0", _differs(detail["hate"]), 0),
        Claim("MobileNetV2, PGD-10: CPU / naive loop <= 0.8", seconds, 0.8),
        Claim("MobileNetV2, PGD-10: peak memory / naive loop <= 0.7", memory, 0.7),
    ]
    table = [_line(name, detail[name]) for name in ENTRIES]
    config: Cells = {"models": len(ENTRIES), "seed": 0, "suite": "the default of each kind of model"}
    return Outcome(table, claims, config, detail)


def _differs(cells: Cells) -> float:
    return 1.0 if "reason" in cells else abs(cells["independent"] - cells["robust"])


def _line(name: str, cells: Cells) -> Cells:
    entry = ENTRIES[name]
    row: Cells = {
        "model": entry.model,
        "package": entry.package,
        "licence": entry.licence,
        "lines": entry.lines,
    }
    if "reason" in cells:
        return {**row, "robust accuracy": f"not opened: {cells['reason'][:200]}"}
    interval = f"{100 * cells['low']:.0f} to {100 * cells['high']:.0f}"
    return {
        **row,
        "access": cells["access"],
        "threat": f"`{cells['threat']}`",
        "n": cells["n"],
        "clean accuracy, %": f"{100 * cells['clean']:.0f}",
        "robust accuracy, % (interval)": f"{100 * cells['robust']:.0f} ({interval})",
        "independent, %": f"{100 * cells['independent']:.0f} ({cells['versus']})",
        "CPU s": f"{cells['cpu_s']:.0f}",
        "GB": f"{cells['memory_gb']:.1f}",
    }


def _cost() -> Cells:
    """CPU time and peak memory of PGD over a naive loop on the whole batch, in processes of their own, in turns."""
    spent: dict[str, list[tuple[float, float]]] = {"loop": [], "holdfast": []}
    for k in range(ROUNDS):
        for name in sorted(spent, reverse=k % 2 == 0):
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                spent[name].append(process.submit(_spent, _loop if name == "loop" else _holdfast).result())
    ratios = [
        median(ours) / median(theirs)
        for ours, theirs in zip(
            zip(*spent["holdfast"], strict=True), zip(*spent["loop"], strict=True), strict=True
        )
    ]
    return {"seconds": ratios[0], "memory": ratios[1], "spent": spent}


def _spent(opened: Callable[[], Callable[[], object]]) -> tuple[float, float]:
    """CPU seconds of the work, and the peak memory of its process in GiB."""
    seconds = cpu_seconds(opened())
    return seconds, getrusage(RUSAGE_SELF).ru_maxrss / 2**20


def _loop() -> Callable[[], object]:
    net, x, y = large("MobileNetV2", N)
    torch.set_num_threads(1)
    return partial(_naive, net, x, y)


def _naive(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """PGD as a user writes it, with a random start, over the whole batch."""
    x_adv = (x + EPS * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
    for _ in range(STEPS):
        x_adv.requires_grad_()
        loss = F.cross_entropy(net(x_adv), y)
        (gradient,) = torch.autograd.grad(loss, x_adv)
        x_adv = x_adv.detach() + EPS / 4 * gradient.sign()
        x_adv = torch.minimum(torch.maximum(x_adv, x - EPS), x + EPS).clamp(0, 1)
    return net(x_adv).argmax(1) != y


def _holdfast() -> Callable[[], object]:
    net, x, y = large("MobileNetV2", N)
    torch.set_num_threads(1)
    return partial(
        ours.assessed,
        net,
        x,
        y,
        [PGD(steps=STEPS, drop=False)],
        "Linf",
        EPS,
        size=batch_size_for(x[0].numel(), "cpu"),
    )
