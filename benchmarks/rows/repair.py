"""Repair of networks with a planted backdoor: what `repair` and `ft-sam` leave of it, and what comes back."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

import holdfast
from benchmarks import networks
from benchmarks.networks import images
from benchmarks.record import Cells, Claim, Outcome
from benchmarks.rows.planting import BATCH, EPOCHS, LR, SEED, trained
from holdfast.io.data.npz import write_trigger
from holdfast.threats.triggers import Trigger
from holdfast.verbs.poison import BadNets, Blended, Poisoning, poisoned

WHAT = "repair of backdoors in MNIST networks with 3,000 clean digits"
TRAINED, TESTED, CLEAN, TARGET = 57_000, 2_000, 3_000, 1
RATE = 0.01
DRILLS: tuple[tuple[str, Poisoning], ...] = (("BadNets 1 %", BadNets()), ("Blended 1 %", Blended()))
RECIPES = ("repair", "ft-sam")
NET = f"{networks.__file__}:two_conv_two_fc"


def measured() -> Outcome:
    """Repair a network of each drill by each recipe, beside a network that was never poisoned."""
    x, y = images("mnist", TRAINED + CLEAN, "train")
    test = images("mnist", TESTED)
    table: list[Cells] = []
    with TemporaryDirectory() as folder:
        place = Path(folder)
        clean_set = {"x_train": x[TRAINED:], "y_train": y[TRAINED:], "x_test": test[0], "y_test": test[1]}
        np.savez(place / "clean.npz", **{name: values.numpy() for name, values in clean_set.items()})
        control = place / "control.pt"
        torch.save(trained(x[:TRAINED], y[:TRAINED]).state_dict(), control)
        for name, attack in DRILLS:
            drill = poisoned(x[:TRAINED], y[:TRAINED], attack, rate=RATE, target=TARGET, seed=SEED)
            assert drill.trigger is not None
            torch.save(trained(drill.x, drill.y).state_dict(), place / "model.pt")
            table += [_row(name, recipe, drill.trigger, place, control) for recipe in RECIPES]
    repairs = [row for row in table if row["recipe"] == "repair"]
    claims = [
        Claim("largest success after repair <= 0.08", max(row["after"] for row in repairs), 0.08),
        Claim("largest loss of clean accuracy <= 0.015", max(row["clean loss"] for row in repairs), 0.015),
        Claim("least success before >= 0.95", min(row["before"] for row in table), 0.95, least=True),
    ]
    config = {"train": TRAINED, "test": TESTED, "clean": CLEAN, "epochs": EPOCHS, "batch": BATCH, "lr": LR}
    config |= {"seed": SEED, "target": TARGET, "rate": RATE}
    notes = ["the trigger is the planted one, and not one that an audit recovered"]
    return Outcome(table, claims, config, notes=notes)


def _row(name: str, recipe: str, trigger: Trigger, place: Path, control: Path) -> Cells:
    """The measurements on the card of a repair."""
    write_trigger(place / "found.npz", trigger)
    card = holdfast.harden(
        holdfast.open_model(place / "model.pt", arch=NET, trust_code=True),
        str(place / "clean.npz"),
        threat=f"trigger:{place / 'found.npz'}",
        recipe={"use": recipe, "control": f"{control},arch={NET}"},
        n=TESTED,
        doubts=False,
    ).card
    clean = [card[side]["metrics"]["clean_accuracy"]["value"] for side in ("before", "after")]
    entry = card["follow_up"]
    return {
        "drill": name,
        "recipe": recipe,
        "before": entry["before"],
        "after": entry["after"],
        "clean before": clean[0],
        "clean loss": clean[0] - clean[1],
        "after 50 updates": entry["after_steps"],
        "control": entry["control"]["before"],
        "control after 50": entry["control"]["after_steps"],
        "outcome": entry["outcome"],
    }
