"""Dataset inference: copies of an MNIST network and independent networks, beside 20 control networks."""

from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.networks import images
from benchmarks.parts import part
from benchmarks.record import Cells, Claim, Outcome
from holdfast.audits.membership_references import scaled_logit
from holdfast.audits.ownership import p_value, statistic

ROW, WHAT = "ownership", "copies of a network and independent networks, beside 20 control networks"
TRAINED, EPOCHS, BATCH, FURTHER = 5000, 15, 64, 15_000
CONTROLS, OTHERS = range(100, 120), range(200, 220)
"""seeds of the control networks and of further independent ones"""
COPIES = ("own examples, scores", "fine-tuned", "other examples, scores")
PUBLISHED = "other examples, labels"


def measured() -> Outcome:
    """Train the networks, and compare their statistics. Each part is kept when it is done."""
    parts = {
        "networks": part(ROW, "networks", partial(_independent, (*CONTROLS, *OTHERS))),
        "copies": part(ROW, "copies", _copies),
    }
    statistics, found = parts["networks"]["measured"], parts["copies"]["measured"]
    controls = [statistics[str(seed)] for seed in CONTROLS]
    p = {name: p_value(value, controls, TRAINED) for name, value in found.items()}
    independent = [p_value(statistics[str(seed)], controls, TRAINED) for seed in OTHERS]
    table: list[Cells] = [{"network": name, "Welch's t": found[name], "p": p[name]} for name in found]
    table += [
        {"network": f"independent, seed {seed}", "Welch's t": statistics[str(seed)], "p": value}
        for seed, value in zip(OTHERS, independent, strict=True)
    ]
    claims = [
        *(Claim(f"p of the copy, {name} <= 1e-3", p[name], 1e-3) for name in COPIES),
        Claim(
            "independent networks with p < 0.05, of 20 <= 3", sum(value < 0.05 for value in independent), 3
        ),
        Claim(
            "independent networks with p < 1e-3, of 20 <= 0", sum(value < 1e-3 for value in independent), 0
        ),
    ]
    config = {"network": "784-128-10", "trained on": TRAINED, "epochs": EPOCHS, "batch": BATCH}
    config |= {"examples of each": TRAINED, "controls": f"{len(CONTROLS)}, each of 5,000 other images"}
    return Outcome(table, claims, config, parts)


def _images() -> tuple[Tensor, Tensor]:
    x, y = images("mnist", 60_000, "train")
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[rows], y[rows]


def _trained(
    seed: int, x: Tensor, y: Tensor, epochs: int = EPOCHS, net: nn.Module | None = None
) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = net or nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
        optimizer = torch.optim.Adam(net.parameters(), 2e-3, fused=True)
        updates = epochs * (-(-len(x) // BATCH))
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=updates)
        for _ in range(epochs):
            for rows in torch.randperm(len(x)).split(BATCH):
                optimizer.zero_grad()
                cross_entropy(net(x[rows]), y[rows]).backward()
                optimizer.step()
                scheduler.step()
    return net.eval()


@torch.no_grad()
def _statistic(net: nn.Module, x: Tensor, y: Tensor) -> float:
    compared = 2 * TRAINED
    return statistic(scaled_logit(net(x[:compared]), y[:compared]), TRAINED)


def _independent(seeds: tuple[int, ...]) -> Cells:
    """Statistics of networks that are trained on images beside those that are compared."""
    x, y = _images()
    rest = torch.arange(2 * TRAINED, len(x))
    found = {}
    for seed in seeds:
        rows = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))[:TRAINED]]
        found[str(seed)] = _statistic(_trained(seed, x[rows], y[rows]), x, y)
    return found


def _copies() -> Cells:
    """Statistics of the network itself and of its copies."""
    x, y = _images()
    model, further = _trained(0, x[:TRAINED], y[:TRAINED]), slice(len(x) - FURTHER, None)
    with torch.no_grad():
        own, other = model(x[:TRAINED]).softmax(1), model(x[further]).softmax(1)
    tuned = slice(len(x) - TRAINED, None)
    found = {
        "own examples, scores": _trained(1, x[:TRAINED], own),
        "fine-tuned": _trained(2, x[tuned], y[tuned], 3, deepcopy(model)),
        "other examples, scores": _trained(3, x[further], other, 8),
        PUBLISHED: _trained(4, x[further], other.argmax(1), 8),
    }
    return {
        "the network": _statistic(model, x, y),
        **{name: _statistic(net, x, y) for name, net in found.items()},
    }
