"""Examples made on one CIFAR-10 network and judged on another, beside torchattacks at equal steps, both ways round."""

from dataclasses import replace

import torch
from torch import Tensor

from benchmarks import ours
from benchmarks.absent import Absent
from benchmarks.comparisons import Comparison
from benchmarks.comparisons.comparison import Reference
from benchmarks.comparisons.running import torchattacks
from benchmarks.meter import Counted, cpu_seconds
from benchmarks.networks import Network, images, network
from benchmarks.record import Cells, Claim, Outcome
from benchmarks.skips import hooked
from holdfast.attacks import Transfer
from holdfast.core.gradients import skipped
from holdfast.core.model import Classifier

WHAT = "transfer attacks and torchattacks' between two CIFAR-10 networks: success paired on the same images"
NETWORKS, N, EPS, STEPS, SEED = ("cifar_cnn_a_adv", "cifar_resnet20"), 500, 8 / 255, 10, 0
ALPHA = 2 / 255
PLAIN = {"reach": 2.5, "neighbours": 0}

METHODS = {
    "MI": (Transfer(**PLAIN), torchattacks("MIFGSM", alpha=ALPHA, steps=STEPS)),
    "NI": (Transfer(**PLAIN | {"ahead": True}), torchattacks("NIFGSM", alpha=ALPHA, steps=STEPS)),
    "DI": (
        Transfer(**PLAIN | {"momentum": 0.0, "diversity": 0.5}),
        torchattacks("DIFGSM", alpha=ALPHA, steps=STEPS),
    ),
    "TI-DI": (
        Transfer(**PLAIN | {"momentum": 0.0, "diversity": 0.5, "shifts": 7}),
        torchattacks("TIFGSM", alpha=ALPHA, steps=STEPS),
    ),
    "SI-NI": (
        Transfer(**PLAIN | {"ahead": True, "halvings": 4}),
        torchattacks("SINIFGSM", alpha=ALPHA, steps=STEPS),
    ),
    "VMI": (
        Transfer(**PLAIN | {"neighbours": 5, "around": 1.5}),
        torchattacks("VMIFGSM", alpha=ALPHA, steps=STEPS),
    ),
}
"""Each at the settings of the peer: its steps, step size, copies, neighbours, kernel and chance."""
BEST = "far MI and VMI"
RESIDUAL, BRANCHES, DECAY = "cifar_resnet20", "*.bn2", 0.5
SKIPS = "SGM with MI"
"""MI again, with less of the gradient through the branches of the residual network."""
WITHOUT = f"{SKIPS}: turned beyond MI without"
Found = dict[str, tuple[list[Tensor], list[Tensor]]]
"""By method what ours turned and what the peer's did, way by way; the source of the second way is the residual one."""


def measured() -> Outcome:
    notes: list[str] = []
    try:
        nets = [network(name) for name in NETWORKS]
        x, y = images(nets[0].data, N)
    except Absent as why:
        return Outcome([], [], {}, notes=[str(why)])
    found: Found = {}
    table = [cells for way in (nets, nets[::-1]) for cells in _way(*way, x, y, found)]
    found[WITHOUT] = (found[SKIPS][0], found["MI"][0][1:])
    config = {"networks": NETWORKS, "n": N, "eps": EPS, "steps": STEPS, "step size": ALPHA, "seed": SEED}
    return Outcome(table, _claims(found), config, notes=notes)


def _way(source: Network, target: Network, x: Tensor, y: Tensor, found: Found) -> list[Cells]:
    """What each method turns one way round, of the images that the target has right; kept in `found`, too."""
    with torch.no_grad():
        right = target.module(x).argmax(1) == y
    told: list[tuple[str, str, tuple[Tensor, Cells]]] = []
    for name, (attack, peer) in METHODS.items():
        told.append((name, "holdfast", _ours(attack, source, target, x, y)))
        told.append((name, "torchattacks", _theirs(peer, source, target, x, y)))
    told.append((BEST, "holdfast", _ours(Transfer(), source, target, x, y)))
    if source.name == RESIDUAL:
        attack, peer = METHODS["MI"]
        bent = replace(source, module=skipped(source.module, BRANCHES, decay=DECAY))
        theirs = replace(source, module=hooked(source.module, DECAY))
        told.append((SKIPS, "holdfast", _ours(attack, bent, target, x, y)))
        told.append((SKIPS, "the authors' hooks", _theirs(peer, theirs, target, x, y)))
    way, rows = f"{source.name} to {target.name}", []
    for name, who, (turned, cells) in told:
        found.setdefault(name, ([], []))[who != "holdfast"].append(turned[right])
        rows.append({"way": way, "method": name, "who": who, "turned": _share(turned[right]), **cells})
    return rows


def _claims(found: Found) -> list[Claim]:
    """Over both ways: the paired difference to the peer, in its standard errors."""
    claims, best = [], max((torch.cat(found[name][1]) for name in METHODS), key=_share)
    said = {
        BEST: f"{BEST} (the default): turned beyond the best method of the peer, in standard errors >= 0",
        WITHOUT: f"{WITHOUT}, in standard errors >= -1",
    }
    for name, sides in found.items():
        one = torch.cat(sides[0]).double()
        other = (best if name == BEST else torch.cat(sides[1])).double()
        difference = one - other
        ahead = difference.mean().item() / max(difference.std().item() / len(difference) ** 0.5, 1e-9)
        text = said.get(name, f"{name}: turned beyond the peer's, in standard errors >= -1")
        claims.append(Claim(text, ahead, 0.0 if name == BEST else -1.0, least=True))
    return claims


def _share(turned: Tensor) -> float:
    return turned.double().mean().item()


def _ours(attack: Transfer, source: Network, target: Network, x: Tensor, y: Tensor) -> tuple[Tensor, Cells]:
    held = Classifier(source.module).requires_grad_(False)
    found = ours.assessed(target.module, x, y, [attack], "Linf", EPS, seed=SEED, surrogates=(held,))
    return found["success"], {"CPU s": found.cost.cpu_s}


def _theirs(peer: Reference, source: Network, target: Network, x: Tensor, y: Tensor) -> tuple[Tensor, Cells]:
    """A point outside the box or the ball, or that is not a number, turns nothing."""
    torch.manual_seed(SEED)
    case = Comparison("transfer", "Linf", EPS, {}, {}, {}, network=target.name, n=N)
    counted, made = Counted(source.module), []
    spent = cpu_seconds(lambda: made.append(peer(counted, x.clone(), y, case)))
    x_adv = made[0].detach()
    with torch.no_grad():
        wrong = target.module(x_adv).argmax(1) != y
    legal = ((x_adv - x).abs() <= EPS + 1e-6).flatten(1).all(1)
    cells = {"CPU s": spent, "backwards / image": counted.backwards / N}
    lost = int(x_adv.isnan().flatten(1).any(1).sum())
    return wrong & legal, cells | ({"not a number": lost} if lost else {})
