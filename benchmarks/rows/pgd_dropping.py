"""PGD-40 with broken examples dropped: CPU time over the naive floor, and over a tenth broken."""

from functools import partial

from benchmarks import ours
from benchmarks.meter import naive_floor
from benchmarks.networks import present
from benchmarks.record import Cells, Claim, Outcome
from benchmarks.side_by_side import FLOOR, ratio, timed
from holdfast.attacks import PGD

WHAT = "PGD-40 with broken examples dropped: CPU time over the naive floor where a tenth is breakable"
STEPS, N, ROUNDS = 40, 200, 7
SETTINGS = (("mnist_cnn_a_adv", 0.3), ("single_step", 0.3), ("hardened-by-hand", 0.2))


def measured() -> Outcome:
    table: list[Cells] = []
    claims, detail, notes = [], {}, []
    for net, x, y, eps in present(SETTINGS, N, notes):
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
            {"network": net.name, "broken": broken, "who": who, "cost / floor": ratio(seconds, who)}
            for who in seconds
        ]
        if broken >= 0.1:
            claims.append(
                Claim(f"{net.name}: ours / floor <= 1.00", ratio(seconds, "holdfast, dropping"), 1.0)
            )
        else:
            notes.append(f"{net.name}: {broken:.3g} of the examples are breakable, so nothing is claimed")
        detail[net.name] = seconds
    config: Cells = {"steps": STEPS, "n": N, "rounds": ROUNDS, "settings": SETTINGS}
    return Outcome(table, claims, config, detail, notes)
