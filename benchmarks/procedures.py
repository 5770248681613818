"""Procedures that make parameter sets after a theft, with the CPU seconds of each set: MNIST, the network of 59,034
parameters. What was trained is kept, together with its seconds.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from statistics import mean
from time import process_time

from benchmarks.hypernetwork import Diversified, Diversity
from benchmarks.parts import part
from benchmarks.record import Cells
from benchmarks.rotated import (
    POINT,
    STANDARD,
    Kind,
    accuracy,
    admitted,
    collected,
    kept,
    kept_members,
    models,
)
from holdfast.core.draws import Draws
from holdfast.core.model import Classifier
from holdfast.recipes.training.fit import Training
from holdfast.rotation import Codec, Immunise, LatentDiffusion, LowRank, Members, collect
from holdfast.rotation.collecting import last_of, rows_of, trained_from_fresh_weights, with_fresh_weights

ROW = "generated-protection"
THEFTS = 20
"""Thefts after which a generator is trained again, and sets that each procedure makes in the same time."""
SETS = 3
"""Sets of each procedure that are compared."""
NEW = 16
"""Generated sets of an attacker who has the generator."""
_OVERSHOOT = 1.25  # radius of the examples in adversarial training, in multiples of eps
_TRIALS = (1, 20, 120)  # updates of the timed trainings; the first one is slower, since it loads the kernels
_DRAWS = 24  # sets of the latent diffusion, of which the first that pass the gate are used


@dataclass(frozen=True)
class Size:
    """How much is trained and attacked. The number of attacked images and the training data are those of the kind."""

    generator_s: float = 900.0
    """CPU seconds of the training of a generator"""
    regulariser_s: float = 300.0
    """the same where regularisers are compared"""
    eps: Sequence[float] = (0.1, 0.2)
    seeds: Sequence[int] = (0, 1, 2)
    drawn: int = 8
    """generated sets that are to pass the gate"""
    kind: Kind = replace(STANDARD, row=ROW, attacks=1_000)
    """plain sets; its row names the files"""
    settings: Diversified = field(default_factory=Diversified)
    """of the generator, apart from its seconds"""


def plain_is_static(eps: float) -> bool:
    """Whether the sets that the others are compared with are plain at this eps, as those of the row `rotation` are, or
    else hardened, as those of `rotation-robust`.
    """
    return eps <= STANDARD.eps


@dataclass(frozen=True)
class Case:
    """The procedures at one eps and seed. What was trained is kept with its seconds."""

    size: Size
    eps: float
    seed: int

    @property
    def kind(self) -> Kind:
        """The plain sets at this eps."""
        return replace(self.size.kind, eps=self.eps)

    @property
    def rng(self) -> Draws:
        """Random numbers of this seed, which are those of no attack."""
        return Draws(self.seed).at(ROW)

    def named(self, name: str) -> str:
        """A name of a part for this eps and seed."""
        return f"{name}, linf {self.eps:g}, seed {self.seed}"

    def timed(self, name: str, made: Callable[[], Classifier]) -> tuple[Classifier, float]:
        """A set, and the CPU seconds that it took."""
        whole = self.named(name)

        def measured() -> float:
            begin = process_time()
            kept(self.kind, whole, made)
            return process_time() - begin

        seconds: float = part(self.kind.row, f"seconds of {whole}", measured)["measured"]
        return kept(self.kind, whole, made), seconds

    def several(self, name: str, n: int, made: Callable[[int], Classifier]) -> tuple[list[Classifier], float]:
        """`n` sets, and the mean CPU seconds of one."""
        found = [self.timed(f"{name} {k}", partial(made, k)) for k in range(n)]
        return [one for one, _ in found], mean(seconds for _, seconds in found)

    def drawn(self, name: str, made: Callable[[], tuple[Members, Cells]]) -> tuple[Members, Cells]:
        """Sets that are made together, and the numbers that were measured with them, such as their seconds."""
        whole, numbers = self.named(name), {}

        def members() -> Members:
            sets, cells = made()
            numbers.update(cells)
            return sets

        def measured() -> Cells:
            kept_members(self.kind.row, whole, members)
            return numbers

        cells: Cells = part(self.kind.row, f"seconds of {whole}", measured)["measured"]
        return kept_members(self.kind.row, whole, members), cells

    def generator(self, diversity: Diversity, seconds: float) -> tuple[Members, Cells]:
        """Sets of a hypernetwork: `size.drawn` that may serve, and `NEW` of an attacker who stole the hypernetwork."""

        def made() -> tuple[Members, Cells]:
            begin, rng = process_time(), self.rng.at("generator")
            data = (self.kind.network(), self.kind.examples().train, self.kind.threat)
            limited = replace(self.size.settings, diversity=diversity, seconds=seconds)
            settings = limited.planned(*data, rng=rng)
            generator = settings(*data, rng=rng)
            trained = process_time()
            serving = generator.drawn(self.size.drawn, self.rng.at("serving"))
            models(serving, range(len(serving)), self.kind)
            cells = {
                "s for a set": (process_time() - trained) / len(serving),
                "training s": trained - begin,
                "updates": settings.updates,
            }
            return serving.joined(generator.drawn(NEW, self.rng.at("attacker"))), cells

        return self.drawn(f"generator {diversity} {seconds:g} s", made)

    @cached_property
    def set_s(self) -> float:
        """Seconds that a set takes where the generator is trained again after so many thefts."""
        cells = self.generator("transfer", self.size.generator_s)[1]
        return float(cells["training s"]) / THEFTS + float(cells["s for a set"])

    def updates(self, seconds: float) -> int:
        """Number of updates of FGSM-RS that take so many seconds."""

        def measured() -> float:
            spent = []
            for updates in _TRIALS:
                begin = process_time()
                self.hardened(self.kind.network(), updates, self.rng.at("timed"))
                spent.append(process_time() - begin)
            return (spent[2] - spent[1]) / (_TRIALS[2] - _TRIALS[1])

        name = f"seconds of an update of FGSM-RS, linf {self.eps:g}"
        return max(round(seconds / part(self.kind.row, name, measured)["measured"]), 1)

    def hardened(self, base: Classifier, updates: int, rng: Draws) -> Classifier:
        """A model after FGSM-RS at 1.25 eps with about so many updates."""
        data = self.kind.examples().train
        how = Training(lr=3e-3, averaging="none", weight_decay=0.0, warmup=0.4)
        epochs = math.ceil(updates * how.batch / len(data))
        some = rows_of(data, round(updates * how.batch / epochs), rng.at("data"))
        larger = replace(self.kind, eps=_OVERSHOOT * self.eps).threat
        recipe = self.kind.single_step(replace(how, epochs=epochs))
        return last_of(recipe, base, some, larger, rng.at("training"))

    def fresh(self, rng: Draws) -> Classifier:
        """Weights that were never trained."""
        return with_fresh_weights(self.kind.network(), rng, "own")

    def immunised(self, base: Classifier, stolen: Classifier, rng: Draws, *, hard: bool) -> Classifier:
        """A set after immunising against a stolen one, with FGSM-RS if it is `hard`, or else with plain training."""
        recipe = self.kind.single_step(self.kind.recipe.training) if hard else self.kind.recipe
        return Immunise()(base, [stolen], recipe, self.kind.examples().train, self.kind.threat, rng=rng)

    @cached_property
    def plain(self) -> tuple[list[Classifier], float]:
        """Plain sets, and their CPU seconds. They are the same at each eps, but are made for each, so that two
        processes can measure one eps each.
        """
        rng = self.rng.at("plain")
        return self.several("plain", SETS, lambda k: trained_from_fresh_weights(self.kind.task(), rng.at(k)))

    @cached_property
    def robust(self) -> tuple[list[Classifier], float]:
        """Sets that FGSM-RS trains from fresh weights in `set_s` seconds, and their CPU seconds."""
        rng, updates = self.rng.at("robust"), self.updates(self.set_s)
        return self.several(
            "FGSM-RS", SETS, lambda k: self.hardened(self.fresh(rng.at(k)), updates, rng.at(k))
        )

    @cached_property
    def immunising_s(self) -> float:
        """CPU seconds of immunising a hardened set."""
        first, second, _ = self.robust[0]
        made = partial(self.immunised, first, second, self.rng.at("immunising timed"), hard=True)
        return self.timed("immunising", made)[1]

    @cached_property
    def diffused(self) -> tuple[list[Classifier], float]:
        """Sets of a latent diffusion over eight plain runs that pass the gate, and the CPU seconds of one."""
        members, rng = collected(self.kind, self.seed, "basins"), self.rng.at("diffusion")

        def made() -> tuple[Members, Cells]:
            generator = LatentDiffusion()(Codec()(members, rng=rng.at("codec")), members, rng=rng.at("fit"))
            begin = process_time()
            sets = generator.drawn(_DRAWS, rng.at("drawn"))
            return sets, {"s for a set": (process_time() - begin) / _DRAWS}

        found, cells = self.drawn("diffusion", made)
        return admitted(found, members, self.kind)[0][:SETS], cells["s for a set"]

    @cached_property
    def low_rank(self) -> tuple[list[Classifier], float]:
        """Sets that differ from a plain set by a low-rank matrix in each linear layer, and short trainings."""

        def made() -> tuple[Members, Cells]:
            task, begin = replace(self.kind.task(), model=self.plain[0][0]), process_time()
            members = collect(LowRank(sets=SETS), task, rng=self.rng.at("low rank"))
            return members, {"s for a set": (process_time() - begin) / SETS}

        members, cells = self.drawn("low rank", made)
        return models(members, range(SETS), self.kind), cells["s for a set"]

    @property
    def following(self) -> "Case":
        """The case with the next seed, whose sets are unrelated to those of this one."""
        seeds = list(self.size.seeds)
        return replace(self, seed=seeds[(seeds.index(self.seed) + 1) % len(seeds)])

    @property
    def static(self) -> list[Classifier]:
        """The sets that the others are compared with."""
        return self.plain[0] if plain_is_static(self.eps) else self.robust[0]

    @cached_property
    def least(self) -> float:
        """Accuracy on held-out images that a set needs to pass the gate."""
        return mean(accuracy(one, self.kind.examples().held) for one in self.static) - POINT
