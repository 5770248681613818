"""Batches that trip attacks up: already broken, empty, one image, non-contiguous, channels last."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import ours
from benchmarks.absent import Absent
from benchmarks.networks import images, network
from benchmarks.peers import peer
from benchmarks.record import Cells, Claim, Outcome
from holdfast.attacks import (
    APGD,
    DDN,
    FAB,
    FMN,
    NES,
    PDPGD,
    PGD,
    SPSA,
    ZOO,
    Bandits,
    Boundary,
    DeepFool,
    GeoDA,
    HopSkipJump,
    RayS,
    SignOPT,
    SimBA,
    SparseRS,
    Square,
    SurFree,
)
from holdfast.attacks.parts.losses import cross_entropy, dlr
from holdfast.attacks.protocol import Attack
from holdfast.core.draws import Draws
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel

WHAT = "odd batches: already broken, empty, one image, non-contiguous, channels last"
N, EPS = 16, 2 / 255
ATTACKS: tuple[Attack, ...] = (
    PGD(steps=5),
    APGD(steps=5, loss=cross_entropy),
    APGD(steps=5, loss=dlr, targets=3),
    FAB(steps=5, targets=3),
    RayS(queries=20),
    HopSkipJump(queries=20),
    Boundary(queries=20),
    GeoDA(queries=20),
    SignOPT(queries=20),
    SurFree(queries=20),
    Square(queries=20),
    SimBA(queries=20),
    NES(queries=20, pairs=3),
    SPSA(queries=20, pairs=3),
    Bandits(queries=20),
    ZOO(queries=20, coordinates=4),
    SparseRS(queries=20),
    DDN(steps=5),
    FMN(steps=5),
    PDPGD(steps=5),
    DeepFool(steps=5),
)


def _batches(x: Tensor, y: Tensor, wrong: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    yield "ordinary", x, y
    yield "already broken", x[wrong], y[wrong]
    yield "empty", x[:0], y[:0]
    yield "one image", x[:1], y[:1]
    yield "non-contiguous", x.transpose(2, 3).contiguous().transpose(2, 3), y
    yield "channels last", x.contiguous(memory_format=torch.channels_last), y


def measured() -> Outcome:
    net = network("cifar_cnn_a_adv")
    x, y = images(net.data, 4 * N)
    with torch.no_grad():
        wrong = net.module(x).argmax(1) != y
    table: list[Cells] = []
    failures, notes = 0, []
    for kind, images_, labels in _batches(x[:N], y[:N], wrong[:N]):
        cells: Cells = {"batch": kind}
        for attack in ATTACKS:
            said = _said(partial(_ours, net.module, attack), images_, labels)
            failures += said != "as any other"
            cells[_name(attack)] = said
        for part in ("apgd", "fab", "square"):
            try:
                cells[f"AutoAttack {part}"] = _said(partial(_reference, net.module, part), images_, labels)
            except Absent as why:
                notes += [str(why)] if str(why) not in notes else []
        table.append(cells)
    claims = [Claim("odd batches that our attacks do not take as any other <= 0", failures, 0)]
    return Outcome(
        table, claims, {"network": net.name, "n": N, "eps": EPS, "attacks": [_name(a) for a in ATTACKS]}
    )


def _said(run: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> str:
    """Whether an attack takes the batch, and returns for it what it returns for the same batch laid out plainly."""
    try:
        x_adv, plain = run(x, y), run(x.clone(memory_format=torch.contiguous_format), y)
    except Absent:
        raise
    except Exception as error:  # noqa: BLE001 - what is raised is the result
        return f"raises {type(error).__name__}"
    if x_adv.shape != x.shape or x_adv.isnan().any():
        return f"returns {tuple(x_adv.shape)}" if x_adv.shape != x.shape else "returns NaN"
    return "as any other" if torch.allclose(x_adv, plain, atol=1e-4) else "differs by layout"


def _ours(module: nn.Module, attack: Attack, x: Tensor, y: Tensor) -> Tensor:
    """The attack itself, below the harness, which would not hand it an empty batch."""
    smallest = (DDN, ZOO, Boundary, SignOPT, SurFree)
    norm = "L0" if isinstance(attack, SparseRS) else "L2" if isinstance(attack, smallest) else "Linf"
    threat = ThreatModel(ours.constraint(norm, 2 if norm == "L0" else EPS))
    found: Tensor = attack(Classifier(module), ours.batch(x, y), threat, rng=Draws(0))
    return found


def _reference(module: nn.Module, part: str, x: Tensor, y: Tensor) -> Tensor:
    if part == "apgd":
        attack = peer("autoattack.autopgd_base").APGDAttack(module, n_iter=5, eps=EPS, device="cpu")
    elif part == "fab":
        attack = peer("autoattack.fab_pt").FABAttack_PT(module, n_iter=5, eps=EPS, norm="Linf", device="cpu")
    else:
        attack = peer("autoattack.square").SquareAttack(
            module, n_queries=20, eps=EPS, norm="Linf", device="cpu"
        )
    found: Tensor = attack.perturb(x.clone(memory_format=torch.preserve_format), y)
    return found


def _name(attack: Attack) -> str:
    targeted = getattr(attack, "targets", 0)
    return f"{type(attack).__name__}{'-T' if targeted else ''}"
