"""Minimum-norm attacks on undefended networks: success, median distance, cost; beside adv-lib."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median, median_low
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import ours
from benchmarks.compare_attacks import distances
from benchmarks.meter import Counted, cpu_seconds, naive_floor
from benchmarks.networks import present
from benchmarks.parts import part
from benchmarks.peers import peer
from benchmarks.record import Cells, Claim, Outcome
from benchmarks.side_by_side import FLOOR, ratio, timed
from holdfast.attacks import ALMA, DDN, FMN, PDPGD, CarliniWagner, DeepFool, SigmaZero, SuperDeepFool
from holdfast.attacks.protocol import Attack
from holdfast.core.evidence import Evidence

WHAT = "minimum-norm attacks on undefended networks: success, median over all (inf kept), cost"
N = 100
SETTINGS = (("mnist-cnn", N), ("mnist_badnet", N), ("cifar_resnet20", 24))
"""Networks, and how many images the dear attacks take: few on the last, whose pass costs over ten times the others'."""
_SECONDS, _ROUNDS = 8.0, (1, 9)  # what the rounds of an attack should take of the CPU, and how many there are
LINF = float("inf")


@dataclass(frozen=True)
class Contest:
    """One of our attacks and adv-lib's call of the same name and budget."""

    name: str
    norm: str
    attack: Attack
    theirs: tuple[str, dict[str, Any]]
    dear: bool = False
    """whether it takes only as many images as the settings say"""
    paired: bool = False
    """whether its median is to be at most 1.01 times theirs, and under L0 at most theirs"""


CONTESTS = (
    Contest("DDN 20", "L2", DDN(steps=20), ("ddn", {"steps": 20, "levels": None})),
    Contest("DDN 100", "L2", DDN(steps=100), ("ddn", {"steps": 100, "levels": None})),
    Contest("DeepFool L2", "L2", DeepFool(steps=50), ("df", {"steps": 50, "norm": 2})),
    Contest("DeepFool Linf", "Linf", DeepFool(steps=50), ("df", {"steps": 50, "norm": LINF})),
    Contest(
        "C&W L2 9x100", "L2", CarliniWagner(searches=9, steps=100),
        ("carlini_wagner_l2", {"binary_search_steps": 9, "max_iterations": 100}), dear=True,
    ),
    *(
        Contest(f"FMN {norm} 100", norm, FMN(steps=100), ("fmn", {"steps": 100, "norm": order}), dear=True, paired=True)
        for norm, order in (("L0", 0), ("L1", 1), ("L2", 2), ("Linf", LINF))
    ),
    *(
        Contest(
            f"PDPGD {norm} 100", norm, PDPGD(steps=100),
            ("pdpgd", {"num_steps": 100, "norm": order, "proximal_operator": operator}), dear=True, paired=True,
        )
        for norm, order, operator in (("L0", 0, 23), ("L1", 1, 1), ("L2", 2, 2), ("Linf", LINF, LINF))
    ),
    *(
        Contest(
            f"ALMA {norm} 100", norm, ALMA(steps=100),
            ("alma", {"num_steps": 100, "distance": norm.lower(), "init_lr_distance": first, "α": 0.5}), dear=True,
            paired=True,
        )
        for norm, first in (("L2", 0.1), ("L1", 0.5))
    ),
    Contest("sigma-zero 100", "L0", SigmaZero(steps=100), ("sigma_zero", {"num_steps": 100}), dear=True, paired=True),
    Contest("SuperDeepFool 50", "L2", SuperDeepFool(steps=50), ("sdf", {"steps": 50, "df_steps": 50}), dear=True),
)  # fmt: skip


def measured() -> Outcome:
    table: list[Cells] = []
    claims: list[Claim] = []
    detail, notes = {}, []
    for net, x, y, n in present(SETTINGS, N, notes):
        found: dict[str, list[float]] = {}
        for contest in CONTESTS:
            many, called = n if contest.dear else N, f"{net.name} {contest.name}"
            kept = part("minimum-norm", called, partial(_one, contest, net.module, x[:many], y[:many]))
            one = kept["measured"]
            found[contest.name] = one["away"]
            table += [{"network": net.name, "n": many, **c} for c in one["cells"]]
            claims += _claims(net.name, contest, one["cells"], one["seconds"], found)
            detail[called] = kept
            notes += [f"{who}: {why}" for who, why in one["absent"].items()]
    settings = {"networks, and n of the dear attacks": SETTINGS, "n": N, "rounds": _ROUNDS, "seed": 0}
    return Outcome(table, claims, settings, detail, notes)


