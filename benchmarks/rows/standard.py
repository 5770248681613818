"""`standard` against the reference's committed verdicts, example by example on the same images.

Seed 0 here and seed 0 there have nothing in common, so every run of ours is held against every run of the reference.
"""

import json
import math
from itertools import permutations, product
from statistics import mean, median, pstdev
from typing import Any

import torch

from benchmarks import ours
from benchmarks.absent import Absent
from benchmarks.networks import images, network
from benchmarks.record import Cells, Claim, Outcome
from benchmarks.reference_verdicts import CASES, Case
from holdfast.attacks.suites import suite

WHAT = "`standard` beside the reference AutoAttack: examples that it breaks and ours does not"


def measured() -> Outcome:
    table: list[Cells] = []
    claims, detail, notes = [], {}, []
    for name, cases in _by_setting().items():
        try:
            theirs, mine, cells = _one(cases)
        except Absent as why:
            notes.append(f"{name}: {why}")
            continue
        missed, own = broken_rate(theirs, mine), own_rate(theirs)
        if len(theirs) == 1:
            notes.append(f"{name}: one seed, so the reference's own rate is not known and counts as 0")
        table.append({
            "setting": name, "seeds": len(theirs), **cells, "missed, points": missed, "reference's own, points": own,
            "only ours broke, points": broken_rate(mine, theirs),
            **({"standard error of the excess": jackknifed(theirs, mine)} if len(theirs) > 2 else {}),
        })  # fmt: skip
        claims.append(
            Claim(f"{name}: missed beyond the reference's own rate, points <= 0.1", missed - own, 0.1)
        )
        detail[name] = {"ours": [_code(o) for o in mine], "theirs": [_code(r) for r in theirs]}
    return Outcome(table, claims, {"seeds": "those of the verdicts", "batch": 256}, detail, notes)


def _by_setting() -> dict[str, list[Case]]:
    settings: dict[str, list[Case]] = {}
    for case in CASES:
        settings.setdefault(f"{case.network} {case.norm} {case.eps:.4g} n={case.n}", []).append(case)
    return settings


def _one(cases: list[Case]) -> tuple[list[torch.Tensor], list[torch.Tensor], Cells]:
    """Which examples stand after each seed of the reference and of ours, and cells for the table."""
    first = cases[0]
    net = network(first.network)
    known = [_verdicts(case, net.sha256) for case in cases]
    x, y = images(net.data, first.n)
    attacks = [attack for _, attack in suite("standard", ours.constraint(first.norm, first.eps)).attacks]
    mine, seconds, stages = [], [], []
    for case in cases:
        evidence = ours.assessed(net.module, x, y, attacks, first.norm, first.eps, seed=case.seed)
        mine.append(evidence["correct"] & ~evidence["success"])
        seconds.append(evidence.cost.cpu_s)
        stages.append([int(evidence["correct"].sum()), *(a.surviving_after for a in evidence.attacks)])
    theirs = [torch.tensor([c == "." for c in k["verdicts"]]) for k in known]
    cells = {
        "reference, after each stage": _stages([k["survivors"] for k in known]),
        "ours, after each stage": _stages(stages),
        "CPU s then / now": f"{median(k['cpu_s'] for k in known):.0f} / {median(seconds):.0f}",
    }
    return theirs, mine, cells


def _verdicts(case: Case, sha256: str) -> dict[str, Any]:
    if not case.path.is_file():
        raise Absent(f"{case.path.name} is not made; run `python -m benchmarks.reference_verdicts`")
    known: dict[str, Any] = json.loads(case.path.read_text())
    if known["sha256"] != sha256:
        raise Absent(
            f"{case.path.name} is of weights {known['sha256'][:12]}, here are {sha256[:12]}; "
            f"run `python -m benchmarks.reference_verdicts --only {case.network} --again`"
        )
    return known


def broken_rate(broke: list[torch.Tensor], missed: list[torch.Tensor]) -> float:
    """Points of examples that one run of `broke` breaks and one of `missed` does not, over all pairs."""
    return mean(_missed(a, b) for a, b in product(broke, missed))


def own_rate(theirs: list[torch.Tensor]) -> float:
    """The same between the reference's own runs; 0 where there is only one."""
    return mean(_missed(a, b) for a, b in permutations(theirs, 2)) if len(theirs) > 1 else 0.0


def jackknifed(theirs: list[torch.Tensor], mine: list[torch.Tensor]) -> float:
    """Standard error of the rate beyond the reference's own, a run of each side left out in turn; as many of both."""
    n = len(theirs)
    kept = [(theirs[:k] + theirs[k + 1 :], mine[:k] + mine[k + 1 :]) for k in range(n)]
    return math.sqrt(n - 1) * pstdev(broken_rate(r, o) - own_rate(r) for r, o in kept)


def _missed(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Points of examples that the first broke and the second did not."""
    return 100 * (~reference & other).double().mean().item()


def _code(surviving: torch.Tensor) -> str:
    return "".join("." if s else "x" for s in surviving.tolist())


def _stages(runs: list[list[int]]) -> str:
    """Survivors after each stage, the median over the seeds."""
    return " ".join(str(int(median(column))) for column in zip(*runs, strict=True))
