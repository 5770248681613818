"""Constructions that rotate hardened parameter sets, and a chain of rotations beside as much training: MNIST, eps 0.2.

The attackers are those of the row `rotation`. A chain goes on with one line, each rotation immunised against those
before it; its controls train the same network as often, by more of what hardened it or by PGD, for as many gradients
of an example (passes) or for as many examples.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter

from benchmarks.parts import part
from benchmarks.record import Cells, Claim, Outcome
from benchmarks.rotated import (
    ATTACKED,
    ROBUST,
    Kind,
    accuracy,
    examples,
    means,
    seeds,
    single_step,
    success,
    transfer,
    white_box,
)
from benchmarks.rows.rotation import (
    LIVE,
    OLD,
    OWN,
    Case,
    diversified,
    generated,
    immunised,
    independent,
    judged,
    static,
    trained_more,
)
from holdfast.attacks import PGD
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.ops.fit import Training
from holdfast.ops.recipe import Recipe
from holdfast.recipes import PGDTraining
from holdfast.rotation import Immunise
from holdfast.rotation.collecting import last_of, rows_of
from holdfast.rotation.immunising import chain

WHAT = (
    "rotating hardened parameter sets on MNIST, and a chain of rotations beside as much training, three seeds"
)
ROW, SEEDS, ROTATIONS = "rotation-robust", (0, 1, 2), 4
_IMMUNISE = Immunise()


def measured() -> Outcome:
    detail: Cells = {}
    sets = _table(detail, "construction", {name: partial(_met, one) for name, one in CONSTRUCTIONS.items()})
    lines = _table(
        detail, "line", {name: partial(_line, one, passes) for name, (one, passes) in LINES.items()}
    )
    config: Cells = {
        "eps": ROBUST.eps,
        "attacked": ATTACKED,
        "seeds": SEEDS,
        "leaked": OLD,
        "serving": LIVE,
        "own surrogates": OWN,
        "rotations of a line": ROTATIONS,
    }
    notes = [
        "A0 to A3 by momentum PGD of 12 steps; `worst` is the most of it, 50 steps on the margin, and resized VMI",
        f"a line is judged after {ROTATIONS} rotations: A1 from the set before, white box by momentum PGD of 40 steps",
        "on the margin: PGD of 60 steps, the worse of two starts; passes: gradients of one example in each rotation",
    ]
    shown = [{"what": name, **cells} for name, cells in {**sets, **lines}.items()]
    return Outcome(shown, _claims(sets, lines), config, detail, notes)


def _table(detail: Cells, of: str, judges: dict[str, Callable[[int], Cells]]) -> dict[str, Cells]:
    """Means over the seeds by name, each part kept and put into the detail."""
    by = {}
    for name, judge in judges.items():
        cells = []
        for seed in SEEDS:
            key = f"{of} {name}, seed {seed}"
            detail[key] = part(ROW, key, partial(judge, seed))
            cells.append(detail[key]["measured"])
        by[name] = means(cells)
    return by


def _claims(sets: dict[str, Cells], lines: dict[str, Cells]) -> list[Claim]:
    white, line = sets["static"]["white box"], lines["chain of immunised rotations"]
    fresh, shot = sets["fresh seeds"], sets["fresh seed, immunised"]
    return [
        Claim("fresh seeds: A1 / static white box <= 0.55", fresh["A1"] / white, 0.55),
        Claim("fresh seed, immunised: A1 / static white box <= 0.40", shot["A1"] / white, 0.4),
        Claim("fresh seed, immunised: points lost <= 0.5", shot["points lost"], 0.5),
        Claim("chain of four: white box / first <= 0.55", line["white box"] / line["first"], 0.55),
        Claim("chain of four: points lost <= 0.5", line["points lost"], 0.5),
    ]


Construction = Callable[[Kind, int], list[Case]]


def _met(construction: Construction, seed: int) -> Cells:
    return judged(ROBUST, seed, construction)


CONSTRUCTIONS: dict[str, Construction] = {
    "static": static,
    "draws of 8 basins": partial(generated, "basins"),
    "fresh seeds": independent,
    "fresh seed, immunised": partial(immunised, fresh=True),
    "fresh seed, diversified": diversified,
    "fresh seed, trained more": partial(trained_more, fresh=True),
}


@dataclass(frozen=True)
class More:
    """A control of the chain: in each of its rotations the network is trained on so many examples."""

    recipe: Callable[[Training], Recipe]
    n: int
    larger: float = 1.0
    """what the eps of training is multiplied with"""

    def __call__(self, base: Classifier, data: Batch, threat: ThreatModel, rng: Draws) -> list[Classifier]:
        how = Training(epochs=1, lr=_IMMUNISE.lr, averaging="none", weight_decay=0.0, warmup=0.0)
        whole = replace(threat, constraint=threat.constraint.resized(self.larger * ROBUST.eps))
        line = [base]
        for step in range(ROTATIONS):
            at = rng.at("rotation", step)
            line.append(
                last_of(
                    self.recipe(how), line[-1], rows_of(data, self.n, at.at("data")), whole, at.at("training")
                )
            )
        return line


def _chained(base: Classifier, data: Batch, threat: ThreatModel, rng: Draws) -> list[Classifier]:
    return chain(base, ROTATIONS, _IMMUNISE, ROBUST.recipe, data, threat, rng=rng)


def _pgd(steps: int, how: Training) -> Recipe:
    return PGDTraining(steps=steps, training=how)


_HALF = 27_500
"""Training examples of half an epoch"""
_PASSES = 6_000 * 6 + 2 * _HALF + _HALF // 2
"""Of a rotation: six steps on 6,000 examples, two of half an epoch by FGSM-RS, and half as many that transfer"""
Line = Callable[[Classifier, Batch, ThreatModel, Draws], list[Classifier]]
LINES: dict[str, tuple[Line, int]] = {
    "chain of immunised rotations": (_chained, _PASSES),
    "FGSM-RS, as many examples": (More(single_step, _HALF), 2 * _HALF),
    "FGSM-RS, as many passes": (More(single_step, _PASSES // 2), _PASSES),
    "FGSM-RS at 1.25 eps, as many passes": (More(single_step, _PASSES // 2, 1.25), _PASSES),
    "PGD of 3 steps, as many passes": (More(partial(_pgd, 3), _PASSES // 4), _PASSES),
    "PGD of 7 steps, as many passes": (More(partial(_pgd, 7), _PASSES // 8), _PASSES),
    "PGD of 7 steps at 1.25 eps, as many passes": (More(partial(_pgd, 7), _PASSES // 8, 1.25), _PASSES),
}


def _line(make: Line, passes: int, seed: int) -> Cells:
    """What the last set of a line holds, and what its first one held."""
    base = seeds(ROBUST, seed, 1)[0]
    begin = perf_counter()
    line = make(base, examples().train, ROBUST.threat, Draws(seed).at("line"))
    spent = (perf_counter() - begin) / ROTATIONS
    rng, last = Draws(seed).at("attacks"), line[-1]
    by_step = [white_box(one, ROBUST, 40) for one in line]
    none, before = (
        transfer(some, [last], ROBUST, rng.at(name))
        for name, some in (("A0", seeds(ROBUST, 1_000 + seed, OWN)), ("A1", line[-2:-1]))
    )
    return {
        "clean, %": 100 * accuracy(last, examples().test),
        "points lost": 100 * (accuracy(base, examples().test) - accuracy(last, examples().test)),
        "A0": none[0],
        "A1": before[0],
        "white box": by_step[-1],
        "worst of A0": none[1],
        "worst of A1": before[1],
        "s for a set": spent,
        "first": by_step[0],
        "on the margin": _on_the_margin(last),
        "first on the margin": _on_the_margin(base),
        "passes": passes,
        **{f"after {k}": share for k, share in enumerate(by_step[1:], 1)},
    }


def _on_the_margin(target: Classifier) -> float:
    """Success of PGD of 60 steps on the margin, the worse of two starts for each image."""
    batch = examples().attacked
    found = PGD(steps=60, restarts=2)(target, batch, ROBUST.threat, rng=Draws(7))
    return success(target, found)
