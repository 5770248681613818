"""Constructions that rotate parameter sets, and what each kind of attacker still gets: MNIST, a small network.

A0 stole nothing and trains four networks of its own; A1 stole one set that served; A2 four; A3 holds the generator, or
reruns the procedure, and climbs the mean over 4, 16 and 64 fresh sets, the best for it counted; white box is an attack
on the set that serves. Numbers are shares of inputs, right as they are, that are turned wrong.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from statistics import mean
from time import perf_counter

import torch

from benchmarks.record import Cells, Claim, Outcome
from benchmarks.rotated import (
    STANDARD,
    Kind,
    Momentum,
    Sets,
    accuracy,
    admitted,
    collected,
    means,
    models,
    over_seeds,
    seeds,
    success,
    timed,
    transfer,
    white_box,
)
from holdfast.core.draws import Draws
from holdfast.core.model import Classifier
from holdfast.recipes.training.fit import Training
from holdfast.rotation import Codec, Distilled, Immunise, LatentDiffusion, put, weights_of
from holdfast.rotation.collecting import last_of, rows_of, trained_from_fresh_weights

WHAT = (
    "rotating parameter sets of a small network on MNIST: twelve constructions, five attackers, three seeds"
)
ROW, SEEDS = "rotation", (0, 1, 2)


@dataclass(frozen=True)
class Case:
    """One construction for one seed: what leaked, what serves, and what an attacker with the procedure makes."""

    old: Sets
    live: Sets
    fresh: Sets
    """up to 64 sets of the attacker's own, by the generator or the procedure"""
    made_in_s: float
    """seconds for one new set"""
    let_in: float | None = None
    """share of what was drawn that loses at most a point, where sets are drawn"""
    own: Sets = ()
    """surrogates of the thief of nothing, where they are not those of all other cases"""


Construction = Callable[[Kind, int], list[Case]]


def measured() -> Outcome:
    kind = STANDARD
    detail: Cells = {}
    judges = {name: partial(judged, kind, one) for name, one in CONSTRUCTIONS.items()}
    by = over_seeds(detail, ROW, SEEDS, judges)
    config: Cells = {
        "eps": kind.eps,
        "attacked": kind.attacks,
        "seeds": SEEDS,
        "leaked": kind.old,
        "serving": kind.live,
        "own surrogates": kind.own,
        "drawn": kind.drawn,
    }
    notes = [
        "A0 to A3 by momentum PGD of 12 steps; `worst` is the most of it, 50 steps on the margin, and resized VMI",
    ]
    shown = [{"construction": name, **cells} for name, cells in by.items()]
    return Outcome(shown, _claims(by), config, detail, notes)


def _claims(by: dict[str, Cells]) -> list[Claim]:
    path, pool, shot = by["draws of a trajectory"], by["draws of 8 basins"], by["fresh seed, immunised"]
    white = by["static"]["white box"]
    return [
        Claim("draws of a trajectory within 1 point: % >= 95", path["let in, %"], 95, least=True),
        Claim("draws of 8 basins within 1 point: % >= 35", pool["let in, %"], 35, least=True),
        Claim("draws of a trajectory: A1 / static white box >= 0.8", path["A1"] / white, 0.8, least=True),
        Claim("draws of 8 basins: A1 / static white box <= 0.25", pool["A1"] / white, 0.25),
        Claim("draws of 8 basins: A3 / static white box <= 0.55", pool["A3"] / white, 0.55),
        Claim("fresh seed, immunised: A1 <= 0.05", shot["A1"], 0.05),
        Claim("fresh seed, immunised: A2 <= 0.06", shot["A2"], 0.06),
        Claim("fresh seed, immunised: A3, its siblings <= 0.12", shot["A3"], 0.12),
        Claim("fresh seed, immunised: points lost <= 0.5", shot["points lost"], 0.5),
    ]


