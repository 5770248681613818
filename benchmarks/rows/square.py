"""Square at 1,000 queries with its schedule scaled to them, beside the peers."""

from collections.abc import Callable
from functools import partial
from statistics import mean

import torch
from torch import Tensor, nn

from benchmarks import ours
from benchmarks.absent import Absent
from benchmarks.meter import Counted, cpu_seconds
from benchmarks.networks import present
from benchmarks.peers import peer
from benchmarks.record import Cells, Claim, Outcome
from holdfast.attacks import Square

WHAT = "Square at 1,000 queries, schedule scaled: success and queries really spent, n = 200, same images"
N, QUERIES, SEEDS = 200, 1000, (0, 1, 2)
SETTINGS = (("mnist-cnn", 0.1), ("single_step", 0.3))


class _Calls(nn.Module):
    """Counts the calls: what an image that stands to the end is asked."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.most = inner, 0

    def forward(self, x: Tensor) -> Tensor:
        self.most += 1
        out: Tensor = self.inner(x)
        return out


def _torchattacks(net: nn.Module, x: Tensor, y: Tensor, eps: float, seed: int) -> Tensor:
    attack = peer("torchattacks").Square(net, eps=eps, n_queries=QUERIES, seed=seed, resc_schedule=True)
    found: Tensor = attack(x, y)
    return found


def _autoattack(net: nn.Module, x: Tensor, y: Tensor, eps: float, seed: int, *, scaled: bool) -> Tensor:
    build = peer("autoattack.square").SquareAttack
    attack = build(
        net, eps=eps, n_queries=QUERIES, seed=seed, resc_schedule=scaled, device="cpu", norm="Linf"
    )
    found: Tensor = attack.perturb(x, y)
    return found


PEERS: dict[str, Callable[[nn.Module, Tensor, Tensor, float, int], Tensor]] = {
    "torchattacks": _torchattacks,
    "AutoAttack, scaled": partial(_autoattack, scaled=True),
    "AutoAttack, unscaled": partial(_autoattack, scaled=False),
}


def measured() -> Outcome:
    table: list[Cells] = []
    claims, detail, notes = [], {}, []
    for net, x, y, eps in present(SETTINGS, N, notes):
        shares: dict[str, list[float]] = {"holdfast": []}
        most = 0
        for seed in SEEDS:
            found = ours.assessed(
                net.module, x, y, [Square(queries=QUERIES)], "Linf", eps, seed=seed, queries=QUERIES
            )
            shares["holdfast"].append(1 - ours.robust_accuracy(found))
            most = max(most, int(found["queries"].max()))
            spent = found.cost
        table.append({"network": net.name, "eps": eps, "who": "holdfast", "broken": mean(shares["holdfast"]),
                      "most calls": most, "forwards / image": spent.forwards / N, "CPU s": spent.cpu_s})  # fmt: skip
        for who, run in PEERS.items():
            try:
                table.append(
                    {
                        "network": net.name,
                        "eps": eps,
                        "who": who,
                        **_peer(run, net.module, x, y, eps, shares, who),
                    }
                )
            except Absent as why:
                notes.append(f"{who}: {why}")
        claims.append(Claim(f"{net.name}: queries of an image <= 1000", most, QUERIES))
        if "torchattacks" in shares:
            ahead = 100 * (mean(shares["holdfast"]) - mean(shares["torchattacks"]))
            claims.append(
                Claim(f"{net.name}: success over torchattacks', points >= 0", ahead, 0.0, least=True)
            )
            ratio = spent.cpu_s / next(
                cells["CPU s"] for cells in table[::-1] if cells["who"] == "torchattacks"
            )
            claims.append(Claim(f"{net.name}: CPU over torchattacks' <= 0.5", ratio, 0.5))
        detail[net.name] = shares
    return Outcome(table, claims, {"n": N, "queries": QUERIES, "seeds": SEEDS}, detail, notes)


def _peer(
    run: Callable[[nn.Module, Tensor, Tensor, float, int], Tensor],
    module: nn.Module, x: Tensor, y: Tensor, eps: float, shares: dict[str, list[float]], who: str,
) -> Cells:  # fmt: skip
    values = []
    for seed in SEEDS:
        calls, counted = _Calls(module), Counted(module)
        calls.inner, found = counted, []
        spent = cpu_seconds(lambda s=seed, c=calls, f=found: f.append(run(c.eval(), x.clone(), y, eps, s)))
        with torch.no_grad():
            values.append((module(found[0]).argmax(1) != y).double().mean().item())
    shares[who] = values
    return {
        "broken": mean(values),
        "most calls": calls.most,
        "forwards / image": counted.forwards / N,
        "CPU s": spent,
    }
