"""Attacks that see scores alone at 1,000 queries, beside the best of their peers on the same images."""

import torch
from torch import Tensor, nn

from benchmarks import ours
from benchmarks.absent import Absent
from benchmarks.compare_attacks import verdicts
from benchmarks.comparisons import COMPARISONS, Comparison
from benchmarks.meter import Counted, cpu_seconds
from benchmarks.networks import present
from benchmarks.record import Cells, Claim, Outcome
from holdfast.attacks.protocol import Attack

WHAT = "attacks on scores at 1,000 queries and their peers: success paired on the same images, and time"
QUERIES, SEED = 1000, 0
CASES = ("sparse-rs", "sparse-rs-cifar", "simba-cosines", "estimated-cifar", "bandits-linf", "bandits-l2")


def measured() -> Outcome:
    table: list[Cells] = []
    claims, notes, detail = [], [], {}
    for case in (case for name in CASES for case in COMPARISONS if case.name == name):
        for net, x, y in present([(case.network,)], case.n, notes):
            sides = {who: _ours(attack, net.module, x, y, case) for who, attack in case.ours.items()}
            peers: dict[str, tuple[Tensor, Cells]] = {}
            for who in case.references:
                try:
                    peers[who] = _theirs(who, net.module, x, y, case)
                except Absent as why:
                    notes.append(f"{who}: {why}")
            table += [{"case": case.name, "who": who, **cells} for who, (_, cells) in (sides | peers).items()]
            for who, side in sides.items():
                claims += _claims(f"{case.name}, {who}" if len(sides) > 1 else case.name, side, peers)
            shares = {who: broken.double().mean().item() for who, (broken, _) in (sides | peers).items()}
            detail[case.name] = {
                "network": net.name,
                "norm": case.norm,
                "eps": case.eps,
                "n": case.n,
                **shares,
            }
    return Outcome(table, claims, {"queries": QUERIES, "seed": SEED, "cases": CASES}, detail, notes)


def _claims(name: str, side: tuple[Tensor, Cells], peers: dict[str, tuple[Tensor, Cells]]) -> list[Claim]:
    """Against the peer that breaks most: the paired difference in its standard errors, and the time."""
    broken, cells = side
    claims = [Claim(f"{name}: queries of an image <= {QUERIES}", cells["most queries"], QUERIES)]
    if not peers:
        return claims
    best, theirs = max(peers.values(), key=lambda peer: peer[0].double().mean().item())
    difference = broken.double() - best.double()
    error = max(difference.std().item() / len(difference) ** 0.5, 1e-9)
    ahead = difference.mean().item() / error
    claims.append(
        Claim(f"{name}: success over the best peer's, in standard errors >= -1", ahead, -1.0, least=True)
    )
    claims.append(Claim(f"{name}: time over that peer's <= 0.5", cells["CPU s"] / theirs["CPU s"], 0.5))
    return claims


def _ours(attack: Attack, module: nn.Module, x: Tensor, y: Tensor, case: Comparison) -> tuple[Tensor, Cells]:
    found = ours.assessed(module, x, y, [attack], case.norm, case.eps, seed=SEED, queries=QUERIES)
    broken = ~found["correct"] | found["success"]
    spent = found.cost
    return broken, {"broken": broken.double().mean().item(), "most queries": int(found["queries"].max()),
                    "forwards / image": spent.forwards / case.n, "CPU s": spent.cpu_s}  # fmt: skip


def _theirs(who: str, module: nn.Module, x: Tensor, y: Tensor, case: Comparison) -> tuple[Tensor, Cells]:
    torch.manual_seed(SEED)
    counted, found = Counted(module), []
    spent = cpu_seconds(lambda: found.append(case.references[who](counted, x.clone(), y, case)))
    clean_wrong, wrong, legal = verdicts(module, x, y, found[0].detach(), case)
    broken = clean_wrong | wrong & legal
    return broken, {"broken": broken.double().mean().item(), "forwards / image": counted.forwards / case.n,
                    "CPU s": spent}  # fmt: skip