def _one(contest: Contest, module: nn.Module, x: Tensor, y: Tensor) -> Cells:
    """`cells` of the table, `seconds` by round, who was `absent`, and how far `away` ours found each example."""
    found: list[Evidence] = []
    returned: list[Tensor] = []
    contestants: dict[str, Callable[[], object]] = {
        "holdfast": lambda: found.append(ours.assessed(module, x, y, [contest.attack], contest.norm, None)),
        "adv-lib": lambda: returned.append(_advlib(contest, module, x, y)),
    }
    evidence = ours.assessed(module, x, y, [contest.attack], contest.norm, None)
    steps, passes = round(evidence.cost.backwards / len(x)), round(evidence.cost.forwards / len(x))
    contestants[FLOOR] = partial(naive_floor, module, x, y, steps, max(passes - steps, 0))
    rounds = min(max(round(_SECONDS / evidence.cost.cpu_s), _ROUNDS[0]), _ROUNDS[1])
    seconds, absent = timed(contestants, rounds)
    away = ours.distance(evidence, contest.norm)
    cells: list[Cells] = [
        {"attack": contest.name, "who": "holdfast", "success": away.isfinite().double().mean().item(),
         "median": ours.median_distance(evidence, contest.norm), "forwards / image": evidence.cost.forwards / len(x),
         "backwards / image": evidence.cost.backwards / len(x), "cost / floor": ratio(seconds, "holdfast"),
         "CPU s": median(seconds["holdfast"])}
    ]  # fmt: skip
    if "adv-lib" in seconds:
        counted = Counted(module)
        cpu_seconds(partial(_advlib, contest, counted, x, y))
        success, middle = _judged(module, x, y, returned[-1], contest.norm)
        cells.append(
            {"attack": contest.name, "who": "adv-lib", "success": success, "median": middle,
             "forwards / image": counted.forwards / len(x), "backwards / image": counted.backwards / len(x),
             "cost / floor": ratio(seconds, "adv-lib"), "CPU s": median(seconds["adv-lib"])}
        )  # fmt: skip
    return {"cells": cells, "seconds": seconds, "absent": absent, "away": away.tolist()}


def _claims(
    name: str,
    contest: Contest,
    cells: list[Cells],
    seconds: dict[str, list[float]],
    found: dict[str, list[float]],
) -> list[Claim]:
    mine, theirs = cells[0], cells[1] if len(cells) > 1 else None
    called = f"{name} {contest.name}"
    claims = []
    if not contest.name.startswith("DDN 20"):
        claims.append(Claim(f"{called}: success >= 1", mine["success"], 1.0, least=True))
    if contest.name.startswith("DDN"):
        claims.append(Claim(f"{called}: cost / floor <= 1.10", mine["cost / floor"], 1.1))
        if theirs:
            claims.append(
                Claim(f"{called}: median / adv-lib's <= 1.005", mine["median"] / theirs["median"], 1.005)
            )
    if contest.name.startswith("DeepFool") and theirs:
        claims.append(Claim(f"{called}: cost / adv-lib's <= 1", ratio(seconds, "holdfast", "adv-lib"), 1.0))
    if contest.paired and theirs:
        most = 1.0 if contest.norm == "L0" else 1.01
        share = mine["median"] / theirs["median"]
        claims.append(Claim(f"{called}: median / adv-lib's <= {most}", share, most))
    if contest.name.startswith("C&W"):
        same = median_low(found["DDN 100"][: len(found[contest.name])])
        claims.append(Claim(f"{called}: median / DDN 100's <= 1.02", mine["median"] / same, 1.02))
    return claims


def _advlib(contest: Contest, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    attack, settings = contest.theirs
    torch.manual_seed(0)
    found: Tensor = getattr(peer("adv_lib.attacks"), attack)(module, x.clone(), y, **settings)
    return found.detach()


def _judged(module: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor, norm: str) -> tuple[float, float]:
    """Success and the median over all of what a peer returned, by the bare network."""
    with torch.no_grad():
        clean_wrong, wrong = module(x).argmax(1) != y, module(x_adv).argmax(1) != y
    away = torch.where(wrong, distances(x_adv, x, norm), torch.inf).masked_fill(clean_wrong, 0.0)
    return away.isfinite().double().mean().item(), away.quantile(0.5, interpolation="lower").item()
