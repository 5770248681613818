"""Constructions that rotate sets hardened by FGSM-RS as its paper has it, and a chain of rotations: MNIST, eps 0.2.

This is the hardening of the first measurement, without the guard that watches the recipe `fgsm-rs`: its sets are easier
to break than those of the row `rotation-robust`, which has everything else in common.
"""

from benchmarks.lines import LINES
from benchmarks.record import Outcome
from benchmarks.rotated import UNGUARDED
from benchmarks.rows.rotation_robust import CONSTRUCTIONS, SEEDS, outcome

WHAT = "rotating parameter sets that FGSM-RS hardened without a guard, on MNIST, and a chain of rotations, three seeds"
_SETS = ("static", "fresh seeds", "fresh seed, immunised", "fresh seed, trained more")
_LINES = (
    "chain of immunised rotations",
    "FGSM-RS, as many passes",
    "FGSM-RS at 1.25 eps, as many passes",
    "PGD of 7 steps, as many passes",
)


def measured() -> Outcome:
    sets, lines = {name: CONSTRUCTIONS[name] for name in _SETS}, {name: LINES[name] for name in _LINES}
    return outcome(UNGUARDED, SEEDS, sets, lines)
