"""PGD-40 on a network with batch norm: folded exactly, channels last where it pays, against the naive floor."""

from functools import partial

from benchmarks import ours
from benchmarks.meter import naive_floor
from benchmarks.networks import images, network
from benchmarks.record import Cells, Claim, Outcome
from benchmarks.rows.peers_pgd import adv_lib, torchattacks
from benchmarks.side_by_side import FLOOR, ratio, timed
from holdfast.attacks import PGD
from holdfast.core.model import Classifier
from holdfast.runs.harness.target import prepared

WHAT = "PGD-40 on a network with batch norm (cifar_resnet20): CPU time over the naive floor"
STEPS, N, ROUNDS, EPS = 40, 200, 2, 2 / 255


def measured() -> Outcome:
    net = network("cifar_resnet20")
    x, y = images(net.data, N)
    size = 2.5 * EPS / STEPS
    contestants = {
        FLOOR: partial(naive_floor, net.module, x, y, STEPS),
        "holdfast": partial(ours.assessed, net.module, x, y, [PGD(steps=STEPS, drop=False)], "Linf", EPS),
        "torchattacks": partial(torchattacks, net.module, x, y, EPS, STEPS, size),
        "adv-lib CE": partial(adv_lib, net.module, x, y, EPS, STEPS, size),
    }
    seconds, absent = timed(contestants, ROUNDS)
    table = [{"who": who, "cost / floor": ratio(seconds, who)} for who in seconds]
    with prepared(Classifier(net.module), ours.batch(x, y)) as target:
        notes = [f"{who}: {why}" for who, why in absent.items()] + list(target.notes)
    claims = [Claim("ours / floor <= 0.80", ratio(seconds, "holdfast"), 0.8)]
    config: Cells = {"network": net.name, "steps": STEPS, "n": N, "eps": EPS, "rounds": ROUNDS, "drop": False}
    return Outcome(table, claims, config, {"cpu_s": seconds}, notes)
