"""Spoken digits over the air under snr:30dB: an attack in expectation, a plain one and noise, in unseen rooms."""

import torch
from torch import Tensor

from benchmarks.record import Cells, Claim, Outcome
from benchmarks.rows.sound import left, opened
from benchmarks.spoken_digits import RATE
from holdfast.attacks import APGD
from holdfast.attacks.parts.losses import cross_entropy
from holdfast.attacks.parts.sounds import heard_through, over_the_air
from holdfast.attacks.protocol import attacked_inputs
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.meter import margin
from holdfast.core.model import Classifier
from holdfast.settings.grammar import parse_transform
from holdfast.threats.parsing import parse_threat

WHAT = (
    "spoken digits over the air, snr:30dB, 100 clips in 100 unseen rooms: attack in expectation, plain, noise"
)
N, ROOMS, THREAT, TRANSFORM = 100, 100, "snr:30dB", "room=1,shift=0.1s,gain=6dB,band=300-3400"


def _right_in_rooms(model: Classifier, batch: Batch, x: Tensor) -> Tensor:
    """Mask (rooms, n) of the clips that are right in each of the same rooms, which no attack has seen."""
    masks = []
    for room in range(ROOMS):
        torch.manual_seed(10_000 + room)
        with torch.no_grad():
            heard = over_the_air(x, len(x), parse_transform(TRANSFORM), RATE)
            masks.append(margin(model(heard.clamp(-1, 1)), batch) > 0)
    return torch.stack(masks)


def measured() -> Outcome:
    model, batch = opened(0, N)
    threat = parse_threat(THREAT)
    behind = heard_through(model, parse_transform(TRANSFORM)).eval()
    behind.net.suit(RATE)
    torch.manual_seed(0)
    attack = APGD(loss=cross_entropy, steps=100)
    in_expectation = APGD(loss=cross_entropy, steps=100, draws=20)
    found = {
        "noise": threat.constraint.sample(batch, model.bounds, Draws(0).at("noise")),
        "plain": attacked_inputs(attack, model, batch, threat, rng=Draws(0)),
        "in expectation": attacked_inputs(in_expectation, behind, batch, threat, rng=Draws(0)),
    }
    clean = _right_in_rooms(model, batch, batch.x)
    table: list[Cells] = []
    for name, x_adv in found.items():
        broken = clean & ~_right_in_rooms(model, batch, x_adv)
        table.append(
            {
                "change": name,
                "broken in rooms, % of right pairs": 100 * int(broken.sum()) / int(clean.sum()),
                "left without a room, %": left(model, batch, threat, x_adv),
            }
        )
    shares = {row["change"]: row["broken in rooms, % of right pairs"] for row in table}
    more = shares["in expectation"] - shares["plain"]
    claims = [Claim("broken in expectation - broken by the plain attack, points >= 20", more, 20, least=True)]
    config = {"n": N, "rooms": ROOMS, "threat": THREAT, "transform": TRANSFORM}
    return Outcome(table, claims, config, {"right pairs": int(clean.sum())})
