"""Minimum-norm attacks on undefended networks: success, median distance, cost; beside adv-lib and Foolbox."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import isfinite
from statistics import median, median_low

import torch
from torch import Tensor, nn

from benchmarks import ours
from benchmarks.compare_attacks import distances
from benchmarks.comparisons.comparison import Comparison, Reference
from benchmarks.comparisons.running import advlib, foolbox
from benchmarks.meter import Counted, cpu_seconds, naive_floor
from benchmarks.networks import present
from benchmarks.parts import part
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
FEWER = 92
"""Steps of ours that, with the search for the boundary that ends them, take no more passes than 100 of the peers."""


@dataclass(frozen=True)
class Contest:
    """One of our attacks and its peers: with as many steps, the `paired` ones with no more passes than the first."""

    name: str
    norm: str
    attack: Attack
    peers: dict[str, Reference]
    dear: bool = False
    """whether it takes only as many images as the settings say"""
    paired: bool = False
    """whether its median is to be at most 1.01 times the best peer's, and under L0 at most that"""


def _tuned(**settings: float) -> Reference:
    """Chosen for 100 steps on other images of the same networks; its own constants are for 500."""
    return advlib("pdpgd", num_steps=100, **settings)


CONTESTS = (
    Contest("DDN 20", "L2", DDN(steps=20), {"adv-lib": advlib("ddn", steps=20, levels=None)}),
    Contest("DDN 100", "L2", DDN(steps=100), {"adv-lib": advlib("ddn", steps=100, levels=None)}),
    Contest("DeepFool L2", "L2", DeepFool(steps=50), {"adv-lib": advlib("df", steps=50, norm=2)}),
    Contest("DeepFool Linf", "Linf", DeepFool(steps=50), {"adv-lib": advlib("df", steps=50, norm=LINF)}),
    Contest(
        "C&W L2 9x100", "L2", CarliniWagner(searches=9, steps=100),
        {"adv-lib": advlib("carlini_wagner_l2", binary_search_steps=9, max_iterations=100)}, dear=True,
    ),
    *(
        Contest(
            f"FMN {norm}", norm, FMN(steps=FEWER),
            {"adv-lib": advlib("fmn", steps=100, norm=order), "Foolbox": foolbox(name, steps=100)},
            dear=True, paired=True,
        )
        for norm, order, name in (
            ("L0", 0, "L0FMNAttack"), ("L1", 1, "L1FMNAttack"), ("L2", 2, "L2FMNAttack"),
            ("Linf", LINF, "LInfFMNAttack"),
        )
    ),
    *(
        Contest(
            f"PDPGD {norm}", norm, PDPGD(steps=FEWER),
            {"adv-lib": advlib("pdpgd", num_steps=100, norm=order, proximal_operator=operator),
             **{f"adv-lib, tuned {k}": _tuned(norm=order, proximal_operator=operator, **settings)
                for k, settings in enumerate(tuned, 1)}},
            dear=True, paired=True,
        )
        for norm, order, operator, tuned in (
            ("L0", 0, 23, ({"dual_ema": 0.5}, {"dual_lr": 0.5})),
            ("L1", 1, 1, ({"dual_ema": 0.5}, {"dual_lr": 0.5})),
            ("L2", 2, 2, ({"dual_lr": 0.5, "primal_lr": 0.03}, {"dual_ema": 0.5, "dual_lr": 0.5, "primal_lr": 0.01})),
            ("Linf", LINF, LINF,
             ({"dual_lr": 0.5, "primal_lr": 0.03}, {"dual_ema": 0.5, "dual_lr": 0.5, "primal_lr": 0.01})),
        )
    ),
    *(
        Contest(
            f"ALMA {norm}", norm, ALMA(steps=FEWER),
            {"adv-lib": advlib("alma", num_steps=100, distance=norm.lower(), init_lr_distance=first, α=0.5)},
            dear=True, paired=True,
        )
        for norm, first in (("L2", 0.1), ("L1", 0.5))
    ),
    Contest(
        "sigma-zero", "L0", SigmaZero(steps=FEWER), {"adv-lib": advlib("sigma_zero", num_steps=100)}, dear=True,
        paired=True,
    ),
    Contest(
        "SuperDeepFool 50", "L2", SuperDeepFool(steps=50), {"adv-lib": advlib("sdf", steps=50, df_steps=50)}, dear=True,
    ),
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
    returned: dict[str, Tensor] = {}

    def run(who: str, net: nn.Module) -> None:
        torch.manual_seed(0)
        case = Comparison(contest.name, contest.norm, None, {}, {}, {})
        returned[who] = contest.peers[who](net, x.clone(), y, case).detach()

    contestants: dict[str, Callable[[], object]] = {
        "holdfast": lambda: found.append(ours.assessed(module, x, y, [contest.attack], contest.norm, None)),
        **{who: partial(run, who, module) for who in contest.peers},
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
    for who in (who for who in contest.peers if who in seconds):
        counted = Counted(module)
        cpu_seconds(partial(run, who, counted))
        success, middle = _judged(module, x, y, returned[who], contest.norm)
        cells.append(
            {"attack": contest.name, "who": who, "success": success, "median": middle,
             "forwards / image": counted.forwards / len(x), "backwards / image": counted.backwards / len(x),
             "cost / floor": ratio(seconds, who), "CPU s": median(seconds[who])}
        )  # fmt: skip
    return {"cells": cells, "seconds": seconds, "absent": absent, "away": away.tolist()}


def _claims(
    name: str,
    contest: Contest,
    cells: list[Cells],
    seconds: dict[str, list[float]],
    found: dict[str, list[float]],
) -> list[Claim]:
    mine, theirs = cells[0], cells[1:]
    called = f"{name} {contest.name}"
    claims = []
    if not contest.name.startswith("DDN 20"):
        claims.append(Claim(f"{called}: success >= 1", mine["success"], 1.0, least=True))
    if contest.name.startswith("DDN"):
        claims.append(Claim(f"{called}: cost / floor <= 1.10", mine["cost / floor"], 1.1))
    if contest.name.startswith("DeepFool") and theirs:
        claims.append(Claim(f"{called}: cost / adv-lib's <= 1", ratio(seconds, "holdfast", "adv-lib"), 1.0))
    if contest.name.startswith("C&W"):
        same = median_low(found["DDN 100"][: len(found[contest.name])])
        claims.append(Claim(f"{called}: median / DDN 100's <= 1.02", mine["median"] / same, 1.02))
    elif theirs:
        claims.append(_beside(called, contest, mine, min(theirs, key=lambda cell: cell["median"])))
    if contest.paired and theirs:
        passes = [cell["forwards / image"] + cell["backwards / image"] for cell in (mine, theirs[0])]
        claims.append(Claim(f"{called}: passes / adv-lib's <= 1", passes[0] / passes[1], 1.0))
    return claims


def _beside(called: str, contest: Contest, mine: Cells, best: Cells) -> Claim:
    """The median over that of the peer that comes closest, which must have come somewhere."""
    if not isfinite(best["median"]):
        raise ValueError(
            f"{called}: no peer finds half of the examples, so that nothing can be claimed beside it"
        )
    most = 1.005 if contest.name.startswith("DDN") else 1.0 if contest.norm == "L0" else 1.01
    return Claim(f"{called}: median / the best peer's <= {most}", mine["median"] / best["median"], most)


def _judged(module: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor, norm: str) -> tuple[float, float]:
    """Success and the median over all of what a peer returned, by the bare network."""
    with torch.no_grad():
        clean_wrong, wrong = module(x).argmax(1) != y, module(x_adv).argmax(1) != y
    away = torch.where(wrong, distances(x_adv, x, norm), torch.inf).masked_fill(clean_wrong, 0.0)
    return away.isfinite().double().mean().item(), away.quantile(0.5, interpolation="lower").item()
