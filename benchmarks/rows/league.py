"""Two attack policies against two networks for five minutes: the returned network, and the cross-play."""

import torch

from benchmarks.networks import images
from benchmarks.parts import part
from benchmarks.record import Cells, Claim, Outcome
from benchmarks.rows.policy import EPS, SEED, TRAINED, bundled, cells, trained
from holdfast.core.batch import Batch
from holdfast.core.constraints import Linf
from holdfast.core.draws import Draws
from holdfast.core.threat import ThreatModel
from holdfast.core.training import STATE, without_prefix
from holdfast.recipes import LeagueTraining
from holdfast.recipes.training.recipe import Finished

WHAT = "a league of two attack policies and two networks, MNIST linf:0.3, five CPU minutes, `fast` on 1,000 test images"
ROW, TESTED, BUDGET_S = "league", 1_000, 300.0


def measured() -> Outcome:
    """Train the league once; the cross-play is that of the card of `harden`."""
    kept = part(ROW, f"seed {SEED}", _league)
    found = kept["measured"]
    table = [{"recipe": "league", **cells(found)}]
    claims = [Claim("clean accuracy, % >= 90", table[0]["clean"], 90.0, least=True)]
    config: Cells = {
        "model": "mnist-cnn", "threat": f"linf:{EPS}", "train": TRAINED, "test": TESTED, "seed": SEED,
        "CPU s": BUDGET_S, "threads": 1,
    }  # fmt: skip
    return Outcome(table, claims, config, {f"seed {SEED}": kept}, [found["sentence"]])


def _league() -> Cells:
    recipe = LeagueTraining()
    found, last = trained(recipe, BUDGET_S, TRAINED, TESTED)
    given, new = (bundled().requires_grad_(False) for _ in range(2))
    last.put_into(new)
    x, y = images("mnist", TESTED)
    test = Batch(x, y, torch.arange(len(x)))
    state = without_prefix(last.tensors, STATE)
    finished = Finished(given, new, None, test, test, ThreatModel(Linf(EPS)), Draws(SEED), state)
    entry, sentence = recipe.follow_up(finished)
    return {**found, **entry, "sentence": sentence}
