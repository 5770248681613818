"""A chain of rotations on one line, each immunised against those before it, and as much training of other kinds.

The controls train the same network as often, by more of what hardened it or by PGD, on as many examples or for as many
gradients of an example (passes).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter

from benchmarks.record import Cells
from benchmarks.rotated import Kind, accuracy, seeds, success, transfer, white_box
from holdfast.attacks import PGD
from holdfast.core.draws import Draws
from holdfast.core.model import Classifier
from holdfast.recipes import PGDTraining
from holdfast.recipes.training.fit import Training
from holdfast.recipes.training.recipe import Recipe
from holdfast.rotation.collecting import last_of, rows_of
from holdfast.rotation.immunising import Crafting, Immunise, chain

ROTATIONS = 4
Line = Callable[[Kind, Classifier, Draws], list[Classifier]]


HARDER = Immunise(weight=1.0, crafting=Crafting(overshoot=1.5))
"""What costs too much clean accuracy on sets that were never hardened: twice the weight, of changes a fifth larger."""


def chained(kind: Kind, base: Classifier, rng: Draws, how: Immunise | None = None) -> list[Classifier]:
    """The chain."""
    return chain(
        base, ROTATIONS, how or kind.immunise, kind.recipe, kind.examples().train, kind.threat, rng=rng
    )


@dataclass(frozen=True)
class More:
    """A control: in each of its rotations the network is trained on other examples of the data."""

    recipe: Callable[[Kind, Training], Recipe]
    cost: int
    """passes of one example"""
    larger: float = 1.0
    """what the eps of training is multiplied with"""
    cheap: bool = False
    """whether it has as many examples as the chain, rather than as many passes"""

    def __call__(self, kind: Kind, base: Classifier, rng: Draws) -> list[Classifier]:
        how = Training(epochs=1, lr=kind.immunise.lr, averaging="none", weight_decay=0.0, warmup=0.0)
        threat = replace(kind.threat, constraint=kind.threat.constraint.resized(self.larger * kind.eps))
        n, line = self.examples(kind), [base]
        for step in range(ROTATIONS):
            place = rng.at("rotation", step)
            some = rows_of(kind.examples().train, n, place.at("data"))
            line.append(last_of(self.recipe(kind, how), line[-1], some, threat, place.at("training")))
        return line

    def examples(self, kind: Kind) -> int:
        """How many there are in each rotation."""
        return _half(kind) if self.cheap else passes(kind) // self.cost


def _half(kind: Kind) -> int:
    return round(kind.immunise.share * len(kind.examples().train))


def passes(kind: Kind) -> int:
    """Of a rotation of the chain: steps on examples that transfer, and half an epoch by FGSM-RS with half as many."""
    made = kind.immunise.crafting
    return made.examples * made.steps + 2 * _half(kind) + _half(kind) // 2


def _fgsm_rs(kind: Kind, how: Training) -> Recipe:
    return kind.single_step(how)


def _pgd(steps: int, kind: Kind, how: Training) -> Recipe:
    return PGDTraining(steps=steps, training=how)


LINES: dict[str, Line] = {
    "chain of immunised rotations": chained,
    "chain, immunised harder": partial(chained, how=HARDER),
    "FGSM-RS, as many examples": More(_fgsm_rs, 2, cheap=True),
    "FGSM-RS, as many passes": More(_fgsm_rs, 2),
    "FGSM-RS at 1.25 eps, as many passes": More(_fgsm_rs, 2, 1.25),
    "PGD of 3 steps, as many passes": More(partial(_pgd, 3), 4),
    "PGD of 7 steps, as many passes": More(partial(_pgd, 7), 8),
    "PGD of 7 steps at 1.25 eps, as many passes": More(partial(_pgd, 7), 8, 1.25),
}


def followed(kind: Kind, make: Line, seed: int) -> Cells:
    """What the last set of a line holds, and what its first one held."""
    base, test = seeds(kind, seed, 1)[0], kind.examples().test
    begin = perf_counter()
    line = make(kind, base, Draws(seed).at("line"))
    spent = (perf_counter() - begin) / ROTATIONS
    rng, last = Draws(seed).at("attacks"), line[-1]
    by_step = [white_box(one, kind, 40) for one in line]
    none, before = (
        transfer(some, [last], kind, rng.at(name))
        for name, some in (("A0", seeds(kind, 1_000 + seed, kind.own)), ("A1", line[-2:-1]))
    )
    return {
        "clean, %": 100 * accuracy(last, test),
        "points lost": 100 * (accuracy(base, test) - accuracy(last, test)),
        "A0": none[0],
        "A1": before[0],
        "white box": by_step[-1],
        "worst of A0": none[1],
        "worst of A1": before[1],
        "s for a set": spent,
        "first": by_step[0],
        "on the margin": _on_the_margin(last, kind),
        "first on the margin": _on_the_margin(base, kind),
        "passes": make.examples(kind) * make.cost if isinstance(make, More) else passes(kind),
        **{f"after {k}": share for k, share in enumerate(by_step[1:], 1)},
    }


def _on_the_margin(target: Classifier, kind: Kind) -> float:
    """Success of PGD of 60 steps on the margin, the worse of two starts for each image."""
    found = PGD(steps=60, restarts=2)(target, kind.attacked, kind.threat, rng=Draws(7))
    return success(target, found, kind)
