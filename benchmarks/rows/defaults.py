"""The default settings of seven attacks beside those of Foolbox and torchattacks, on the same images."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import ours
from benchmarks.absent import Absent
from benchmarks.compare_attacks import distances
from benchmarks.comparisons.comparison import Comparison, Reference
from benchmarks.comparisons.running import foolbox, torchattacks
from benchmarks.meter import Counted
from benchmarks.networks import present
from benchmarks.parts import part
from benchmarks.record import Cells, Claim, Outcome
from holdfast.attacks import DDN, FGSM, PGD, CarliniWagner, DeepFool, MomentumPGD, Square
from holdfast.attacks.protocol import Attack
from holdfast.statistics.intervals import paired_difference

WHAT = "default settings of seven attacks beside those of Foolbox and torchattacks"
N = 300
SETTINGS = (("mnist-cnn", {"Linf": 0.1, "L2": 1.0}), ("mnist_cnn_a_adv", {"Linf": 0.3, "L2": 2.0}))
"""An undefended and a hardened network, and the eps of each norm; a smallest change of at most eps is a success."""


def _torchattacks(attack: str, alpha: float) -> Reference:
    """The default of torchattacks, whose step size is for an eps of 8/255 or 1, with that share of another eps."""

    def run(model: nn.Module, x: Tensor, y: Tensor, case: Comparison) -> Tensor:
        assert case.eps is not None
        return torchattacks(attack, alpha=alpha * case.eps)(model, x, y, case)

    return run


def _torchattacks_smallest(attack: str) -> Reference:
    """An attack of torchattacks that takes no eps."""

    def run(model: nn.Module, x: Tensor, y: Tensor, case: Comparison) -> Tensor:
        from benchmarks.peers import peer

        out: Tensor = getattr(peer("torchattacks"), attack)(model)(x, y)
        return out

    return run


@dataclass(frozen=True)
class Contest:
    """A default of a peer, and ours: with as many steps if ours has more by default, and otherwise as it is."""

    name: str
    norm: str
    attack: Attack
    peer: str
    reference: Reference
    smallest: bool = False
    """whether the attack finds the smallest change, and takes no eps"""
    n: int = N
    seeds: tuple[int, ...] = (0, 1)


CONTESTS = (
    Contest("FGSM", "Linf", FGSM(), "Foolbox", foolbox("LinfFastGradientAttack"), seeds=(0,)),
    Contest("FGSM", "Linf", FGSM(), "torchattacks", torchattacks("FGSM"), seeds=(0,)),
    Contest("PGD", "Linf", PGD(), "Foolbox", foolbox("LinfPGD")),
    Contest("PGD", "Linf", PGD(steps=10), "torchattacks", _torchattacks("PGD", 0.25)),
    Contest("PGD", "L2", PGD(), "Foolbox", foolbox("L2PGD")),
    Contest("PGD", "L2", PGD(steps=10), "torchattacks", _torchattacks("PGDL2", 0.2)),
    Contest("MIM", "Linf", MomentumPGD(), "Foolbox", foolbox("MIFGSM"), seeds=(0,)),
    Contest("MIM", "Linf", MomentumPGD(), "torchattacks", _torchattacks("MIFGSM", 0.25), seeds=(0,)),
    Contest("DeepFool", "L2", DeepFool(), "Foolbox", foolbox("L2DeepFoolAttack"), True, seeds=(0,)),
    Contest("DeepFool", "L2", DeepFool(), "torchattacks", _torchattacks_smallest("DeepFool"), True, n=50, seeds=(0,)),
    Contest("DeepFool", "Linf", DeepFool(), "Foolbox", foolbox("LinfDeepFoolAttack"), True, seeds=(0,)),
    Contest("DDN", "L2", DDN(steps=94), "Foolbox", foolbox("DDNAttack"), True, seeds=(0,)),
    Contest("C&W", "L2", CarliniWagner(), "Foolbox", foolbox("L2CarliniWagnerAttack"), True, n=30, seeds=(0,)),
    Contest(
        "C&W", "L2", CarliniWagner(searches=1, steps=40), "torchattacks", _torchattacks_smallest("CW"), True, seeds=(0,)
    ),
    Contest("Square", "Linf", Square(), "torchattacks", torchattacks("Square"), n=100),
)  # fmt: skip


def measured() -> Outcome:
    table: list[Cells] = []
    claims: list[Claim] = []
    notes: list[str] = []
    for net, x, y, eps in present(SETTINGS, N, notes):
        for contest in CONTESTS:
            called = f"{net.name} {contest.name} {contest.norm} beside {contest.peer}"
            try:
                one = part("defaults", called, partial(_one, contest, net.module, x, y, eps[contest.norm]))[
                    "measured"
                ]
            except Absent as why:
                notes.append(f"{contest.peer}: {why}")
                continue
            table.append({"network": net.name, **one["cells"]})
            claims.append(Claim(f"{called}: lower end of the peer's success less ours <= 0", one["low"], 0.0))
            if contest.smallest:
                ratio = one["cells"]["median"] / one["cells"]["peer's median"]
                claims.append(Claim(f"{called}: median change / the peer's <= 1.01", ratio, 1.01))
    config: Cells = {"networks and eps": SETTINGS, "n": N, "confidence": 0.95}
    return Outcome(table, claims, config, notes=notes)


def _one(contest: Contest, module: nn.Module, x: Tensor, y: Tensor, eps: float) -> Cells:
    x, y = x[: contest.n], y[: contest.n]
    asked = None if contest.smallest else eps
    case = Comparison(contest.name, contest.norm, asked, {}, {}, {})
    mine, theirs, changes, passes = [], [], ([], []), [0.0, 0.0]
    for seed in contest.seeds:
        found = ours.assessed(module, x, y, [contest.attack], contest.norm, asked, seed=seed)
        torch.manual_seed(seed)
        counted = Counted(module)
        away = _distances(
            module, x, y, contest.reference(counted, x.clone(), y, case).detach().float(), contest.norm
        )
        ours_away = torch.where(found["correct"], torch.inf, 0.0)
        ours_away = (
            torch.where(found["success"], ours.distance(found, contest.norm), ours_away)
            if asked is None
            else (torch.where(found["success"], 0.0, ours_away))
        )
        mine.append(ours_away <= eps)
        theirs.append(away <= eps * (1 + 1e-5) + 1e-6)
        changes[0].append(ours_away)
        changes[1].append(away)
        passes[0] += (found.cost.forwards + found.cost.backwards) / len(x) / len(contest.seeds)
        passes[1] += (counted.forwards + counted.backwards) / len(x) / len(contest.seeds)
    less = paired_difference(torch.cat(theirs), torch.cat(mine))
    cells: Cells = {
        "attack": contest.name, "norm": contest.norm, "eps": eps, "n": contest.n, "seeds": len(contest.seeds),
        "peer": contest.peer, "success": torch.cat(mine).double().mean().item(),
        "peer's success": torch.cat(theirs).double().mean().item(),
        "peer's less ours": f"{100 * less.value:.1f} ({100 * less.low:.1f} to {100 * less.high:.1f})",
        "passes": passes[0], "peer's passes": passes[1],
    }  # fmt: skip
    if contest.smallest:
        medians = [torch.cat(side).double().quantile(0.5, interpolation="lower").item() for side in changes]
        cells |= {"median": medians[0], "peer's median": medians[1]}
    return {"cells": cells, "low": less.low}


def _distances(module: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor, norm: str) -> Tensor:
    """The distance of each returned input: 0 if the clean input is wrong, infinite if the returned one is right."""
    with torch.no_grad():
        clean_wrong, wrong = module(x).argmax(1) != y, module(x_adv).argmax(1) != y
    wrong &= ((x_adv >= -1e-6) & (x_adv <= 1 + 1e-6)).flatten(1).all(1)
    return torch.where(wrong, distances(x_adv, x, norm), torch.inf).masked_fill(clean_wrong, 0.0)
