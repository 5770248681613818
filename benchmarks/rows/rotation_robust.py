"""Constructions that rotate hardened parameter sets, and a chain of rotations beside as much training: MNIST, eps 0.2.

The attackers are those of the row `rotation`, the chain and its controls those of `benchmarks/lines.py`. The sets are
hardened by the recipe `fgsm-rs`, whose guard takes more steps where one of them overfits; the row `rotation-unguarded`
has the same of sets without it.
"""

from collections.abc import Mapping, Sequence
from functools import partial

from benchmarks.lines import HARDER, LINES, ROTATIONS, Line, followed
from benchmarks.record import Cells, Claim, Outcome
from benchmarks.rotated import ROBUST, Kind, over_seeds
from benchmarks.rows.rotation import (
    Construction,
    diversified,
    immunised,
    independent,
    judged,
    static,
    trained_more,
)

WHAT = (
    "rotating hardened parameter sets on MNIST, and a chain of rotations beside as much training, three seeds"
)
SEEDS = (0, 1, 2)
CONSTRUCTIONS: dict[str, Construction] = {
    "static": static,
    "fresh seeds": independent,
    "fresh seed, immunised": partial(immunised, fresh=True),
    "fresh seed, immunised harder": partial(immunised, fresh=True, how=HARDER),
    "fresh seed, diversified": diversified,
    "fresh seed, trained more": partial(trained_more, fresh=True),
}
NOTES = [
    "A0 to A3 by momentum PGD of 12 steps; `worst` is the most of it, 50 steps on the margin, and resized VMI",
    f"a line is judged after {ROTATIONS} rotations: A1 from the set before, white box by momentum PGD of 40 steps",
    "on the margin: PGD of 60 steps, the worse of two starts; passes: gradients of one example in each rotation",
]


def measured() -> Outcome:
    return outcome(ROBUST, SEEDS, CONSTRUCTIONS, LINES)


def outcome(
    kind: Kind, seeds: Sequence[int], constructions: Mapping[str, Construction], chosen: Mapping[str, Line]
) -> Outcome:
    """Of sets that were hardened in one way: what constructions and lines are worth."""
    detail: Cells = {}
    sets = {name: partial(judged, kind, one) for name, one in constructions.items()}
    lines = {name: partial(followed, kind, one) for name, one in chosen.items()}
    by = over_seeds(detail, kind.row, seeds, sets | lines)
    config: Cells = {
        "eps": kind.eps,
        "attacked": kind.attacks,
        "seeds": seeds,
        "leaked": kind.old,
        "serving": kind.live,
        "own surrogates": kind.own,
        "rotations of a line": ROTATIONS,
    }
    shown = [{"what": name, **cells} for name, cells in by.items()]
    return Outcome(shown, _claims(by), config, detail, NOTES)


def _claims(by: dict[str, Cells]) -> list[Claim]:
    white, line = by["static"]["white box"], by["chain of immunised rotations"]
    fresh, shot = by["fresh seeds"], by["fresh seed, immunised"]
    return [
        Claim("fresh seeds: A1 / static white box <= 0.55", fresh["A1"] / white, 0.55),
        Claim("fresh seed, immunised: A1 / static white box <= 0.40", shot["A1"] / white, 0.4),
        Claim("fresh seed, immunised: points lost <= 0.5", shot["points lost"], 0.5),
        Claim("chain of four: white box / first <= 0.55", line["white box"] / line["first"], 0.55),
        Claim("chain of four: points lost <= 0.5", line["points lost"], 0.5),
    ]
