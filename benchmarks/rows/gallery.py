"""The gallery of masked models: all flagged, and as broken as their twins under an attacker who knows them."""

from benchmarks import controls
from benchmarks.networks import images
from benchmarks.record import Cells, Claim, Outcome
from holdfast.doubts.gallery import EPS, ITEMS, undefended
from holdfast.doubts.protocol import SAMPLE
from holdfast.io.data.data import open_data
from holdfast.io.data.loaders import as_data
from holdfast.runs.harness.kinds.passes import FIXED
from holdfast.verbs.exhibition import assessed_net as by_attacks
from holdfast.verbs.exhibition import exhibition, raised

WHAT = "the gallery of masked models: naive, adaptive and the twin's robust accuracy, and the doubts raised"
N, GRID = 500, 0.025
UNFINISHED = "not-exhausted"
"""Raised of honest networks too, by a single PGD-40: it says that the suite is weak, and not that the model masks."""


def measured() -> Outcome:
    found = exhibition(n=N)
    table: list[Cells] = [
        {
            "masked model": item.name,
            "clean": item.clean_accuracy,
            "naive": item.naive_robust_accuracy,
            "twin": item.twin_robust_accuracy,
            "adaptive": item.adaptive_robust_accuracy,
            "raised": ", ".join(item.doubts),
            "adaptive attacks": ", ".join(item.adaptive),
            "CPU s": item.cpu_s,
        }
        for item in found
    ]
    silent = [item.name for item in found if not set(item.doubts) - {UNFINISHED}]
    gaps = [item.naive_robust_accuracy - item.adaptive_robust_accuracy for item in found]
    beyond = [item.adaptive_robust_accuracy - item.twin_robust_accuracy for item in found]
    before = _twin(EPS - GRID)
    honest = _honest()
    flagged = {name: doubts for name, doubts in honest.items() if set(doubts) - {UNFINISHED}}
    claims = [
        Claim("masked models >= 12", len(found), 12, least=True),
        Claim(f"masked models without a raised doubt beside `{UNFINISHED}` <= 0", len(silent), 0),
        Claim("naive - adaptive, least >= 0.20", min(gaps), 0.20, least=True),
        Claim("adaptive - twin, most <= 0.05", max(beyond), 0.05),
        Claim(f"the twin at {EPS:g} <= 0.05", max(item.twin_robust_accuracy for item in found), 0.05),
        Claim(f"the twin at {EPS - GRID:g} >= 0.05", before, 0.05, least=True),
        Claim("honest networks >= 20", len(honest), 20, least=True),
        Claim(f"honest networks with a raised doubt beside `{UNFINISHED}` <= 0", len(flagged), 0),
    ]
    config: Cells = {
        "n": N,
        "eps": EPS,
        "naive": "PGD-40, cross-entropy",
        "seed": 0,
        "honest n": SAMPLE,
    }
    detail: Cells = {"ways": {item.name: item.bypassed for item in found}, "honest": honest}
    assert len(found) == len(ITEMS)
    notes = [
        f"all evaluations of the masked models took {sum(item.cpu_s for item in found):.0f} s of CPU time"
    ]
    return Outcome(table, claims, config, detail, notes)


def _twin(eps: float) -> float:
    """What stands of the undefended twin one step of the grid earlier."""
    digits = open_data("mnist-mini", split="train")
    net = undefended(digits.read(0, len(digits)))
    return by_attacks(net, open_data("mnist-mini", n=N), eps, (FIXED,)).metrics["robust_accuracy"].value


def _honest() -> dict[str, tuple[str, ...]]:
    """The doubts that the same evaluation raises of honest networks."""
    found = {}
    for control in controls.HONEST:
        x, y = images(control.data, SAMPLE)
        net = controls.trained(control)
        result = by_attacks(net, as_data(x, y), control.eps, (FIXED,), doubts="all")
        found[control.name] = raised(result)
    return found
