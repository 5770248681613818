"""One attack of ours and its peers on the same images under one threat: who is broken, and how far ours is ahead."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from benchmarks import ours
from benchmarks.absent import Absent
from benchmarks.meter import Counted, cpu_seconds
from benchmarks.record import Cells, Claim
from holdfast.attacks.protocol import Attack
from holdfast.core.constraints import Constraint
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.runs.harness.measure import measure

Peer = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""Given a counted network, images and labels: images inside the same limits."""
Found = tuple[Tensor, Cells]
"""Who is broken, and the cost."""


def contest(
    case: str, net: nn.Module, x: Tensor, y: Tensor, threat: Constraint, attacks: Mapping[str, Attack],
    peers: Mapping[str, Peer], table: list[Cells], notes: list[str], *, seed: int, wider: frozenset[str] = frozenset(),
) -> list[Claim]:  # fmt: skip
    """Lines of the table and claims of one case: each of our attacks against each peer, on the images that are right.

    Of the peers in `wider`, which may do more than the threat allows, nothing is claimed.
    """
    with torch.no_grad():
        right = net(x).argmax(1) == y
    x, y = x[right], y[right]
    found = {who: _ours(net, x, y, threat, attack, seed) for who, attack in attacks.items()}
    for who, run in peers.items():
        try:
            found[who] = _theirs(net, x, y, run, seed)
        except Absent as why:
            notes.append(f"{who}: {why}")
    table += [
        {"case": case, "who": who, "broken": broken.double().mean().item(), "n": len(x), **cells}
        for who, (broken, cells) in found.items()
    ]
    return [
        claim
        for mine in attacks
        for who in sorted(found.keys() - attacks.keys() - wider)
        for claim in _claims(f"{case}: {mine}", found[mine], who, found[who])
    ]


def _claims(case: str, mine: Found, who: str, theirs: Found) -> list[Claim]:
    gain, share = ahead(mine[0], theirs[0]), mine[1]["CPU s"] / theirs[1]["CPU s"]
    return [
        Claim(f"{case} breaks more than {who}, in standard errors >= -1", gain, -1.0, least=True),
        Claim(f"{case}: CPU / that of {who} <= 1", share, 1.0),
    ]


def ahead(mine: Tensor, theirs: Tensor) -> float:
    """How many more of the same examples we break, in standard errors of the paired difference."""
    pairs = mine.long() - theirs.long()
    return pairs.sum().item() / max(pairs.abs().sum().item(), 1) ** 0.5


def _ours(net: nn.Module, x: Tensor, y: Tensor, threat: Constraint, attack: Attack, seed: int) -> Found:
    found = measure(Classifier(net), [ours.batch(x, y)], [attack], ThreatModel(threat), seed=seed)
    spent = found.cost
    return found["success"], _cost(spent.cpu_s, spent.forwards, spent.backwards, len(x))


def _theirs(net: nn.Module, x: Tensor, y: Tensor, run: Peer, seed: int) -> Found:
    torch.manual_seed(seed)
    counted, returned = Counted(net), []
    seconds = cpu_seconds(lambda: returned.append(run(counted, x.clone(), y)))
    x_adv = returned[0].detach()
    with torch.no_grad():
        broken = net(x_adv).argmax(1) != y
    inside = ((x_adv >= -1e-6) & (x_adv <= 1 + 1e-6)).flatten(1).all(1)
    return broken & inside, _cost(seconds, counted.forwards, counted.backwards, len(x))


def _cost(seconds: float, forwards: int, backwards: int, n: int) -> Cells:
    return {"forwards / image": forwards / n, "backwards / image": backwards / n, "CPU s": seconds}
