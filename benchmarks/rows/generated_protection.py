"""Whether a hypernetwork generates parameter sets that protect: adversarial examples of one set break few inputs on
another. MNIST, Linf 0.1 and 0.2.

*One stolen set*: of three attacks that are computed on it, the one that breaks most on the serving sets counts; `worst`
is the stolen set that breaks most, of two for each seed. The attacks differ in losses, starts and numbers of steps from
those of the trainings. *White box*: inputs that any of the three, computed on the serving set, breaks on it. Attacks on
several models (two or four stolen sets, surrogates, new sets of a stolen generator) are momentum PGD on their mean.
Shares are of test images that are correct when clean.

A baseline gets as many CPU seconds for each set as the generator takes for one of 20 sets if it is trained again after
20 thefts. The *static* sets, which the gate compares with, are plain at Linf 0.1, and those of FGSM-RS at Linf 0.2. The
*control* is one set that FGSM-RS trains for the seconds of the generator, and that always serves.

Left out to save time: four stolen sets, surrogates and new sets of the attacker for what no hypernetwork generated; two
stolen sets for what was immunised against one; and subspaces other than low-rank changes. What is derived from one set
or from a latent diffusion is measured with one seed and Linf 0.1, and the control with one seed.

The row takes about 200 core minutes. Two processes can share it: each calls `outcome(Size(eps=(…,)))` with one eps and
`OMP_NUM_THREADS=1`, and then `python -m benchmarks --only generated-protection` writes the record from the kept parts.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import mean

import torch
from torch import Tensor

from benchmarks.alignment import hidden, permuted
from benchmarks.hypernetwork import Diversity
from benchmarks.parts import part
from benchmarks.procedures import NEW, SETS, THEFTS, Case, Size, plain_is_static
from benchmarks.record import Cells, Claim, Outcome
from benchmarks.rotated import STANDARD, Kind, Momentum, Sets, accuracy, means, models, success
from holdfast.attacks.parts.ascent import ascend
from holdfast.attacks.parts.losses import cross_entropy, margin_loss
from holdfast.core.draws import Draws
from holdfast.core.model import Classifier
from holdfast.rotation import Members, put, weights_of
from holdfast.rotation.collecting import apart, l1
from holdfast.rotation.steps.alternatives import NOISE, noisy

WHAT = (
    "whether sets of a hypernetwork protect after thefts, beside sets that are trained again in the same time"
)
WORSE, POINT, WHITE, PASS, SET_S = 1.2, 1.0, 2.0, 80.0, 1.0
"""Bounds for adoption: share broken in multiples of that on retrained sets; points of accuracy and of white box; % of
the sets that pass the gate; seconds of a set."""
_RESTARTS = 3  # random starts of momentum PGD on one stolen set
ONE, WORST, BOX, CLEAN, SECONDS = "one stolen, %", "worst, %", "white box, %", "clean, %", "s for a set"
PASSED, TRAINING_S = "pass, %", "training s"
_BROKEN = "broken"  # per image, mean over the pairs of a stolen and a serving set
_IMAGE = 0.1  # %, one of 1,000 images: the smallest denominator of a ratio


@dataclass(frozen=True)
class Made:
    """Sets of one procedure, and which of them an attacker has."""

    thefts: Sequence[tuple[Sets, Sets]]
    """sets that one attacker stole, and sets that serve after the theft"""
    seconds: float
    """CPU seconds of a set"""
    cells: Cells = field(default_factory=dict)
    """further cells of the table"""


Procedure = Callable[[Case], Made]


def rotating(sets: Sets, seconds: float, cells: Cells | None = None) -> Made:
    """Three sets: each of the first two is stolen and the others serve; then both are stolen and the last one serves.
    Fewer sets are not compared.
    """
    if len(sets) < SETS:
        return Made([], seconds, cells or {})
    thefts = [([sets[k]], [one for place, one in enumerate(sets) if place != k]) for k in range(2)]
    return Made([*thefts, (sets[:2], sets[2:])], seconds, cells or {})


def against(
    case: Case, name: str, stolen: Sets, made: Callable[[int], Classifier], before_s: float = 0.0
) -> Made:
    """Two sets that are each made against one stolen set. `before_s` is the CPU time of the sets that they are made
    from.
    """
    if len(stolen) < SETS:
        return Made([], before_s)
    found, seconds = case.several(name, 2, made)
    return Made([([stolen[k]], [found[k]]) for k in range(2)], before_s + seconds)


def hypernetwork(case: Case) -> Made:
    """Sets of the hypernetwork that is to be adopted."""
    return generated(case, "transfer", case.size.generator_s)


def regularised(diversity: Diversity, case: Case) -> Made:
    """Sets of a hypernetwork that was trained for a shorter time with one of the regularisers."""
    return generated(case, diversity, case.size.regulariser_s)


def generated(case: Case, diversity: Diversity, seconds: float) -> Made:
    """Sets of a hypernetwork that pass the gate, and the success rates of attackers who have several models."""
    members, numbers = case.generator(diversity, seconds)
    sets = models(members, range(len(members)), case.kind)
    drawn, new = sets[: case.size.drawn], sets[-NEW:]
    right = [accuracy(one, case.kind.examples().held) for one in drawn]
    passing = [one for one, share in zip(drawn, right, strict=True) if share >= case.least]
    cells = {
        PASSED: 100 * len(passing) / len(drawn),
        TRAINING_S: numbers[TRAINING_S],
        "updates": numbers["updates"],
    }
    if len(passing) < SETS:
        return Made([], numbers[SECONDS], cells)
    other = case.following  # whose sets are surrogates of this seed's attacker
    attackers = {
        "four stolen, %": passing[SETS : SETS + 4],
        "plain surrogates, %": other.plain[0],
        "FGSM-RS surrogates, %": other.robust[0],
        "stolen generator, %": new,
    }
    rng = Draws(case.seed).at("attackers")
    for name, sources in attackers.items():
        if len(sources) >= SETS:
            x_adv = Momentum()(sources, case.kind.attacked, case.kind.threat, rng.at(name))
            cells[name] = 100 * mean(success(one, x_adv, case.kind) for one in passing[:SETS])
    return rotating(passing[:SETS], numbers[SECONDS], cells)


def plain_immunised(case: Case) -> Made:
    """Plain sets, each immunised against a stolen one."""
    (sets, seconds), rng = case.plain, case.rng.at("plain immunised")
    made = partial(_next_immunised, case, sets, rng, hard=False)
    return against(case, "plain, immunised", sets, made, seconds)


def robust_immunised(case: Case) -> Made:
    """Sets that FGSM-RS trains for the seconds that immunising leaves, and that are then immunised with it."""
    sets, rng = case.robust[0], case.rng.at("robust immunised")
    updates = case.updates(max(case.set_s - case.immunising_s, 0.0))

    def made(k: int) -> Classifier:
        base = case.hardened(case.fresh(rng.at(k)), updates, rng.at(k))
        return case.immunised(base, sets[k], rng.at("immunised", k), hard=True)

    return against(case, "FGSM-RS, immunised", sets, made)


def diffusion_immunised(case: Case) -> Made:
    """Sets of the latent diffusion, each immunised against a stolen one."""
    (sets, seconds), rng = case.diffused, case.rng.at("diffusion immunised")
    made = partial(_next_immunised, case, sets, rng, hard=False)
    return against(case, "diffusion, immunised", sets, made, seconds)


def diffusion_tuned(case: Case) -> Made:
    """Sets of the latent diffusion that FGSM-RS trains further."""
    (sets, seconds), rng = case.diffused, case.rng.at("diffusion tuned")
    if len(sets) < SETS:
        return Made([], seconds)
    updates = case.updates(case.set_s)
    tuned, more_s = case.several(
        "diffusion, FGSM-RS", SETS, lambda k: case.hardened(sets[k], updates, rng.at(k))
    )
    return rotating(tuned, seconds + more_s)


def _next_immunised(case: Case, sets: Sets, rng: Draws, k: int, *, hard: bool) -> Classifier:
    return case.immunised(sets[k + 1], sets[k], rng.at(k), hard=hard)


def with_noise(case: Case) -> Made:
    """Copies of the stolen set with Gaussian noise."""
    rng = case.rng.at("noise")
    return Made([([one], [noisy(one, NOISE, rng.at(k))]) for k, one in enumerate(case.plain[0][:2])], 0.0)


def reordered(case: Case) -> Made:
    """Copies of the stolen set with its hidden units in random order, which have the same outputs."""
    thefts = []
    for k, one in enumerate(case.plain[0][:2]):
        layers, rng = hidden(one), case.rng.at("order", k)
        orders = [rng.at(place).bits(torch.arange(each.units)).argsort() for place, each in enumerate(layers)]
        thefts.append(([one], [put(one, permuted(weights_of(one), layers, orders))]))
    return Made(thefts, 0.0)


def control(case: Case) -> Made:
    """One set that FGSM-RS trains for the seconds of the generator, and that serves after its theft."""
    rng, updates = case.rng.at("control"), case.updates(case.size.generator_s)
    one, seconds = case.timed("control", lambda: case.hardened(case.fresh(rng), updates, rng))
    return Made([([one], [one])], seconds)


OWN, PLAIN, ROBUST, CONTROL = "hypernetwork", "plain", "FGSM-RS", "control: FGSM-RS, never rotated"
EACH_SEED: dict[str, Procedure] = {
    OWN: hypernetwork,
    PLAIN: lambda case: rotating(*case.plain),
    "plain, immunised": plain_immunised,
    ROBUST: lambda case: rotating(*case.robust),
    "FGSM-RS, immunised": robust_immunised,
}
FIRST_SEED: dict[str, Procedure] = {CONTROL: control}
FIRST_EPS: dict[str, Procedure] = {
    "hypernetwork, no regulariser": partial(regularised, "none"),
    "hypernetwork, distance of outputs": partial(regularised, "outputs"),
    "hypernetwork, transfer": partial(regularised, "transfer"),
    "latent diffusion": lambda case: rotating(*case.diffused),
    "latent diffusion, immunised": diffusion_immunised,
    "latent diffusion, FGSM-RS": diffusion_tuned,
    "plain, noise": with_noise,
    "plain, low-rank changes": lambda case: rotating(*case.low_rank),
    "plain, hidden units reordered": reordered,
}
RIVALS = (
    PLAIN, "plain, immunised", ROBUST, "FGSM-RS, immunised", "latent diffusion", "latent diffusion, immunised",
    "latent diffusion, FGSM-RS",
)  # fmt: skip


def measured() -> Outcome:
    return outcome(Size())


def outcome(size: Size) -> Outcome:
    """The row with these budgets, or a part of it with fewer eps and seeds; parts that are kept are not measured
    again.
    """
    size.kind.examples()  # so that no training is timed together with the reading of the data
    detail: Cells = {}
    by: dict[tuple[float, str], Cells] = {}
    for eps in size.eps:
        case = {seed: Case(size, eps, seed) for seed in size.seeds}
        first = {**FIRST_SEED, **(FIRST_EPS if eps == STANDARD.eps else {})}
        for name, procedure in (EACH_SEED | first).items():
            seeds = size.seeds if name in EACH_SEED else size.seeds[:1]
            found = [_kept(case[seed], name, procedure, detail) for seed in seeds]
            by[eps, name] = {"linf": eps, "sets": name, **_together(found)}
    for (eps, _), cells in by.items():
        cells |= _difference(by[eps, OWN], cells)
    table = [{key: value for key, value in cells.items() if key != _BROKEN} for cells in by.values()]
    config: Cells = {
        "seconds of a generator": size.generator_s, "where regularisers are compared": size.regulariser_s,
        "seeds": size.seeds, "images": size.kind.attacks, "generated": size.drawn, "compared": SETS, "thefts": THEFTS,
        "new sets of the attacker": NEW, "restarts": _RESTARTS, "generator": asdict(size.settings),
    }  # fmt: skip
    claims = [claim for eps in size.eps for claim in _claims(eps, by)]
    return Outcome(table, claims, config, detail, [note for eps in size.eps for note in _notes(eps, by)])


def _kept(case: Case, name: str, procedure: Procedure, detail: Cells) -> Cells:
    """What attackers get of the sets of one procedure at one eps and seed, measured once."""
    key = case.named(name)
    found = part(case.kind.row, key, lambda: _judged(case, procedure(case)))
    cells: Cells = found["measured"]
    detail[key] = {**found, "measured": {name: value for name, value in cells.items() if name != _BROKEN}}
    return cells


def _judged(case: Case, made: Made) -> Cells:
    cells = {**made.cells, SECONDS: made.seconds}
    single = [(stolen[0], serving) for stolen, serving in made.thefts if len(stolen) == 1]
    if not single:
        return cells
    kind, rng = case.kind, Draws(case.seed).at("attacks")
    examples: dict[int, dict[str, Tensor]] = {}
    for place, (stolen, serving) in enumerate(single):
        for one in (stolen, serving[0]):
            if id(one) not in examples:
                examples[id(one)] = attacks(one, kind, rng.at(place))
    robbed = [_robbed(examples[id(stolen)], serving, kind) for stolen, serving in single]
    boxes = [_any_breaks(examples[id(serving[0])], serving[0], kind) for _, serving in single]
    sets = {id(one): one for _, serving in single for one in serving}.values()
    between = apart(_members(case.plain[0]))
    distances = [float(l1(_members(serving), _members([stolen])).mean()) for stolen, serving in single]
    cells |= {
        CLEAN: 100 * mean(accuracy(one, kind.examples().test) for one in sets),
        ONE: 100 * mean(share for share, _ in robbed),
        WORST: 100 * max(share for share, _ in robbed),
        BOX: 100 * mean(boxes),
        "L1 / L1 of plain runs": mean(distances) / between,
        _BROKEN: torch.stack([broken for _, broken in robbed]).mean(0).tolist(),
    }
    for stolen, serving in made.thefts:
        if len(stolen) == 2:
            x_adv = Momentum()(stolen, kind.attacked, kind.threat, rng.at("two"))
            cells["two stolen, %"] = 100 * mean(success(one, x_adv, kind) for one in serving)
    return cells


def _robbed(examples: Mapping[str, Tensor], serving: Sets, kind: Kind) -> tuple[float, Tensor]:
    """The mean share that the best attack on a stolen set breaks on the serving sets, and for each image the share of
    the serving sets on which this attack breaks it.
    """
    shares = {name: mean(success(one, x, kind) for one in serving) for name, x in examples.items()}
    best = max(shares, key=lambda name: shares[name])
    broken = torch.stack([_broken(one, examples[best], kind) for one in serving])
    return shares[best], broken.float().mean(0)


def _any_breaks(examples: Mapping[str, Tensor], model: Classifier, kind: Kind) -> float:
    """The share that any of the attacks breaks on a model."""
    broken = torch.stack([_broken(model, x, kind) for x in examples.values()]).any(0)
    n_right = round(len(broken) * accuracy(model, kind.attacked))
    return float(broken.sum()) / max(n_right, 1)


def attacks(model: Classifier, kind: Kind, rng: Draws) -> dict[str, Tensor]:
    """The examples of each attack on a model, by name: momentum PGD, those of three starts with the largest losses, and
    PGD of 50 steps on the margin.
    """
    batch, constraint = kind.attacked, kind.threat.constraint
    starts = torch.stack([
        Momentum()([model], batch, kind.threat, rng.at("start", k)) for k in range(_RESTARTS)
    ])  # fmt: skip
    with torch.no_grad():
        losses = torch.stack([cross_entropy(model(x), batch) for x in starts])
    start = constraint.sample(batch, model.bounds, rng.at("margin"))
    step_size = 2.5 * kind.eps / 50
    margin, _ = ascend(
        model, batch, start, margin_loss, constraint, steps=50, step_size=step_size, keep="last"
    )
    restarts = starts[losses.argmax(0), torch.arange(len(batch))]
    return {"momentum": starts[0], "restarts": restarts, "margin": margin}


def _broken(model: Classifier, x_adv: Tensor, kind: Kind) -> Tensor:
    """Whether each image is correct when clean and wrong when changed."""
    batch = kind.attacked
    with torch.no_grad():
        return (model(batch.x).argmax(1) == batch.y) & (model(x_adv).argmax(1) != batch.y)


def _members(sets: Sets) -> Members:
    return Members.of([weights_of(one) for one in sets], range(len(sets)))


def _together(found: Sequence[Cells]) -> Cells:
    """Means over the seeds, and the worst stolen set of all of them."""
    cells = means([{name: value for name, value in one.items() if name != _BROKEN} for one in found])
    attacked = [one for one in found if ONE in one]
    if attacked:
        cells[WORST] = max(one[WORST] for one in attacked)
        cells[_BROKEN] = torch.tensor([one[_BROKEN] for one in attacked]).mean(0).tolist()
    return cells


def _difference(own: Cells, other: Cells) -> Cells:
    """Mean difference of the broken shares of all images, with its standard error over the images."""
    if own is other or _BROKEN not in own or _BROKEN not in other:
        return {}
    differences = 100 * (torch.tensor(own[_BROKEN]) - torch.tensor(other[_BROKEN]))
    error = float(differences.std()) / math.sqrt(len(differences))
    return {"hypernetwork minus this, points": float(differences.mean()), "standard error": error}


def _static(eps: float, by: Mapping[tuple[float, str], Cells]) -> Cells:
    return by[eps, PLAIN if plain_is_static(eps) else ROBUST]


def _rivals(eps: float, by: Mapping[tuple[float, str], Cells]) -> dict[str, Cells]:
    """The baselines that are as accurate as the static sets, but for a point."""
    least = _static(eps, by)[CLEAN] - POINT
    cells = {name: by[eps, name] for name in RIVALS if (eps, name) in by}
    return {name: one for name, one in cells.items() if one.get(CLEAN, 0.0) >= least}


def _claims(eps: float, by: Mapping[tuple[float, str], Cells]) -> list[Claim]:
    own, static, rivals = by[eps, OWN], _static(eps, by), _rivals(eps, by)
    worst, box, best = own.get(WORST, 100.0), own.get(BOX, 100.0), min(one[WORST] for one in rivals.values())
    name = f"linf {eps:g}"
    return [
        Claim(
            f"{name}: one stolen set, worst / retrained <= {WORSE:g}",
            worst / max(static[WORST], _IMAGE),
            WORSE,
        ),
        Claim(f"{name}: one stolen set, worst / best baseline <= 1", worst / max(best, _IMAGE), 1.0),
        Claim(f"{name}: white box minus static, points <= {WHITE:g}", box - static[BOX], WHITE),
        Claim(f"{name}: white box minus control, points <= {WHITE:g}", box - by[eps, CONTROL][BOX], WHITE),
        Claim(
            f"{name}: static accuracy minus own, points <= {POINT:g}",
            static[CLEAN] - own.get(CLEAN, 0.0),
            POINT,
        ),
        Claim(f"{name}: sets that pass the gate, % >= {PASS:g}", own[PASSED], PASS, least=True),
        Claim(f"{name}: seconds of a set <= {SET_S:g}", own[SECONDS], SET_S),
    ]


def _notes(eps: float, by: Mapping[tuple[float, str], Cells]) -> list[str]:
    """The best baseline, and after how many sets the hypernetwork is cheaper than the cheapest one that protects."""
    own, rivals = by[eps, OWN], _rivals(eps, by)
    best = min(rivals, key=lambda name: rivals[name][WORST])
    notes = [f"linf {eps:g}: the best baseline is {best}"]
    equal = {name: one[SECONDS] for name, one in rivals.items() if one[ONE] <= own.get(ONE, 100.0)}
    if not equal:
        return [*notes, f"linf {eps:g}: no baseline protects as well on average as the hypernetwork"]
    cheapest = min(equal, key=lambda name: equal[name])
    n = math.ceil(own[TRAINING_S] / max(equal[cheapest] - own[SECONDS], own[SECONDS]))
    cheaper = (
        f"linf {eps:g}: {cheapest} takes {equal[cheapest]:.1f} s for a set and protects on average as well; the "
        f"hypernetwork is cheaper from {n} sets on"
    )
    return [*notes, cheaper]
