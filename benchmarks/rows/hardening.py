"""What `holdfast harden` makes within minutes: clean accuracy, and what is left after `standard` and `fast`."""

from dataclasses import dataclass
from typing import Any

import holdfast
from benchmarks.hardened import dataset, interval, made, percent, shares, spent
from benchmarks.parts import RUNS, part
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


SEED, THREADS = 0, 2
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
            suite="standard", seed=SEED, threads=THREADS,
        )  # fmt: skip
        whole = part("hardening", f"{name} whole", lambda track=track: _whole(track))
        card, left = kept["measured"], whole["measured"]
        table.append(
            {"track": name, "recipe": card["recipe"], **shares(card), **spent(card),
             "fast on 10,000: clean, %": left["clean"], "robust, % of 10,000": left["robust"]}
        )  # fmt: skip
        raised, cost = len(card["after"]["doubts"]), card["cost"]
        minutes = (cost["planning_s"] + cost["wall_s"]) / 60
        standard = percent(card, "suite_robust_accuracy")
        claims += [
            Claim(f"{name}: clean, % >= {track.clean}", percent(card, "clean_accuracy"), track.clean, least=True),
            Claim(f"{name}: standard, % >= {track.robust}", standard, track.robust, least=True),
            Claim(f"{name}: doubts raised <= 0", raised, 0),
            Claim(f"{name}: minutes of plan and training <= {track.minutes}", minutes, track.minutes),
        ]  # fmt: skip
        detail |= {name: kept, f"{name} whole": whole}
    config: Cells = {"tracks": [vars(track) for track in TRACKS], "seed": SEED, "threads": THREADS}
    return Outcome(table, claims, config, detail, ["one seed"])


def _whole(track: Track) -> Cells:
    """What `fast` leaves on the whole test split, with intervals."""
    place = RUNS / "hardening"
    found = holdfast.assess(
        place / track.name / "model.safetensors", dataset(track.data), track.threat, "fast",
        doubts=False, device="cpu", run=place / f"{track.name} whole", resume=True,
    )  # fmt: skip
    return {name: interval(vars(found.metrics[f"{name}_accuracy"])) for name in ("clean", "robust")}