def judged(kind: Kind, construction: Construction, seed: int) -> Cells:
    """What each attacker gets of the cases of one seed."""
    own = seeds(kind, 1_000 + seed, kind.own)
    usual = mean(accuracy(one, kind.examples().test) for one in seeds(kind, seed, kind.old + kind.live))
    rng = Draws(seed).at("attacks")
    return means([_met(kind, case, own, usual, rng) for case in construction(kind, seed)])


def _met(kind: Kind, case: Case, own: Sets, usual: float, rng: Draws) -> Cells:
    """What each attacker gets of a case."""
    singles = [transfer([one], case.live, kind, rng.at("A1")) for one in case.old[: kind.live]]
    none, all_old = (transfer(some, case.live, kind, rng.at("A2")) for some in (case.own or own, case.old))
    sizes = [n for n in (4, 16, 64) if n <= len(case.fresh)] or [len(case.fresh)]
    made = (Momentum()(case.fresh[:n], kind.attacked, kind.threat, rng.at("A3", n)) for n in sizes)
    clean = mean(accuracy(one, kind.examples().test) for one in case.live)
    return {
        "clean, %": 100 * clean,
        "points lost": 100 * (usual - clean),
        "A0": none[0],
        "A1": mean(one[0] for one in singles),
        "A2": all_old[0],
        "A3": max(mean(success(one, x, kind) for one in case.live) for x in made),
        "white box": mean(white_box(one, kind) for one in case.live),
        "worst of A0": none[1],
        "worst of A1": mean(one[1] for one in singles),
        "worst of A2": all_old[1],
        **({} if case.let_in is None else {"let in, %": 100 * case.let_in}),
        "s for a set": case.made_in_s,
    }


def static(kind: Kind, seed: int) -> list[Case]:
    """The set that leaked serves on."""
    return [Case([one], [one], [one] * 4, 0.0) for one in seeds(kind, seed, kind.live)]


def noise(kind: Kind, seed: int) -> list[Case]:
    """Gaussian noise of 0.3 deviations of each tensor, anew for each set."""
    found = []
    for k, base in enumerate(seeds(kind, seed, kind.live)):
        begin = perf_counter()
        sets = [_noised(base, Draws(seed).at("noise", k, place)) for place in range(kind.old + 1 + 16)]
        spent = (perf_counter() - begin) / len(sets)
        found.append(Case(sets[: kind.old], sets[kind.old : kind.old + 1], sets[kind.old + 1 :], spent))
    return found


def _noised(base: Classifier, rng: Draws) -> Classifier:
    weights = {}
    for name, value in weights_of(base).items():
        spread = value.std() if value.numel() > 1 else value.abs()
        drawn = rng.at(name).normal(torch.zeros(1, dtype=torch.int64), value.numel()).view_as(value)
        weights[name] = value + 0.3 * spread * drawn
    return put(base, weights)


