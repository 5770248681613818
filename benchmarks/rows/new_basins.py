"""Whether a generator of parameter sets gives new basins, rather than copies of those it has seen: MNIST.

A set is let in where it loses at most a point of what runs of two epochs have. It lies in a *new basin* where attacks
on the sets that the generator has seen carry to it no better than to independent runs: on the nearest by L1, and on the
one of them that does best. Beside it stands what the mean of a set and its nearest loses: halfway to a copy nothing,
halfway to another basin most of what it knew (the barrier of Frankle et al., arXiv:1912.05671, at its middle). A
generator is worth its cost where sets of that kind take less time than a fresh run.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import mean
from time import perf_counter

import torch

from benchmarks.alignment import all_aligned
from benchmarks.record import Cells, Claim, Outcome
from benchmarks.rotated import (
    POINT,
    STANDARD,
    Kind,
    Momentum,
    Sets,
    accuracy,
    collected,
    models,
    over_seeds,
    seeds,
    success,
)
from holdfast.core.draws import Draws
from holdfast.core.model import Classifier
from holdfast.recipes import Standard
from holdfast.recipes.training.fit import Training
from holdfast.rotation import Codec, Immunise, LatentDiffusion, Members, put, weights_of
from holdfast.rotation.collecting import last_of, nearest_sets, rows_of, with_fresh_weights

WHAT = "whether draws of a generator are new basins: raw, of aligned runs, and trained on for a while, three seeds"
ROW, SEEDS = "new-basins", (0, 1, 2)
WANTED, MARGIN = 10.0, 1.2
"""Per cent that are to be let in, and how much better than to independent runs attacks may carry."""
DRAWN, ATTACKED, STRANGERS = 24, 8, 7
"""Sets that are made, those let in that are attacked, and independent runs that they are compared with."""
CHEAP = replace(
    STANDARD,
    name="short",
    row=ROW,
    recipe=Standard(training=Training(epochs=1, lr=3e-3, averaging="none", weight_decay=0.0)),
)
SHORT = 32
"""Runs of one epoch that the aligned collection is of."""
Made = tuple[list[Classifier], float]
"""Sets, and the seconds that one of them takes when all before is done."""


def measured() -> Outcome:
    detail: Cells = {}
    judges = {
        name: partial(_judged, seen, attempt) for name, (seen, attempt) in (ATTEMPTS | CONTROLS).items()
    }
    by = over_seeds(detail, ROW, SEEDS, judges)
    table = [{"attempt": name, **cells} for name, cells in by.items()]
    new = {
        name: by[name]["let in, %"]
        for name in ATTEMPTS
        if "from the best" in by[name]
        and by[name]["from the best"] <= MARGIN * by[name]["to strangers, best"]
    }
    best = max(new, key=lambda name: new[name], default=None)
    claims = [
        Claim("new basins of a generator, let in: % >= 10", new[best] if best else 0.0, WANTED, least=True)
    ]
    config: Cells = {
        "eps": STANDARD.eps, "seeds": SEEDS, "made": DRAWN, "attacked, at most": ATTACKED, "strangers": STRANGERS,
        "short runs": SHORT, "a new basin carries at most, times that of strangers": MARGIN,
    }  # fmt: skip
    notes = [
        f"the best attempt whose sets are new basins: {best or 'none'}",
        "transfer by momentum PGD of 12 steps on single sets that the generator has seen",
    ]
    return Outcome(table, claims, config, detail, notes)


def basins(seed: int) -> Members:
    """Eight runs of two epochs with 25 checkpoints each."""
    return collected(STANDARD, seed, "basins")


def short(seed: int) -> Members:
    """Runs of one epoch, aligned to the first."""
    runs = seeds(CHEAP, 3_000 + seed, SHORT)
    found = Members.of([weights_of(one) for one in runs], range(SHORT))
    return all_aligned(found, runs[0], CHEAP.examples().train, rng=Draws(seed).at("aligned"))


def drawn(members: Members, seed: int) -> Made:
    """Draws of a latent diffusion."""
    found, spent = _drawn(members, seed, DRAWN)
    return models(found, range(DRAWN)), spent


def between(members: Members, seed: int) -> Made:
    """Of many draws those that lie farthest from every set of the collection, and so between its runs."""
    found, spent = _drawn(members, seed, 4 * DRAWN)
    far = nearest_sets(found, members)[0].argsort(descending=True)[:DRAWN]
    return models(found, far.tolist()), 4 * spent


def _drawn(members: Members, seed: int, n: int) -> tuple[Members, float]:
    rng = Draws(seed).at("generator")
    embedding = Codec()(members, rng=rng.at("codec"))
    generator = LatentDiffusion()(embedding, members, rng=rng.at("diffusion"))
    begin = perf_counter()
    found = generator.drawn(n, rng.at("drawn"))
    return found, (perf_counter() - begin) / n


def means_of_two(members: Members, seed: int) -> Made:
    """Means of two runs, without any generator."""
    bases, rng = members.bases(), Draws(seed).at("pairs")
    pairs = [rng.at(k).bits(torch.arange(len(bases))).argsort()[:2] for k in range(DRAWN)]
    sets = [{name: value[pair].mean(0) for name, value in bases.tensors.items()} for pair in pairs]
    return [put(STANDARD.network(), one) for one in sets], 0.0


def fresh(_: Members, seed: int) -> Made:
    """Weights that were never trained, as runs begin at."""
    return [
        with_fresh_weights(STANDARD.network(), Draws(seed).at("fresh", k), "own") for k in range(DRAWN)
    ], 0.0


def refined(make: Callable[[Members, int], Made], epochs: float, members: Members, seed: int) -> Made:
    """What it makes, trained on by the ordinary recipe."""
    sets, spent = make(members, seed)
    how = Training(epochs=1, lr=3e-3, averaging="none", weight_decay=0.0)
    data = STANDARD.examples().train
    begin = perf_counter()
    found = []
    for k, one in enumerate(sets):
        rng = Draws(seed).at("refined", k)
        some = rows_of(data, round(epochs * len(data)), rng.at("data"))
        found.append(last_of(Standard(training=how), one.requires_grad_(), some, STANDARD.threat, rng))
    return found, spent + (perf_counter() - begin) / len(sets)


def immunised(members: Members, seed: int) -> Made:
    """Draws, each trained on against all runs that the generator has seen: no new basins, but attacks do not carry."""
    sets, spent = drawn(members, seed)
    seen = models(members.bases(), range(len(members.bases())))
    train, threat = STANDARD.examples().train, STANDARD.threat
    begin = perf_counter()
    found = [
        Immunise()(one, seen, STANDARD.recipe, train, threat, rng=Draws(seed).at("immunised", k))
        for k, one in enumerate(sets[:ATTACKED])
    ]
    return found, spent + (perf_counter() - begin) / len(found)


Collected = Callable[[int], Members]
Attempt = Callable[[Members, int], Made]
ATTEMPTS: dict[str, tuple[Collected, Attempt]] = {
    "draws of 8 basins": (basins, drawn),
    "draws between 8 basins, 1/4 epoch": (basins, partial(refined, between, 0.25)),
    "draws between 8 basins, 1/2 epoch": (basins, partial(refined, between, 0.5)),
    "draws between 8 basins, 1 epoch": (basins, partial(refined, between, 1.0)),
    "draws of 32 short runs, aligned": (short, drawn),
    "draws of 32 short runs, aligned, 1/4 epoch": (short, partial(refined, drawn, 0.25)),
    "draws of 32 short runs, aligned, 1/2 epoch": (short, partial(refined, drawn, 0.5)),
}
CONTROLS: dict[str, tuple[Collected, Attempt]] = {
    "draws of 8 basins, immunised": (basins, immunised),
    "means of two short runs, aligned, 1/4 epoch": (short, partial(refined, means_of_two, 0.25)),
    "fresh weights, 1/4 epoch": (short, partial(refined, fresh, 0.25)),
    "fresh weights, 1/2 epoch": (short, partial(refined, fresh, 0.5)),
    "fresh weights, 1 epoch": (basins, partial(refined, fresh, 1.0)),
}


def _judged(collection: Collected, attempt: Attempt, seed: int) -> Cells:
    """What is let in, and how well attacks on what the generator has seen carry to it."""
    members, strangers = collection(seed), seeds(STANDARD, seed, STRANGERS)
    sets, spent = attempt(members, seed)
    held = STANDARD.examples().held
    least = mean(accuracy(one, held) for one in strangers) - POINT
    right = [accuracy(one, held) for one in sets]
    fine = [one for one, share in zip(sets, right, strict=True) if share >= least]
    bases = members.bases()
    seen = models(bases, range(len(bases)))
    said: Cells = {
        "let in, %": 100 * len(fine) / len(sets),
        "median accuracy, %": 100 * float(torch.tensor(right).median()),
        "s for a set": spent,
    }
    if fine:
        own, best = _carried(seen, fine[:ATTACKED], bases, STANDARD)
        said |= {
            "from the nearest": own,
            "from the best": best,
            "lost halfway": mean(_lost_halfway(one, bases) for one in fine[:ATTACKED]),
        }
    own, best = _carried(seen, strangers, bases, STANDARD)
    halfway = mean(_lost_halfway(one, bases) for one in strangers)
    return {
        **said,
        "to strangers": own,
        "to strangers, best": best,
        "lost halfway to strangers": halfway,
    }


def _carried(seen: Sets, targets: Sets, bases: Members, kind: Kind) -> tuple[float, float]:
    """Mean success of what is made on the nearest set that was seen, and on the one that does best on each target."""
    made = [Momentum()([one], kind.attacked, kind.threat, Draws(k)) for k, one in enumerate(seen)]
    places = [_place(target, bases) for target in targets]
    found = [[success(target, x, kind) for x in made] for target in targets]
    own = mean(shares[place] for shares, place in zip(found, places, strict=True))
    return own, mean(max(shares) for shares in found)


def _lost_halfway(target: Classifier, bases: Members) -> float:
    """Points of accuracy that the mean of a set and its nearest has less than the worse of both."""
    near, own = bases.one(_place(target, bases)), weights_of(target)
    ends = [target, put(STANDARD.network(), near)]
    middle = put(STANDARD.network(), {name: (own[name] + near[name]) / 2 for name in own})
    held = STANDARD.examples().held
    return 100 * (min(accuracy(one, held) for one in ends) - accuracy(middle, held))


def _place(target: Classifier, bases: Members) -> int:
    """Of the nearest of some sets."""
    return int(nearest_sets(Members.of([weights_of(target)], [0]), bases)[1])
