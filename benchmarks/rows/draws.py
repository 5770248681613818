"""What a latent diffusion over parameter sets draws: what it costs, what works, how far it lies.

Two collections, one run and eight of them, under each reading of the published regulariser, whose weight is lambda.
"""

from functools import partial
from statistics import mean, median
from time import process_time
from typing import Any

import torch

from benchmarks.parts import part
from benchmarks.record import Cells, Claim, Outcome
from benchmarks.rotated import STANDARD, Momentum, accuracy, admitted, collected, examples, models, success
from holdfast.core.draws import Draws
from holdfast.rotation import Codec, Embedding, Generator, LatentDiffusion, Members
from holdfast.rotation.collecting import apart, nearest_sets
from holdfast.rotation.generating import span

WHAT = "draws of a latent diffusion over 200 parameter sets, by collection and regulariser"
ROW, SEEDS, DRAWN, LIVE = "draws", (0, 1, 2), 96, 6
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "trajectory": [
        {},
        {"regulariser": "printed"},
        {"regulariser": "away"},
        {"regulariser": "hinge", "margin": 1.5},
        {"regulariser": "hinge", "margin": 1.5, "weight": 10.0},
    ],
    "basins": [
        {},
        {"regulariser": "printed"},
        {"regulariser": "away"},
        {"regulariser": "hinge", "margin": 0.3},
        {"regulariser": "hinge", "margin": 0.5, "weight": 3.0},
    ],
}


SHOWN = (
    "variance lost", "round trip, points", "let in, %", "median accuracy, %", "L1 to nearest", "of those let in",
    "transfer", "within a basin", "to another",
)  # fmt: skip


def measured() -> Outcome:
    detail: Cells = {}
    table: list[Cells] = []
    for source, settings in SETTINGS.items():
        for said in settings:
            cells = []
            for seed in SEEDS:
                key = f"{source}, {' '.join(map(str, said.values())) or 'off'}, seed {seed}"
                detail[key] = part(ROW, key, partial(_drawn, source, said, seed))
                cells.append(detail[key]["measured"])
            shown = {
                "regulariser": said.get("regulariser", "off"),
                "lambda": said.get("weight", 1.0) if said else 0.0,
            }
            means = {name: _mean([one[name] for one in cells]) for name in SHOWN}
            table.append({"collection": source, **shown, "margin": said.get("margin", ""), **means})
    places = {
        f"{source}, in the two widest directions": part(ROW, f"{source}, places", partial(_places, source))
        for source in SETTINGS
    }
    costs = {
        f"{source}, cost, seed {seed}": part(
            ROW, f"{source}, cost, seed {seed}", partial(_cost, source, seed)
        )
        for source in SETTINGS
        for seed in SEEDS
    }
    slowest, longest = (
        max(one["measured"][what] for one in costs.values())
        for what in ("codec and diffusion, s", "a draw, s")
    )
    lost = max(one["measured"]["round trip, points"] for one in detail.values())
    claims = [
        Claim("codec and diffusion of one seed, s <= 60", slowest, 60),
        Claim("one draw by itself, s <= 0.05", longest, 0.05),
        Claim("the round trip of the codec loses, points <= 0.3", lost, 0.3),
    ]
    config: Cells = {"seeds": SEEDS, "drawn": DRAWN, "eps": STANDARD.eps, "attacked sets": LIVE}
    notes = [
        "L1 to the nearest set of the collection, in the distance between its runs, or in one run that of neighbours",
        "seconds of processor time of one thread, under the dearest setting",
        "transfer by momentum PGD of 12 steps between sets that were let in",
    ]
    return Outcome(table, claims, config, {**detail, **places, **costs}, notes)


def _mean(values: list[float | None]) -> float | str:
    known = [value for value in values if value is not None]
    return mean(known) if known else ""


def _drawn(source: str, said: dict[str, Any], seed: int) -> Cells:
    members, rng = collected(STANDARD, seed, source), Draws(seed).at(source)
    embedding, generator = _learned(members, said, rng)
    drawn = generator.drawn(DRAWN, rng.at("drawn"))
    sets, let_in, right = admitted(drawn, members)
    far = nearest_sets(drawn, members)[0] / apart(members)
    return {
        "variance lost": embedding.lost,
        "round trip, points": _round_trip(embedding, members),
        "let in, %": 100 * float(let_in.float().mean()),
        "median accuracy, %": 100 * median(right),
        "L1 to nearest": float(far.mean()),
        "of those let in": float(far[let_in].mean()) if let_in.any() else None,
        **_transfers(sets, nearest_sets(drawn.take(let_in), members.bases())[1] if let_in.any() else None),
    }


def _cost(source: str, seed: int) -> Cells:
    """What the dearest setting costs, and a draw by itself."""
    members, rng = collected(STANDARD, seed, source), Draws(seed).at(source)
    begin = process_time()
    _, generator = _learned(members, SETTINGS[source][-1], rng)
    spent, alone = process_time() - begin, []
    for one in range(9):
        begin = process_time()
        generator.drawn(1, rng.at("single", one))
        alone.append(process_time() - begin)
    begin = process_time()
    generator.drawn(DRAWN, rng.at("many"))
    return {
        "codec and diffusion, s": spent,
        "a draw, s": median(alone),
        f"each of {DRAWN}, s": (process_time() - begin) / DRAWN,
    }


def _learned(members: Members, said: dict[str, Any], rng: Draws) -> tuple[Embedding, Generator]:
    embedding = Codec()(members, rng=rng.at("codec"))
    return embedding, LatentDiffusion(**said)(embedding, members, rng=rng.at("diffusion"))


def _places(source: str) -> Cells:
    """Where the sets of a collection and the draws from it lie, and what they are worth: first seed, no regulariser."""
    members, rng = collected(STANDARD, SEEDS[0], source), Draws(SEEDS[0]).at(source)
    generator = _learned(members, {}, rng)[1]
    drawn = generator.drawn(DRAWN, rng.at("drawn"))
    _, let_in, right = admitted(drawn, members)
    plane = span(members, 2)
    return {
        "variance along them": plane.kept,
        "originals": _rounded(plane.coordinates(members)),
        "runs": members.basins.tolist(),
        "draws": _rounded(plane.coordinates(drawn)),
        "let in": let_in.tolist(),
        "right": [round(share, 4) for share in right],
    }


def _rounded(points: torch.Tensor) -> list[list[float]]:
    return [[round(value, 3) for value in point] for point in points.tolist()]


def _round_trip(embedding: Embedding, members: Members) -> float:
    """Points of mean accuracy on held-out images that some sets lose through the codec and back."""
    some = members.take(torch.arange(0, len(members), 10))
    back = Members(embedding.decoded(embedding.encoded(some)), some.basins)
    before, after = (
        mean(accuracy(one, examples().held) for one in models(sets, range(len(sets))))
        for sets in (some, back)
    )
    return 100 * (before - after)


def _transfers(sets: list[Any], basins: torch.Tensor | None) -> Cells:
    """Success of one draw's examples on others, of its own basin and of another."""
    own: list[float] = []
    other: list[float] = []
    if basins is not None and len(sets) >= 2 * LIVE:
        for source in range(LIVE, 2 * LIVE):
            made = Momentum()([sets[source]], STANDARD.attacked, STANDARD.threat, Draws(source))
            for target in range(LIVE):
                among = own if basins[source] == basins[target] else other
                among.append(success(sets[target], made))
    return {
        "transfer": mean(own + other) if own + other else None,
        "within a basin": mean(own) if own else None,
        "to another": mean(other) if other else None,
    }
