"""What `holdfast harden` makes within minutes: clean accuracy, and what is left after `standard` and `fast`."""

from dataclasses import dataclass
from typing import Any

import holdfast
from benchmarks.hardened import FOLDER, dataset, made, percent, shares, spent
from benchmarks.parts import part
from benchmarks.record import Cells, Claim, Outcome

WHAT = "models hardened within minutes on two cores: clean, `standard` on 1,000 test images, `fast` on all 10,000"


@dataclass(frozen=True)
class Track:
    """A data set, a threat, minutes and a recipe to train with, and what must be left, in %."""

    name: str
    data: str
    threat: str
    minutes: int
    clean: float
    robust: float
    recipe: str | dict[str, Any] = "auto"


THREADS = 2
BEYOND: dict[str, Any] = {
    "use": "atta",
    "steps": 4,
    "step": 0.25,
    "clean": 0.0,
    "training": {"overshoot": 1.2},
}
"""Where clean accuracy may be given for more that holds."""
TRACKS = (
    Track("MNIST linf 0.3", "mnist", "linf:0.3", 10, 98.5, 90.5, BEYOND),
    Track("MNIST linf 0.1 without attacks", "mnist", "linf:0.1", 10, 98.0, 87.0, "lipschitz"),
    Track("Fashion-MNIST linf 0.1", "fashion_mnist", "linf:0.1", 15, 86.0, 75.0),
)


def measured() -> Outcome:
    table: list[Cells] = []
    claims: list[Claim] = []
    detail: Cells = {}
    for track in TRACKS:
        name, recipe = track.name, track.recipe
        kept = made(
            "hardening", name, "mnist-cnn", track.data, track.threat, recipe, f"{track.minutes}min",
            suite="standard", threads=THREADS,
        )  # fmt: skip
        whole = part("hardening", f"{name} whole", lambda track=track: _whole(track))
        card, left = kept["measured"], whole["measured"]
        table.append(
            {"track": name, "recipe": card["recipe"], **shares(card), **spent(card),
             "fast on 10,000: clean, %": left["clean"], "robust, % of 10,000": left["robust"]}
        )  # fmt: skip
        raised = len(card["after"]["doubts"])
        claims += [
            Claim(f"{name}: clean, % >= {track.clean}", percent(card, "clean_accuracy"), track.clean, least=True),
            Claim(f"{name}: standard, % >= {track.robust}", percent(card, "robust_accuracy"), track.robust, least=True),
            Claim(f"{name}: doubts raised <= 0", raised, 0),
            Claim(f"{name}: minutes of training <= {track.minutes}", card["cost"]["wall_s"] / 60, track.minutes),
        ]  # fmt: skip
        detail |= {name: kept, f"{name} whole": whole}
    return Outcome(table, claims, {"tracks": [vars(track) for track in TRACKS], "threads": THREADS}, detail)


def _whole(track: Track) -> Cells:
    """`fast` on the whole test split."""
    place = FOLDER / "hardening"
    found = holdfast.assess(
        place / track.name / "model.safetensors", dataset(track.data), track.threat, "fast",
        doubts=False, device="cpu", run=place / f"{track.name} whole", resume=True,
    )  # fmt: skip
    return {name: 100 * float(found.metrics[f"{name}_accuracy"].value) for name in ("clean", "robust")}
