"""What an entry of the field states, and how it is measured: the commands of a user, and an independent attack."""

import importlib.util
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.field import packages
from benchmarks.record import Cells

CODE = "model.py"
"""file of the user in the folder of an entry"""
RESTART = 40
"""gradient steps of a restart of the independent PGD"""


@dataclass(frozen=True)
class Entry:
    """A model of a package, and what its user writes to assess it."""

    model: str
    package: str
    licence: str
    """licence of the package, and that of the weights if it is stated elsewhere"""
    labels: str
    """`true`, or `predicted` where the labels are the predictions of the model for the clean inputs"""
    prepare: Callable[[Path, Path], None]
    """copies the model and writes the data: the folder of the packages, and that of the entry"""
    assess: str
    """arguments of `holdfast assess`"""
    look: str
    """another command of Holdfast with its arguments"""
    independent: Callable[[Path, "Effort"], "Broken"]
    """an attack that uses nothing of Holdfast's attacks: the folder of the entry, and the effort to be spent"""
    code: str = ""
    """content of the user's file"""
    versus: str = "PGD"
    """what the independent attack is"""

    @property
    def lines(self) -> int:
        """Lines that the user writes besides the command, without imports and blank lines."""
        lines = [line for line in self.code.splitlines() if line.strip()]
        return sum(not line.startswith(("import ", "from ")) for line in lines)


@dataclass(frozen=True)
class Effort:
    """What Holdfast's attacks spent on an example that they tried; the independent attack spends at least as much."""

    gradients: int
    queries: int


@dataclass(frozen=True)
class Broken:
    """Result of an independent attack: which of the examples survive, and what it spent on one that does."""

    surviving: Tensor
    spent: int
    note: str = ""


def measured(entry: Entry, folder: Path) -> Cells:
    """Run the commands of an entry in its folder, and then the independent attack; returns the row's cells."""
    folder.mkdir(parents=True)
    site = packages.FOLDER
    (folder / CODE).write_text(entry.code) if entry.code else None
    os.chdir(folder)  # files of the user name others beside them
    entry.prepare(site, folder)
    spent = holdfast(f"assess {entry.assess} --run run -o report.json", folder)
    report = json.loads((folder / "report.json").read_text())
    n, metric = report["n"], report["metrics"]["robust_accuracy"]
    gradients, queries = (
        sum(attack[kind] / max(1, attack["surviving_before"]) for attack in report["attacks"])
        for kind in ("backwards", "queries")
    )
    effort = Effort(math.ceil(gradients), math.ceil(queries))
    began = time.process_time()
    broken = entry.independent(folder, effort)
    own = time.process_time() - began
    looked = holdfast(entry.look, folder)
    robust = float(broken.surviving.double().mean())
    return {
        "model": entry.model,
        "package": entry.package,
        "licence": entry.licence,
        "labels": entry.labels,
        "n": n,
        "access": report["model"]["access"],
        "lines": entry.lines,
        "threat": report["threat"]["constraint"],
        "clean": report["metrics"]["clean_accuracy"]["value"],
        "robust": metric["value"],
        "low": metric["low"],
        "high": metric["high"],
        "independent": robust,
        "versus": entry.versus,
        "spent": broken.spent,
        "effort": {"gradients": effort.gradients, "queries": effort.queries},
        "note": broken.note,
        "cpu_s": spent["cpu_s"],
        "memory_gb": spent["memory_gb"],
        "independent_cpu_s": own,
        "command": f"holdfast assess {entry.assess}",
        "code": entry.code,
        "look": f"holdfast {entry.look}",
        "look_cpu_s": looked["cpu_s"],
        "look_memory_gb": looked["memory_gb"],
        "shown": looked["output"],
        "doubts": [doubt["name"] for doubt in report["doubts"] if doubt["state"] == "raised"],
    }


