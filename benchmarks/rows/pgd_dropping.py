"""PGD-40 with broken examples dropped: CPU time over the naive floor, and over a tenth broken."""

from functools import partial

from benchmarks import ours
from benchmarks.absent import Absent
from benchmarks.meter import naive_floor
from benchmarks.networks import images, network
from benchmarks.record import Cells, Claim, Outcome
from benchmarks.side_by_side import FLOOR, ratio, timed
from holdfast.attacks import PGD

WHAT = "PGD-40 with broken examples dropped: CPU time over the naive floor where a tenth is breakable"
STEPS, N, ROUNDS = 40, 200, 7
SETTINGS = (("mnist_cnn_a_adv", 0.3), ("single_step", 0.3), ("mnist-cnn-hardened", 0.2))


def measured() -> Outcome:
    table: list[Cells] = []
    claims, detail, notes = [], {}, []
    for name, eps in SETTINGS:
        try:
            net = network(name)
        except Absent as why:
            notes.append(f"{name}: {why}")
            continue
        x, y = images(net.data, N)
        found = ours.assessed(net.module, x, y, [PGD(steps=STEPS)], "Linf", eps)
        broken = 1 - ours.robust_accuracy(found)
        contestants = {
            FLOOR: partial(naive_floor, net.module, x, y, STEPS),
            "holdfast, dropping": partial(ours.assessed, net.module, x, y, [PGD(steps=STEPS)], "Linf", eps),
            "holdfast, all kept": partial(
                ours.assessed, net.module, x, y, [PGD(steps=STEPS, drop=False)], "Linf", eps
            ),
        }
        seconds, _ = timed(contestants, ROUNDS)
        table += [
            {"network": name, "broken": broken, "who": who, "cost / floor": ratio(seconds, who)}
            for who in seconds
        ]
        if broken >= 0.1:
            claims.append(Claim(f"{name}: ours / floor <= 1.00", ratio(seconds, "holdfast, dropping"), 1.0))
        detail[name] = seconds
    if not claims:
        raise Absent("; ".join(notes) or "no network here has a tenth of its examples breakable")
    config: Cells = {"steps": STEPS, "n": N, "rounds": ROUNDS, "settings": SETTINGS}
    return Outcome(table, claims, config, detail, notes)
