"""Spoken digits under snr:30dB with scores alone: Square with tones and with windows of samples, and a plain PGD."""

import torch
from torch import Tensor

from benchmarks.record import Cells, Claim, Outcome
from benchmarks.rows.sound import in_coordinates, left, opened, plain_pgd
from holdfast.attacks import Square
from holdfast.attacks.parts.losses import Best
from holdfast.attacks.parts.random_search import Heaps, search, window_share
from holdfast.attacks.protocol import AtCoordinates, attacked_inputs
from holdfast.core.batch import Batch
from holdfast.core.constraints import L2
from holdfast.core.draws import Draws
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.threats.parsing import parse_threat

WHAT = "spoken digits, snr:30dB, 1,000 queries with scores, three networks: tones beside windows of samples"
N, SEEDS, QUERIES, THREAT = 60, (0, 1, 2), 1000, "snr:30dB"


def _on_samples(model: Classifier, batch: Batch, threat: ThreatModel, rng: Draws) -> Tensor:
    """Square Attack with its patterns in windows of samples, in the same coordinates as with tones."""
    coordinates = in_coordinates(model, batch, threat)
    best, proposals = Best(coordinates.batch), Heaps(coordinates.batch, L2(threat.eps), coordinates.bounds)
    proposals.start(rng.at("start"))
    shares = [window_share(Square().p_init, step, QUERIES) for step in range(QUERIES)]
    with torch.no_grad():
        search(AtCoordinates(model, coordinates), coordinates.batch, proposals, best, shares, rng)
    return coordinates.inputs(best.x, batch.ids)


def measured() -> Outcome:
    threat, table = parse_threat(THREAT), []
    for seed in SEEDS:
        model, batch = opened(seed, N)
        rng = Draws(seed)
        tones = attacked_inputs(Square(queries=QUERIES), model, batch, threat, rng=rng)
        row: Cells = {
            "seed": seed,
            "windows of samples, %": left(model, batch, threat, _on_samples(model, batch, threat, rng)),
            "tones, %": left(model, batch, threat, tones),
            "plain PGD-40, %": left(model, batch, threat, plain_pgd(model, batch, threat)),
        }
        gap = row["windows of samples, %"] - row["plain PGD-40, %"]
        table.append(
            row | {"share of the gap closed": (row["windows of samples, %"] - row["tones, %"]) / gap}
        )
    least = min(row["share of the gap closed"] for row in table)
    claims = [Claim("share of the gap that tones close, worst seed >= 0.5", least, 0.5, least=True)]
    return Outcome(table, claims, {"n": N, "seeds": SEEDS, "queries": QUERIES, "threat": THREAT})