def holdfast(arguments: str, folder: Path) -> Cells:
    """Run a command line of Holdfast in a folder. Raises `RuntimeError` with its output if it fails."""
    script = Path(sys.executable).with_name("holdfast")
    path = os.pathsep.join([str(packages.FOLDER), str(packages.STAND_INS)])
    own = os.environ.get("PYTHONPATH")
    environment = {**os.environ, "PYTHONPATH": path if own is None else f"{path}{os.pathsep}{own}"}
    with (folder / "output.txt").open("w+") as output:
        process = subprocess.Popen(
            [script, *shlex.split(arguments)],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        _, status, usage = os.wait4(process.pid, 0)
        output.seek(0)
        text = output.read()
    if os.waitstatus_to_exitcode(status):
        raise RuntimeError(f"holdfast {arguments}: {text.strip()[-600:]}")
    seconds, memory = usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20
    return {"cpu_s": seconds, "memory_gb": memory, "output": text.strip()[-1500:]}


def of_user(folder: Path, name: str) -> Any:
    """Return an object of the user's file in the folder of an entry."""
    spec = importlib.util.spec_from_file_location(f"field_{folder.name}", folder / CODE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def arrays(folder: Path, name: str = "data.npz") -> tuple[Tensor, Tensor]:
    """Return inputs and labels of an .npz file; images of whole numbers as a model reads them."""
    with np.load(folder / name) as content:
        x, y = torch.from_numpy(content["x"]), torch.from_numpy(content["y"]).long()
    if x.dtype == torch.uint8:
        x = x.float() / 255
        x = x[:, None] if x.dim() == 3 else x.movedim(-1, 1)
    return x, y


Scores = Callable[[Tensor], Tensor]


def pgd(
    scores: Scores, x: Tensor, y: Tensor, effort: Effort, *, eps: float | Tensor, norm: str = "linf",
    low: float = 0.0, high: float = 1.0, exact: Scores | None = None, at_once: int = 8,
) -> Broken:  # fmt: skip
    """Projected gradient ascent on the margin loss from random starts, within `eps` in Linf or L2 of each example.

    Restarts of `RESTART` steps are run on the examples that survive until each has at least as many gradients as the
    effort. A success counts only if `exact`, such as the runtime of the package, agrees on the input in float32.
    """
    exact = exact or scores
    restarts = max(1, math.ceil(effort.gradients / RESTART))
    radius = torch.as_tensor(eps).expand(len(x)).float()
    rng = torch.Generator().manual_seed(0)
    surviving = (
        torch.cat([wrong_of(exact, a, b) for a, b in zip(x.split(at_once), y.split(at_once), strict=True)])
        == 0
    )
    for _ in range(restarts):
        if not surviving.any():
            break
        for rows in torch.arange(len(x))[surviving].split(at_once):
            for x_adv in _ascent(scores, x[rows], y[rows], radius[rows], norm, low, high, rng):
                surviving[rows] &= wrong_of(exact, x_adv, y[rows]) == 0
                if not surviving[rows].any():
                    break
    return Broken(surviving, restarts * RESTART)


def wrong_of(scores: Scores, x: Tensor, y: Tensor) -> Tensor:
    """Return 1 where the class of the largest score is wrong, a tie included."""
    with torch.no_grad():
        out = torch.as_tensor(np.asarray(scores(x))).double()
    own = out.gather(1, y[:, None])[:, 0]
    rest = out.scatter(1, y[:, None], -torch.inf).amax(1)
    return (rest >= own).long()


def _ascent(
    scores: Scores,
    x: Tensor,
    y: Tensor,
    eps: Tensor,
    norm: str,
    low: float,
    high: float,
    rng: torch.Generator,
) -> Iterator[Tensor]:
    radius = eps.view(-1, *(1,) * (x.dim() - 1))

    def project(delta: Tensor) -> Tensor:
        if norm == "linf":
            delta = torch.minimum(torch.maximum(delta, -radius), radius)
        else:
            length = delta.flatten(1).norm(dim=1).view_as(radius).clamp_min(1e-12)
            delta = delta * (radius / length).clamp_max(1)
        return (x + delta).clamp(low, high) - x

    noise = torch.randn(x.shape, generator=rng)
    scale = 1.0 if norm == "linf" else radius / noise.flatten(1).norm(dim=1).view_as(radius)
    delta = project(
        noise.sign() * radius * torch.rand(x.shape, generator=rng) if norm == "linf" else noise * scale
    )
    for step in range(RESTART):
        leaf = (x + delta).requires_grad_()
        out = scores(leaf)
        own = out.gather(1, y[:, None])[:, 0]
        rest = out.scatter(1, y[:, None], -torch.inf).amax(1)
        (slope,) = torch.autograd.grad((rest - own).sum(), leaf)
        if norm == "linf":
            direction = slope.sign()
        else:
            direction = slope / slope.flatten(1).norm(dim=1).view_as(radius).clamp_min(1e-12)
        size = 0.25 * 0.5 * (1 + math.cos(math.pi * step / RESTART)) + 0.01
        delta = project(delta + size * radius * direction).detach()
        if step % 10 == 9:
            yield x + delta


def random_linf(
    scores: Scores, x: Tensor, y: Tensor, effort: Effort, *, eps: float, low: float = 0.0, high: float = 1.0
) -> Broken:
    """Random search in Linf: squares of one sign that are kept if the margin falls."""
    rng = torch.Generator().manual_seed(0)
    surviving = wrong_of(scores, x, y) == 0
    for row in torch.arange(len(x))[surviving].tolist():
        one, label = x[row : row + 1], y[row : row + 1]
        best, best_margin = one, margin(scores, one, label)
        for query in range(effort.queries):
            side = max(1, round(min(one.shape[2:]) * 0.6 * (1 - query / effort.queries) ** 2))
            top, left = (int(torch.randint(0, size - side + 1, (), generator=rng)) for size in one.shape[2:])
            sign = 2 * torch.randint(0, 2, (1, one.shape[1], 1, 1), generator=rng).float() - 1
            trial = best.clone()
            patch = (..., slice(top, top + side), slice(left, left + side))
            trial[patch] = (one[patch] + eps * sign).clamp(low, high)
            found = margin(scores, trial, label)
            if found < best_margin:
                best, best_margin = trial, found
            if best_margin <= 0:
                surviving[row] = False
                break
    return Broken(surviving, effort.queries)


def margin(scores: Scores, x: Tensor, y: Tensor) -> float:
    """Return the margin of one example."""
    with torch.no_grad():
        out = torch.as_tensor(np.asarray(scores(x))).double()
    return float(out[0, y[0]] - out.scatter(1, y[:, None], -torch.inf).amax(1)[0])