def trajectory(kind: Kind, seed: int) -> list[Case]:
    """Checkpoints of one run, far apart in it."""
    members = collected(kind, seed, "trajectory")
    rows = torch.arange(0, len(members), len(members) // (kind.old + kind.live + 16)).tolist()
    sets = models(members, rows[: kind.old + kind.live + 16], kind)
    return [_case(kind, sets, 0.0)]


def generated(source: str, kind: Kind, seed: int) -> list[Case]:
    """Draws of a latent diffusion over a collection, by which those that lose more than a point are left out."""
    members = collected(kind, seed, source)
    rng = Draws(seed).at(source)
    embedding = Codec()(members, rng=rng.at("codec"))
    generator = LatentDiffusion()(embedding, members, rng=rng.at("diffusion"))
    begin = perf_counter()
    drawn = generator.drawn(kind.drawn, rng.at("drawn"))
    spent = (perf_counter() - begin) / kind.drawn
    sets, let_in, _ = admitted(drawn, members, kind)
    case = _case(kind, sets, spent)
    return [replace(case, fresh=case.fresh[:64], let_in=float(let_in.float().mean()))]


def _case(kind: Kind, sets: Sets, spent: float) -> Case:
    """The first sets leaked, the next ones serve, and the thief has the rest."""
    serve = kind.old + kind.live
    return Case(sets[: kind.old], sets[kind.old : serve], sets[serve:], spent)


def independent(kind: Kind, seed: int, *, small: bool = False) -> list[Case]:
    """Independent runs, one after another; `small` ones begin at weights 2.4 times smaller, as torch's own are."""
    sizes = {0: kind.old + kind.live, 2_000: kind.old, 1_000: kind.own}
    found, theirs, own = (seeds(kind, seed + more, n, small=small) for more, n in sizes.items())
    spent = timed(lambda: trained_from_fresh_weights(kind.task(small=small), Draws(seed)))
    return [Case(found[: kind.old], found[kind.old :], theirs, spent, own=own)]


def immunised(kind: Kind, seed: int, *, fresh: bool, how: Immunise | None = None) -> list[Case]:
    """Fresh seeds, or the last set that leaked, trained for half an epoch on examples made on all four that leaked."""

    def made(base: Classifier, old: Sets, rng: Draws) -> Classifier:
        return (how or kind.immunise)(base, old, kind.recipe, kind.examples().train, kind.threat, rng=rng)

    return _trained_on(kind, seed, made, fresh=fresh)


def diversified(kind: Kind, seed: int) -> list[Case]:
    """The same of fresh seeds on examples that have the features of others on what leaked, after DVERGE."""
    return immunised(kind, seed, fresh=True, how=replace(kind.immunise, crafting=Distilled()))


def trained_more(kind: Kind, seed: int, *, fresh: bool) -> list[Case]:
    """The control: half an epoch of single-step training at 1.25 eps, which knows nothing of what leaked."""

    def made(base: Classifier, old: Sets, rng: Draws) -> Classifier:
        how = Training(epochs=1, lr=1e-3, averaging="none", weight_decay=0.0, warmup=0.0)
        threat = replace(kind.threat, constraint=kind.threat.constraint.resized(1.25 * kind.eps))
        some = rows_of(kind.examples().train, len(kind.examples().train) // 2, rng.at("data"))
        return last_of(kind.single_step(how), base, some, threat, rng.at("training"))

    return _trained_on(kind, seed, made, fresh=fresh)


def _trained_on(
    kind: Kind, seed: int, made: Callable[[Classifier, Sets, Draws], Classifier], *, fresh: bool
) -> list[Case]:
    """Sets made of others by training on; the thief of the procedure makes four of his own."""
    found = seeds(kind, seed, kind.old + kind.live)
    old = found[: kind.old]
    theirs = seeds(kind, 2_000 + seed, kind.old) if fresh else [old[-1]] * kind.old
    bases = found[kind.old :] if fresh else [old[-1]] * kind.live
    begin = perf_counter()
    live = [made(base, old, Draws(seed).at("made", k)) for k, base in enumerate(bases)]
    spent = (perf_counter() - begin) / kind.live
    siblings = [made(base, old, Draws(seed).at("sibling", k)) for k, base in enumerate(theirs)]
    return [Case(old, live, [*siblings, *old], spent)]


CONSTRUCTIONS: dict[str, Construction] = {
    "static": static,
    "noise": noise,
    "checkpoints of a trajectory": trajectory,
    "draws of a trajectory": partial(generated, "trajectory"),
    "draws of 8 basins": partial(generated, "basins"),
    "fresh seeds": independent,
    "fresh seeds, small at first": partial(independent, small=True),
    "old set, immunised": partial(immunised, fresh=False),
    "fresh seed, immunised": partial(immunised, fresh=True),
    "fresh seed, diversified": diversified,
    "old set, trained more": partial(trained_more, fresh=False),
    "fresh seed, trained more": partial(trained_more, fresh=True),
}
