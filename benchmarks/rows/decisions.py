"""Attacks on labels alone at 1,000 queries, beside Foolbox, CleverHans, ART and the authors of RayS and SurFree."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import ours
from benchmarks.absent import Absent
from benchmarks.compare_attacks import distances
from benchmarks.comparisons.asking import art, cleverhans, foolbox, surfree
from benchmarks.comparisons.comparison import Comparison, Reference
from benchmarks.comparisons.running import rays
from benchmarks.meter import Counted, cpu_seconds
from benchmarks.networks import Network, images, network
from benchmarks.paired import ahead
from benchmarks.parts import part
from benchmarks.record import Cells, Claim, Outcome
from holdfast.attacks import Boundary, GeoDA, HopSkipJump, RayS, SignOPT, SurFree
from holdfast.attacks.protocol import Attack

WHAT = (
    "attacks on labels alone at 1,000 queries: median distance over all (inf kept) and CPU time, same images"
)
QUERIES, N = 1000, 200
NETWORKS = ("mnist_badnet", "cifar_cnn_a_adv")


@dataclass(frozen=True)
class Contest:
    """One of our attacks and the peers that have it; their steps are the most that stay within the budget."""

    name: str
    norm: str
    attack: Attack
    peers: dict[str, Reference]


def _contests(data: str) -> tuple[Contest, ...]:
    """The peers' steps are the most that keep the mean of an image's queries within the budget, on other images."""
    jumps = {"initial_gradient_eval_steps": 36, "gamma": 30.0}
    return (
        Contest(
            "HopSkipJump L2", "L2", HopSkipJump(queries=QUERIES),
            {"CleverHans": cleverhans(num_iterations=10, initial_num_evals=36, gamma=30.0),
             "Foolbox": foolbox("HopSkipJumpAttack", steps=10, **jumps),
             "ART": art("HopSkipJump", norm=2, max_iter=11, init_eval=30, max_eval=1000)},
        ),
        Contest(
            "HopSkipJump Linf", "Linf", HopSkipJump(queries=QUERIES),
            {"CleverHans": cleverhans(num_iterations=10, initial_num_evals=36, gamma=30.0),
             "Foolbox": foolbox("HopSkipJumpAttack", steps=9, **jumps)},
        ),
        Contest("RayS", "Linf", RayS(queries=QUERIES), {"its authors": rays(QUERIES)}),
        Contest("SurFree", "L2", SurFree(queries=QUERIES), {"its authors": surfree(QUERIES)}),
        Contest(
            "GeoDA", "L2", GeoDA(queries=QUERIES),
            {"ART": art("GeoDA", norm=2, max_iter=QUERIES, sub_dim=14 if data == "mnist" else 16)},
        ),
        Contest(
            "SignOPT", "L2", SignOPT(queries=QUERIES),
            {"ART": art("SignOPTAttack", targeted=False, query_limit=QUERIES, k=60)},
        ),
        Contest(
            "Boundary", "L2", Boundary(queries=QUERIES),
            {"Foolbox": foolbox("BoundaryAttack", steps=800),
             "ART": art("BoundaryAttack", targeted=False, max_iter=30, num_trial=20)},
        ),
    )  # fmt: skip


def measured() -> Outcome:
    table: list[Cells] = []
    claims: list[Claim] = []
    detail: Cells = {}
    notes = ["only images that the network has right; the peers' settings were chosen on others"]
    for name in NETWORKS:
        try:
            net = network(name)
            x, y = _right(net, N)
        except Absent as why:
            notes.append(f"{name}: {why}")
            continue
        for contest in _contests(net.data):
            called = f"{name} {contest.name}"
            kept = part("decisions", called, partial(_one, contest, net.module, x, y))
            cells = [{"network": name, **cell} for cell in kept["measured"]["cells"]]
            table += cells
            notes += kept["measured"]["notes"]
            claims += _claims(called, cells, kept["measured"]["away"])
            detail[called] = kept
    return Outcome(
        table, claims, {"queries": QUERIES, "n": N, "networks": NETWORKS, "seed": 0}, detail, notes
    )


def _right(net: Network, n: int) -> tuple[Tensor, Tensor]:
    """The first `n` test images that the network has right: some peers cannot start from others."""
    x, y = images(net.data, 2 * n)
    with torch.no_grad():
        right = net.module(x).argmax(1) == y
    return x[right][:n], y[right][:n]


def _one(contest: Contest, module: nn.Module, x: Tensor, y: Tensor) -> Cells:
    """`cells` of the table, `notes`, and by contestant how far `away` each example was found."""
    notes: list[str] = []
    found = ours.assessed(module, x, y, [contest.attack], contest.norm, None)
    away, spent = ours.distance(found, contest.norm), found.cost
    aways = {"holdfast": away.tolist()}
    cells = [
        _cell(contest, "holdfast", away, float(found["queries"].max()), spent.forwards / len(x), spent.cpu_s)
    ]
    case = Comparison(contest.name, contest.norm, None, {}, {}, {})
    for who, run in contest.peers.items():
        counted, returned = Counted(module), []
        torch.manual_seed(0)
        try:
            seconds = cpu_seconds(lambda r=run, c=counted, o=returned: o.append(r(c, x.clone(), y, case)))  # type: ignore[misc]
        except Absent as why:
            notes.append(f"{who}: {why}")
            continue
        except Exception as error:  # noqa: BLE001 - a peer that raises is a result of its own
            notes.append(f"{contest.name} by {who} raises {type(error).__name__}: {error}"[:200])
            continue
        away = _judged(module, x, y, returned[0], contest.norm)
        aways[who] = away.tolist()
        cells.append(_cell(contest, who, away, None, counted.forwards / len(x), seconds))
    return {"cells": cells, "notes": notes, "away": aways}


def _cell(
    contest: Contest, who: str, away: Tensor, most: float | None, forwards: float, seconds: float
) -> Cells:
    return {
        "attack": contest.name, "n": len(away), "who": who,
        "success": away.isfinite().double().mean().item(),
        "median": away.double().quantile(0.5, interpolation="lower").item(),
        "queries / image": forwards, "CPU s": seconds, **({} if most is None else {"most queries": most}),
    }  # fmt: skip


def _judged(module: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor, norm: str) -> Tensor:
    """The distance of each returned input that the bare network has wrong, inside the box; else inf."""
    with torch.no_grad():
        wrong = module(x_adv).argmax(1) != y
    legal = ((x_adv >= -1e-6) & (x_adv <= 1 + 1e-6)).flatten(1).all(1)
    return torch.where(wrong & legal, distances(x_adv, x, norm), torch.inf)


def _claims(called: str, cells: list[Cells], away: dict[str, list[float]]) -> list[Claim]:
    mine, theirs = cells[0], cells[1:]
    claims = [Claim(f"{called}: queries of an image <= 1000", mine["most queries"], QUERIES)]
    if theirs:
        best = min(theirs, key=lambda cell: cell["median"])
        claims.append(Claim(f"{called}: median / the best peer's <= 1", mine["median"] / best["median"], 1.0))
        claims.append(Claim(f"{called}: CPU / the best peer's <= 0.5", mine["CPU s"] / best["CPU s"], 0.5))
        near = {who: torch.tensor(far, dtype=torch.float64) <= best["median"] for who, far in away.items()}
        gain = ahead(near["holdfast"], near[best["who"]])
        claims.append(
            Claim(
                f"{called}: success at the best peer's median, gain / standard error >= -1",
                gain,
                -1.0,
                least=True,
            )
        )
    return claims
