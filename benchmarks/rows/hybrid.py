"""The recipe `hybrid` beside the adversarial training that it contains, on the bundled digits."""

import time
from typing import Any

import torch

import holdfast
from benchmarks.networks import two_conv_two_fc
from benchmarks.record import Cells, Claim, Outcome
from holdfast.core.constraints import Linf
from holdfast.core.draws import Draws
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.io.data.data import open_data
from holdfast.metrics.shares import robust
from holdfast.recipes import Hybrid, PGDTraining
from holdfast.recipes.training.fit import Training
from holdfast.recipes.training.recipe import Recipe
from holdfast.statistics.intervals import paired_difference

WHAT = "the recipe hybrid beside pgd with as many epochs: bundled digits, Linf 0.1, `quick` on 500 images"
EPS, EPOCHS, N, SEED = 0.1, 6, 500, 0
RECIPES: dict[str, Recipe] = {
    "pgd": PGDTraining(training=Training(epochs=EPOCHS)),
    "hybrid": Hybrid(training=Training(epochs=EPOCHS)),
}


def measured() -> Outcome:
    digits = open_data("mnist-mini", split="train")
    training = digits.read(0, len(digits))
    table: list[Cells] = []
    survived = {}
    for name, recipe in RECIPES.items():
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            model = Classifier(two_conv_two_fc(), classes=10)
        begun = time.process_time()
        *_, last = recipe(model, training, ThreatModel(Linf(EPS)), rng=Draws(SEED).at("training"))
        spent = time.process_time() - begun
        last.put_into(model)
        result = holdfast.assess(
            model.eval(), "mnist-mini", f"linf:{EPS}", "quick", n=N, doubts=False, device="cpu"
        )
        survived[name] = robust(result.evidence, "robust_accuracy")
        table.append({"recipe": name, **_shares(result), "n": N, "training, CPU s": round(spent, 1)})
    gain = paired_difference(survived["hybrid"], survived["pgd"])
    claims = [Claim("robust accuracy, hybrid - pgd, points >= 0", 100 * gain.value, 0.0, least=True)]
    config: Cells = {"network": "two_conv_two_fc", "eps": EPS, "epochs": EPOCHS, "seed": SEED, "n": N}
    notes = [
        (
            f"robust accuracy, hybrid - pgd: {100 * gain.value:+.1f} points ({100 * gain.low:+.1f} to "
            f"{100 * gain.high:+.1f}); one seed"
        )
    ]
    return Outcome(table, claims, config, {"passes of an epoch": {"pgd": 8, "hybrid": 9}}, notes)


def _shares(result: Any) -> Cells:
    return {
        f"{name}, %": f"{100 * share.value:.1f} ({100 * share.low:.1f}–{100 * share.high:.1f})"
        for name, metric in (("clean", "clean_accuracy"), ("robust", "robust_accuracy"))
        if (share := result.metrics[metric])
    }
