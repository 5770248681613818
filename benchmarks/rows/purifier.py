"""The diffusion purifier in front of `mnist-cnn`: accuracy under attacks with and without its gradient."""

import time
from collections.abc import Mapping
from typing import cast

import torch
from torch import nn

from benchmarks.record import Cells, Claim, Outcome
from holdfast.attacks import APGD
from holdfast.attacks.parts.losses import cross_entropy
from holdfast.attacks.protocol import Attack
from holdfast.core.batch import Batch
from holdfast.core.constraints import Linf
from holdfast.core.draws import Draws
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.through import Through
from holdfast.doubts.gallery.purifiers import ITEMS, NOISY, STEPS, network_of
from holdfast.io.data.data import open_data
from holdfast.runs.assess.exhibition import assessed_net, raised
from holdfast.runs.harness.kinds.passes import FIXED

WHAT = "a diffusion purifier in front of `mnist-cnn`: accuracy under attacks with and without its gradient"
N, SEED, VOTES = 40, 0, 10  # images; seed; draws of the noise over which an accuracy is the mean
GRADIENTS, DRAWS = 400, 10
UNFINISHED = "not-exhausted"


def attacks() -> Mapping[str, Attack]:
    """Attacks with equal numbers of gradients, apart from the first."""
    many = APGD(steps=GRADIENTS, loss=cross_entropy)
    averaged = APGD(steps=GRADIENTS // DRAWS, draws=DRAWS, loss=cross_entropy)
    return {
        "PGD-40": FIXED.attack,
        f"APGD-{GRADIENTS}": many,
        f"APGD-{GRADIENTS // DRAWS} x {DRAWS} draws": averaged,
    }


def accuracy(net: nn.Module, batch: Batch) -> float:
    """Mean accuracy over draws of the noise that no attack has seen."""
    with torch.no_grad():
        hits = [(net(batch.x).argmax(1) == batch.y).float().mean() for _ in range(VOTES)]
    return float(torch.stack(hits).mean())


def measured() -> Outcome:
    (item,) = ITEMS
    data = open_data("mnist-mini", n=N)
    batch, threat = data.read(0, N), ThreatModel(Linf(item.eps))
    model = cast("Through", item.build(batch, nn.Identity()))
    whole = cast("nn.Module", model.backward)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        settings = [("no purifier", network_of(model), "PGD-40")]
        settings += [("gradient without the purifier", model, name) for name in attacks()]
        settings += [("gradient of all steps", whole, name) for name in list(attacks())[1:]]
        table = [row(*setting, batch, threat) for setting in settings]
        result = assessed_net(model, data, item.eps, (FIXED,), seed=SEED, doubts="all")
    doubts = sorted(set(raised(result)) - {UNFINISHED})
    naive, matched, adaptive = (float(table[i]["accuracy under attack"]) for i in (1, 3, 5))
    claims = [
        Claim(f"doubts raised beside `{UNFINISHED}` >= 1", len(doubts), 1, least=True),
        Claim("accuracy under PGD-40 without the gradient of the purifier, minus adaptive >= 0.20", naive - adaptive,
              0.20, least=True),
        Claim("the same with equal numbers of gradients and draws >= 0.20", matched - adaptive, 0.20, least=True),
    ]  # fmt: skip
    config: Cells = {
        "n": N, "eps": item.eps, "time of the noise": NOISY, "steps": STEPS, "accuracy": f"mean of {VOTES} draws",
        "gradients": GRADIENTS, "seed": SEED, "raised": ", ".join(doubts),
    }  # fmt: skip
    notes = [
        f"the time of the noise was chosen for its clean accuracy on training images; one seed, {N} images"
    ]
    return Outcome(table, claims, config, {}, notes)


def row(gradient: str, net: nn.Module, name: str, batch: Batch, threat: ThreatModel) -> Cells:
    """The accuracy on clean and on attacked images, and the cost of the attack."""
    start = time.process_time()
    x_adv = attacks()[name](Classifier(net), batch, threat, rng=Draws(SEED).at(gradient, name))
    spent = time.process_time() - start
    return {
        "gradient": gradient,
        "attack": name,
        "clean": accuracy(net, batch),
        "accuracy under attack": accuracy(net, batch.at(x_adv)),
        "CPU s": spent,
    }
